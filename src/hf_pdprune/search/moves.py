"""Moves: the neighbours of a plan, all of which keep the numbers of blocks and the subset rule."""

import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..plan import PruningPlan, StagePlan
from .block_statistics import BlockStatistics
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

# Chance of each next block in the ranking, relative to the one before it, to be drawn for removal.
_RANK_DECAY = 0.92
# Share of moves that go to a block nearby: what can be removed lies in runs, and runs are improved at their ends.
_LOCAL_SHARE = 0.4


def with_removed(plan: PruningPlan, prefill: Collection[int], decode: Collection[int]) -> PruningPlan:
    """`plan` with other removed blocks."""
    return replace(plan, prefill=StagePlan(tuple(sorted(prefill))), decode=StagePlan(tuple(sorted(decode))))


def removable_blocks(statistics: BlockStatistics, config: SearchConfig) -> tuple[int, ...]:
    """
    The pruning set: blocks that may be removed outright, the most redundant first. These are the unprotected ones at
    least as redundant as the threshold; where they are fewer than `num_decode_blocks`, as many as that.
    """
    total = statistics.num_hidden_layers
    config.check_model(total)
    allowed = range(config.num_protected_first_blocks, total - config.num_protected_last_blocks)
    ranked = [block for block in statistics.ranking if block in allowed]
    redundancy = statistics.redundancy
    pruning_set = tuple(block for block in ranked if redundancy[block] >= config.distillation_threshold)
    if len(pruning_set) < config.num_decode_blocks:
        logger.warning(
            "only %d blocks are at least as redundant as distillation_threshold=%s; the next most redundant ones may "
            "be removed too, to have %d",
            len(pruning_set),
            config.distillation_threshold,
            config.num_decode_blocks,
        )
        return tuple(ranked[: config.num_decode_blocks])
    return pruning_set


class Moves:
    """
    Draws a neighbour of a plan: one block comes back and another one goes, in prefill and decode together or in
    decode alone; or prefill's choice among decode's removed blocks changes. The one that goes is drawn by redundancy,
    or it is one near the one that comes back, so that runs of removed blocks grow, shrink and shift.

    Args:
        removable (`Sequence[int]`): Blocks that may be removed, the most redundant first.
    """

    def __init__(self, removable: Sequence[int]):
        self.removable = tuple(removable)
        self._weight = {block: _RANK_DECAY**rank for rank, block in enumerate(self.removable)}

    def __call__(self, plan: PruningPlan, rng: random.Random) -> PruningPlan:
        """A neighbour of `plan`; `plan` itself where it has none."""
        prefill, decode = set(plan.prefill.removed_blocks), set(plan.decode.removed_blocks)
        free = [block for block in self.removable if block not in decode]
        decode_only = sorted(decode - prefill)
        kinds = []
        if free and prefill:
            kinds.append("both")
        if free and decode_only:
            kinds.append("decode")
        if prefill and decode_only:
            kinds.append("prefill")
        if not kinds:
            return plan
        kind = rng.choice(kinds)
        back = rng.choice(decode_only if kind == "decode" else sorted(prefill))
        gone = self._draw(back, decode_only if kind == "prefill" else free, decode - {back}, rng)
        if kind != "decode":
            prefill = prefill - {back} | {gone}
        if kind != "prefill":
            decode = decode - {back} | {gone}
        return with_removed(plan, prefill, decode)

    def _draw(self, back: int, candidates: Sequence[int], removed: Collection[int], rng: random.Random) -> int:
        """The block that goes for `back`."""
        if rng.random() < _LOCAL_SHARE:
            step, gone = rng.choice((-1, 1)), back
            while gone in removed or gone == back:  # over the run of removed blocks to its end
                gone += step
            if gone in candidates:
                return gone
        return rng.choices(candidates, [self._weight[block] for block in candidates])[0]
