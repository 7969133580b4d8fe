"""BlockRemovalCallback: removes a plan's blocks in rounds while training goes on."""

import math
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..plan import PruningPlan, StagePlan


class BlockRemovalCallback(TrainerCallback):
    """
    Removes the blocks of a plan in rounds. What is removed at a step follows from the step alone, so that a resumed
    training goes on in the round in which it stopped.

    Args:
        plan ([`PruningPlan`]): What is removed in the end.
        rounds (`int`): Number of rounds; each removes about as many blocks of decode as the others, and those of them
            that prefill does without.
        fraction (`float`): Part of all steps by which the last round has begun.
    """

    def __init__(self, plan: PruningPlan, rounds: int = 1, fraction: float = 0.5):
        self.final_plan = plan
        self.rounds = rounds
        self.fraction = fraction
        self.current_plan = self.plan_of_round(1)

    def plan_of_round(self, number: int) -> PruningPlan:
        """The plan after round `number` (1 is the first): the subset rule holds in each of them."""
        plan = self.final_plan
        # What both stages lose goes first: decode then never waits for KV entries that prefill stops computing.
        both = [block for block in plan.decode.missing_blocks if block in plan.prefill.missing_blocks]
        decode_only = [block for block in plan.decode.missing_blocks if block not in both]
        gone = set((both + decode_only)[: math.ceil(number * len(both + decode_only) / self.rounds)])
        return replace(plan, prefill=_restricted(plan.prefill, gone), decode=_restricted(plan.decode, gone))

    def round_at(self, step: int, max_steps: int) -> int:
        """The round that is under way at a step."""
        length = self.fraction * max_steps / self.rounds
        return self.rounds if length == 0 else min(self.rounds, 1 + int(step / length))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_plan = self.plan_of_round(self.round_at(state.global_step, state.max_steps))


def _restricted(stage: StagePlan, gone: set[int]) -> StagePlan:
    """The part of a stage's plan in which only blocks of `gone` are missing."""
    return StagePlan(
        tuple(block for block in stage.removed_blocks if block in gone),
        tuple(pair for pair in stage.merged_blocks if pair[1] in gone),
    )
