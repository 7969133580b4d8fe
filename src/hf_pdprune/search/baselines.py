"""Baselines: the block searches of the field, as strategies over the same objective."""

import random
from collections.abc import Sequence

from accelerate import PartialState
from tqdm.auto import tqdm

from ..plan import PruningPlan
from .moves import with_removed
from .objective import Objective
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


def greedy_prefill(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """One block after the other, each time the one that costs least (SLEB, arXiv 2402.09025), out of both stages."""
    plan = objective.dense_plan
    with _progress("Greedy, prefill", config.num_prefill_blocks) as progress:
        for _ in range(config.num_prefill_blocks):
            objective.accept(plan)
            removed = plan.prefill.removed_blocks
            added = ((*removed, block) for block in removable if block not in removed)
            plan, energy = objective.best_of([with_removed(plan, blocks, blocks) for blocks in added], progress.update)
            progress.set_postfix(energy=f"{energy:.4f}", blocks=plan.prefill.removed_blocks)
            progress.update()
    return plan


def greedy_decode(
    objective: Objective, removable: Sequence[int], config: SearchConfig, plan: PruningPlan
) -> PruningPlan:
    """From `plan` on, one block after the other out of decode alone."""
    missing = config.num_decode_blocks - len(plan.decode.removed_blocks)
    with _progress("Greedy, decode", missing) as progress:
        for _ in range(missing):
            objective.accept(plan)
            prefill, removed = plan.prefill.removed_blocks, plan.decode.removed_blocks
            added = ((*removed, block) for block in removable if block not in removed)
            plan, energy = objective.best_of(
                [with_removed(plan, prefill, blocks) for blocks in added], progress.update
            )
            progress.set_postfix(energy=f"{energy:.4f}", blocks=plan.decode.removed_blocks)
            progress.update()
    return plan


def greedy(objective: Objective, removable: Sequence[int], config: SearchConfig) -> PruningPlan:
    """SLEB for each stage: prefill first, then decode as a superset."""
    return greedy_decode(objective, removable, config, greedy_prefill(objective, removable, config))


def _progress(name: str, total: int) -> tqdm:
    # miniters=0: an update by nothing, after every batch, lets the clock of the bar go on.
    disable = total == 0 or not PartialState().is_main_process
    return tqdm(total=total, desc=name, unit="block", miniters=0, mininterval=1.0, disable=disable)
