"""StepwiseSearch: one block after the other, and annealing after each step."""

import logging
import math
from dataclasses import dataclass

from ..plan import PruningPlan
from .annealing import AnnealingSearch
from .block_progress import BlockProgress
from .moves import Moves
from .objective import Objective
from .operations import Operations, missing_of
from .removal_goal import RemovalGoal, Stages
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

# An addition to an annealed plan whose cost in the greedy steps, times this, is above that of the best one is not
# measured (lazy greedy, Minoux 1978, with a margin, since KL is not submodular). Annealing may still find it.
_LEAST_PART_OF_LAST_COST = 0.5

# What blocks go out of, by whether prefill and whether decode loses them.
_STAGES = {(True, True): "both stages", (False, True): "decode", (True, False): "prefill"}


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
    Finds plans with one block after the other gone, out of the stages that the goal says. Where it leaves that open,
    the next block goes out of those in which the best addition to the greedy path has the least price.

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

    def run(self, goal: RemovalGoal, max_kl: float = math.inf) -> list[Step]:
        """
        Args:
            goal ([`RemovalGoal`]): What each stage loses.
            max_kl (`float`, *optional*): Steps that end above it are not taken: then fewer blocks are lost.

        Returns:
            `list[Step]`: One for each block, in order; the last one is the result.
        """
        steps: list[Step] = []
        plan = greedy = self.objective.dense_plan
        closed: set[Stages] = set()  # what nothing more goes out of
        with BlockProgress(goal.num_steps) as progress:
            while candidates := goal.next_stages(plan, closed):
                additions = {stages: self.operations.additions(greedy, *stages) for stages in candidates}
                if exhausted := {stages for stages in candidates if not additions[stages]}:
                    closed |= exhausted
                    continue
                self.objective.accept(greedy)
                stages = self._cheapest(greedy, additions, goal, progress)
                progress.set_description(f"Blocks out of {_STAGES[stages]}")
                next_greedy, step = self._step(greedy, additions[stages], plan, stages, progress)
                if step.energy > max_kl:
                    self.refused.append(step)
                    closed.add(stages)
                    continue
                steps.append(step)
                plan, greedy = step.plan, next_greedy
                progress.update()
                progress.set_postfix(energy=f"{step.energy:.4f}", blocks=plan.decode.missing_blocks)
        return steps

    def _cheapest(
        self,
        greedy: PruningPlan,
        additions: dict[Stages, list[PruningPlan]],
        goal: RemovalGoal,
        progress: BlockProgress,
    ) -> Stages:
        """What the next block goes out of."""
        if len(additions) == 1:
            return next(iter(additions))
        progress.set_description("Blocks out of either stage")
        energy, prices = self.objective.energy(greedy), {}
        for stages, plans in additions.items():
            best, best_energy = self.objective.best_of(plans, progress.update)
            prices[stages] = goal.price(greedy, best, best_energy - energy)
        cheapest = min(prices, key=prices.get)
        # The step counts its own.
        others = {stages: plans for stages, plans in additions.items() if stages != cheapest}
        self.plain_block_tokens += sum(self._plain_block_tokens(greedy, others[stages], stages) for stages in others)
        return cheapest

    def _plain_block_tokens(self, greedy: PruningPlan, additions: list[PruningPlan], stages: Stages) -> int:
        """What a plain greedy loop spends on a step."""
        shortened = greedy.decode if stages[1] else greedy.prefill
        left = sum(block not in shortened.skipped_blocks for block in self.operations.removable)
        return left * self.objective.plain_block_tokens(additions[0])

    def _step(
        self,
        greedy: PruningPlan,
        additions: list[PruningPlan],
        plan: PruningPlan,
        stages: Stages,
        progress: BlockProgress,
    ) -> tuple[PruningPlan, Step]:
        """The greedy plan with one block less, and the step of the path beside it."""
        objective, operations = self.objective, self.operations
        plain = self._plain_block_tokens(greedy, additions, stages)
        self.plain_block_tokens += plain
        start, greedy_energy = objective.best_of(additions, progress.update)
        self._note(greedy, additions)
        best, energy = start, greedy_energy
        # Of single blocks the best is known already, where each can go in one way only.
        single = max(len(start.prefill.skipped_blocks), len(start.decode.missing_blocks)) == 1
        is_best = single and not (operations.has_pairs or operations.relaxed)
        if self.annealing_share and not is_best:
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
        self, greedy: PruningPlan, plan: PruningPlan, stages: Stages, budget: int, progress: BlockProgress
    ) -> PruningPlan:
        """The best of some annealings, from `greedy` or the best addition to `plan`."""
        objective, config, begun = self.objective, self.config, self.objective.cost.total
        start = greedy
        if additions := self.operations.additions(plan, *stages):
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


def _added(plan: PruningPlan, addition: PruningPlan) -> tuple[bool, int, int | None]:
    """The operation by which `addition` goes beyond `plan`: whether decode loses a block, which one, and how."""
    in_decode = plan.decode != addition.decode
    before, after = (missing_of(p.decode if in_decode else p.prefill) for p in (plan, addition))
    (block,) = after.keys() - before.keys()
    return in_decode, block, after[block]
