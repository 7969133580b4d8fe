"""BlockRemovalCallback: removes a plan's blocks in rounds while training goes on."""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..artefact_file import read_json, write_artefact
from ..plan import PruningPlan, StagePlan


ROUNDS_FILE_NAME = "removal_rounds.json"


class BlockRemovalCallback(TrainerCallback):
    """
    Removes the blocks of a plan in rounds. What is removed at a step follows from the step, and from the plans of the
    rounds so far and the steps at which they began: blocks that are gone do not come back, neither where a training is
    resumed with another number of steps, nor where it is followed by another one.

    As long as blocks are still to be removed, a metric says nothing about the final stages: the best metric so far
    is forgotten at every step, so that neither early stopping nor `load_best_model_at_end` looks at it.

    Args:
        plan ([`PruningPlan`]): What is removed in the end.
        rounds (`int`): Number of rounds; each takes about as many blocks as the others, those that both stages lose
            first, then those that prefill projects, then those that decode alone loses.
        fraction (`float`): Part of all steps by which the last round has begun.
        fade_steps (`int`): Steps over which what a block adds to the hidden states is scaled from 1 to 0 before it is
            removed; 0 removes it at once.
        search (`Callable`, *optional*): Called as `search(plan, target)` at the beginning of every round after the
            first; gives the plan of the round, with as many blocks missing as `target`, from that of the round before.
    """

    def __init__(
        self,
        plan: PruningPlan,
        rounds: int = 1,
        fraction: float = 0.5,
        fade_steps: int = 0,
        search: Callable[[PruningPlan, PruningPlan], PruningPlan] | None = None,
    ):
        self.given_plan = plan
        self.rounds = rounds
        self.fraction = fraction
        self.fade_steps = fade_steps
        self.search = search
        # Of the rounds that have begun, and the step at which each did so.
        self.plans = [self.plan_of_round(1)]
        self.starts = [0]
        self.step = 0
        self._remember()

    def plan_of_round(self, number: int) -> PruningPlan:
        """The given plan's part after round `number` (1 is the first): the subset rule holds in each of them."""
        plan = self.given_plan
        # What both stages lose goes first: decode then never waits for KV entries that prefill stops computing.
        both = [block for block in plan.decode.missing_blocks if block in plan.prefill.missing_blocks]
        decode_only = [block for block in plan.decode.missing_blocks if block not in both]
        blocks = [*both, *plan.prefill.projected_blocks, *decode_only]
        gone = set(blocks[: math.ceil(number * len(blocks) / self.rounds)])
        return replace(plan, prefill=_restricted(plan.prefill, gone), decode=_restricted(plan.decode, gone))

    def round_at(self, step: int, max_steps: int) -> int:
        """The round that is under way at a step."""
        length = self.fraction * max_steps / self.rounds
        return self.rounds if length == 0 else min(self.rounds, 1 + int(step / length))

    def first_step(self, number: int, max_steps: int) -> int:
        """The step at which a round is to begin."""
        return next((step for step in range(max_steps) if self.round_at(step, max_steps) >= number), max_steps)

    # What is removed now

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are removed."""
        return len(self.plans) == self.rounds and not self.is_fading

    @property
    def steps_in_round(self) -> int:
        """Steps since the last round began."""
        return self.step - self.starts[-1]

    @property
    def is_fading(self) -> bool:
        """Whether the blocks of this round are on their way out."""
        return self.steps_in_round < self.fade_steps

    @property
    def final_plan(self) -> PruningPlan:
        """The plan in the end, as far as it is known: that of the last round, once it has begun."""
        return self.plans[-1] if len(self.plans) == self.rounds else self.given_plan

    @property
    def current_plan(self) -> PruningPlan:
        """What is missing at this step; fading blocks are still there."""
        if not self.is_fading:
            return self.plans[-1]
        return self.plans[-2] if len(self.plans) > 1 else _without_removal(self.given_plan)

    @property
    def scales(self) -> dict[str, dict[int, float]]:
        """By stage and block, what fading blocks are multiplied with."""
        if not self.is_fading:
            return {}
        scale = 1 - (self.steps_in_round + 1) / (self.fade_steps + 1)
        before, after = self.current_plan, self.plans[-1]
        return {
            stage: dict.fromkeys(
                sorted(set(after.stage(stage).skipped_blocks) - set(before.stage(stage).skipped_blocks)), scale
            )
            for stage in ("prefill", "decode")
        }

    # Events

    def begin_training(self) -> None:
        """Counts steps anew. What an earlier training has removed stays removed: the stages are healed of it."""
        self.starts = [start - self.step for start in self.starts]
        self.step = 0
        self._remember()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With auto_find_batch_size a training begins again after some steps.
        self.plans, self.starts, self.step = (copy.copy(part) for part in self._at_begin)
        to_come = range(len(self.plans) + 1, self.rounds + 1)
        starts = [self.starts[-1], *(max(state.global_step, self.first_step(n, state.max_steps)) for n in to_come)]
        ends = [*starts[1:], state.max_steps - 1]  # after fading there is a step without the last round's blocks
        longest = max(0, min(end - start for start, end in zip(starts, ends, strict=True)))
        if self.fade_steps > longest:
            raise ValueError(
                f"removal_fade_steps={self.fade_steps} is too long: in {state.max_steps} steps with removal_rounds="
                f"{self.rounds} and removal_fraction={self.fraction} a round's blocks have {longest} steps to fade "
                f"before the next round or the end of training; at most {longest} fits"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.is_complete:  # nor was it when the last metric was measured, after the step before this one
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.move_to(state.global_step, state.max_steps)

    def move_to(self, step: int, max_steps: int) -> None:
        """Removes what is to be missing at a step."""
        self.step = step
        while len(self.plans) < self.round_at(step, max_steps):
            target = self.plan_of_round(len(self.plans) + 1)
            self.plans.append(target if self.search is None else self.search(self.plans[-1], target))
            self.starts.append(step)

    # Checkpoints

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the rounds so far into a checkpoint."""
        plans = [plan.to_dict() for plan in self.plans]
        content = {"plans": plans, "starts": self.starts, "step": self.step}
        write_artefact(Path(folder) / ROUNDS_FILE_NAME, content)

    def load(self, folder: str | os.PathLike) -> None:
        """
        Goes back to the rounds of a checkpoint.

        Raises:
            `ValueError`: If it was trained towards another plan.
        """
        content = read_json(Path(folder) / ROUNDS_FILE_NAME)
        plans = [PruningPlan.from_dict(plan) for plan in content["plans"]]
        expected = self.plan_of_round(1 if self.search is not None else len(plans))
        there = plans[0] if self.search is not None else plans[-1]
        if len(plans) > self.rounds or there.digest != expected.digest:
            raise ValueError(
                f"the checkpoint {folder} was trained towards another plan, or in other rounds, than this training"
            )
        self.plans, self.starts, self.step = plans, content["starts"], content["step"]
        self._remember()

    def _remember(self) -> None:
        """Keeps from where the next training begins."""
        self._at_begin = (list(self.plans), list(self.starts), self.step)


def _restricted(stage: StagePlan, gone: set[int]) -> StagePlan:
    """The part of a stage's plan in which only blocks of `gone` are missing."""
    return StagePlan(
        tuple(block for block in stage.removed_blocks if block in gone),
        tuple(pair for pair in stage.merged_blocks if pair[1] in gone),
        tuple(block for block in stage.projected_blocks if block in gone),
    )


def _without_removal(plan: PruningPlan) -> PruningPlan:
    return replace(plan, prefill=StagePlan(), decode=StagePlan())
