"""StepwiseSearch: one block after the other, and annealing after each step."""

import logging
import math
from dataclasses import dataclass

from accelerate import PartialState
from tqdm.auto import tqdm

from ..plan import PruningPlan
from .annealing import AnnealingSearch
from .moves import Moves
from .objective import Objective
from .operations import Operations, missing_of
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

# An addition to an annealed plan whose cost in the greedy steps, times this, is above that of the best one is not
# measured (lazy greedy, Minoux 1978, with a margin, since KL is not submodular). Annealing may still find it.
_LEAST_PART_OF_LAST_COST = 0.5


@dataclass
class Step:
    """
    Where the search stands after a step.

    Args:
        plan (`PruningPlan`): The best plan with as many blocks.
        energy (`float`): Its energy, on all batches.
        greedy_energy (`float`): That of the greedy plan with as many blocks.
        block_tokens (`int`): Block forwards x tokens spent so far.
        plain_block_tokens (`int`): What a plain greedy loop (SLEB) over the removable blocks would have spent so far:
            every candidate of every step, on all batches and from block 0 to the end.
    """

    plan: PruningPlan
    energy: float
    greedy_energy: float
    block_tokens: int
    plain_block_tokens: int


class StepwiseSearch:
    """
    Finds plans with one block after the other gone: first from both stages, then from decode alone, or, under the
    relaxed subset rule, from prefill alone where it is to lose more.

    The greedy path, exact, takes the best addition to the plan before it each time; with removals only it is SLEB
    (arXiv 2402.09025) for each stage. With annealing there is a second path beside it: each of its steps starts from
    the greedy plan of that size or from the best addition to its own plan before that, whichever is better, and
    anneals the whole set, so that blocks of earlier steps, in prefill too, may be changed for others under the subset
    rule (floating search, Pudil et al. 1994, with annealing for the backward steps). So it never ends above the greedy
    plan of any size.

    Args:
        objective ([`Objective`]): Gives energies.
        operations ([`Operations`]): What may be done.
        config ([`SearchConfig`]): The options.
        annealing (`bool`, defaults to `True`): Whether there is a path with annealing.

    Attributes:
        refused (`list[Step]`): Steps that ended above `max_kl`.
    """

    def __init__(self, objective: Objective, operations: Operations, config: SearchConfig, annealing: bool = True):
        self.objective = objective
        self.operations = operations
        self.config = config
        self.annealing_share = config.annealing_share if annealing else 0.0
        self.plain_block_tokens = 0
        self.refused: list[Step] = []
        self._last_cost: dict[tuple[bool, int, int | None], float] = {}

    def run(self, num_prefill_blocks: int, num_decode_blocks: int, max_kl: float = math.inf) -> list[Step]:
        """
        Args:
            num_prefill_blocks (`int`): Blocks that prefill loses.
            num_decode_blocks (`int`): Blocks that decode loses, those among them.
            max_kl (`float`, *optional*): Steps that end above it are not taken: then fewer blocks are lost.

        Returns:
            `list[Step]`: One for each block, in order; the last one is the result.
        """
        steps: list[Step] = []
        plan = greedy = self.objective.dense_plan
        goals = {
            "both stages": (num_prefill_blocks, num_decode_blocks),
            "decode": (0, num_decode_blocks),
            "prefill": (num_prefill_blocks if self.operations.relaxed else 0, 0),
        }
        if not all(goals["both stages"]):
            del goals["both stages"]
        with tqdm(
            total=max(num_prefill_blocks, num_decode_blocks),
            unit="block",
            disable=not (num_prefill_blocks or num_decode_blocks) or not PartialState().is_main_process,
            miniters=0,  # an update by nothing, after every batch, lets the clock of the bar go on
            mininterval=1.0,
        ) as progress:
            for name, (from_prefill, from_decode) in goals.items():
                stages = from_prefill > 0, from_decode > 0
                if not any(stages):
                    continue
                progress.set_description(f"Blocks out of {name}")
                while not _is_reached(plan, from_prefill, from_decode):
                    if not (additions := self.operations.additions(greedy, *stages)):
                        break
                    next_greedy, step = self._step(greedy, additions, plan, stages, progress)
                    if step.energy > max_kl:  # these stages can lose no more; perhaps the next ones can
                        self.refused.append(step)
                        break
                    steps.append(step)
                    plan, greedy = step.plan, next_greedy
                    progress.update()
                    progress.set_postfix(energy=f"{step.energy:.4f}", blocks=plan.decode.missing_blocks)
        return steps

    def _step(
        self,
        greedy: PruningPlan,
        additions: list[PruningPlan],
        plan: PruningPlan,
        stages: tuple[bool, bool],
        progress: tqdm,
    ) -> tuple[PruningPlan, Step]:
        """The greedy plan with one block less, and the step of the path beside it."""
        objective, operations = self.objective, self.operations
        shortened = greedy.decode if stages[1] else greedy.prefill
        left = sum(block not in shortened.skipped_blocks for block in operations.removable)
        plain = left * objective.plain_block_tokens(additions[0])
        self.plain_block_tokens += plain
        objective.accept(greedy)
        start, greedy_energy = objective.best_of(additions, progress.update)
        self._note(greedy, additions)
        best, energy = start, greedy_energy
        # Of single blocks the best is known already.
        single = max(len(start.prefill.skipped_blocks), len(start.decode.missing_blocks)) == 1
        if self.annealing_share and not (single and not operations.has_pairs and not operations.relaxed):
            with objective.estimating(self.config.search_share, self.config.search_confidence or None):
                found = self._anneal(start, plan, stages, round(self.annealing_share * plain), progress)
            objective.accept(found)
            if (found_energy := objective.energy(found)) < energy:  # else the part has misled
                best, energy = found, found_energy
        return start, Step(best, energy, greedy_energy, objective.cost.total, self.plain_block_tokens)

    def _expected(self, plan: PruningPlan, additions: list[PruningPlan]) -> list[float]:
        """What additions cost at least, if they cost no less than a part of what they did in earlier steps."""
        energy = self.objective.lower_bound(plan)
        costs = [self._last_cost.get(_added(plan, addition), 0.0) for addition in additions]
        return [energy + _LEAST_PART_OF_LAST_COST * cost for cost in costs]

    def _note(self, plan: PruningPlan, additions: list[PruningPlan]) -> None:
        """Remembers what each addition to `plan` costs, at least."""
        energy = self.objective.lower_bound(plan)
        for addition in additions:
            if (bound := self.objective.lower_bound(addition)) > 0:
                self._last_cost[_added(plan, addition)] = max(bound - energy, 0.0)

    def _anneal(
        self, greedy: PruningPlan, plan: PruningPlan, stages: tuple[bool, bool], budget: int, progress: tqdm
    ) -> PruningPlan:
        """The best of some annealings, from `greedy` or the best addition to `plan`."""
        objective, config, begun = self.objective, self.config, self.objective.cost.total
        additions = self.operations.additions(plan, *stages)
        objective.accept(plan)
        beside, _ = objective.best_of(additions, progress.update, self._expected(plan, additions))
        start = min((greedy, beside), key=objective.energy)
        found, size = [start], f"{len(start.prefill.skipped_blocks)}/{len(start.decode.missing_blocks)}"
        budget = max(budget - (objective.cost.total - begun), 0)
        for restart in range(config.num_restarts):
            search = AnnealingSearch(
                objective,
                Moves(self.operations),
                f"{config.search_seed} {restart} {size}",
                config.initial_temperature,
                config.final_temperature,
                f"Annealing {size} blocks",
            )
            found.append(search.run(start, budget // config.num_restarts))
        return min(found, key=objective.energy)


def _is_reached(plan: PruningPlan, from_prefill: int, from_decode: int) -> bool:
    """Whether a stage that is to lose blocks has lost as many."""
    return (0 < from_prefill <= len(plan.prefill.skipped_blocks)) or (
        0 < from_decode <= len(plan.decode.missing_blocks)
    )


def _added(plan: PruningPlan, addition: PruningPlan) -> tuple[bool, int, int | None]:
    """The operation by which `addition` goes beyond `plan`: whether decode loses a block, which one, and how."""
    in_decode = plan.decode != addition.decode
    before, after = (missing_of(p.decode if in_decode else p.prefill) for p in (plan, addition))
    (block,) = after.keys() - before.keys()
    return in_decode, block, after[block]
