"""Baselines: the block searches of the field, as strategies over the same objective."""

import random
from collections.abc import Sequence

from ..plan import PruningPlan
from .objective import Objective
from .operations import with_removed
from .search_config import SearchConfig


def one_shot(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """The most redundant blocks, nothing measured (ShortGPT, arXiv 2403.03853). `removable` is ranked."""
    return with_removed(
        objective.dense_plan, removable[: config.num_prefill_blocks], removable[: config.num_decode_blocks]
    )


def random_blocks(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """Blocks drawn by the seed."""
    drawn = random.Random(f"{config.search_seed} random").sample(sorted(removable), config.num_decode_blocks)
    return with_removed(objective.dense_plan, drawn[: config.num_prefill_blocks], drawn)


def end_group(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """The last blocks before the protected ones (the simple strategy of Gromov et al., arXiv 2403.17887)."""
    end = objective.total_blocks - config.num_protected_last_blocks
    return with_removed(
        objective.dense_plan,
        range(end - config.num_prefill_blocks, end),
        range(end - config.num_decode_blocks, end),
    )


def contiguous_group(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """The run of neighbours that costs least: for prefill first, then for decode the best run around that."""
    first, end = config.num_protected_first_blocks, objective.total_blocks - config.num_protected_last_blocks
    plan, prefill = objective.dense_plan, range(0)
    if config.num_prefill_blocks:
        count = config.num_prefill_blocks
        groups = [range(begin, begin + count) for begin in range(first, end - count + 1)]
        objective.accept(plan)
        plan, _ = objective.best_of([with_removed(plan, group, group) for group in groups])
        prefill = plan.prefill.removed_blocks
    if config.num_decode_blocks > config.num_prefill_blocks:
        count = config.num_decode_blocks
        groups = [range(begin, begin + count) for begin in range(first, end - count + 1)]
        groups = [group for group in groups if set(prefill) <= set(group)]
        objective.accept(plan)
        plan, _ = objective.best_of([with_removed(plan, prefill, group) for group in groups])
    return plan
