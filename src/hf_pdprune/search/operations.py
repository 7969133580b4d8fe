"""Operations: what may be done to the blocks of a stage, and plans made of it."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from ..plan import PruningPlan, StagePlan
from .block_statistics import BlockStatistics
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

# The blocks that a stage does without, each with the block that stands for it too (`None`: removed outright).
Missing = Mapping[int, int | None]


def missing_of(stage: StagePlan) -> dict[int, int | None]:
    """The operations of a stage. Projected blocks are among the removed ones, told apart by that decode has them."""
    return {
        **dict.fromkeys((*stage.removed_blocks, *stage.projected_blocks)),
        **{absorbed: kept for kept, absorbed in stage.merged_blocks},
    }


def with_removed(plan: PruningPlan, prefill: Collection[int], decode: Collection[int]) -> PruningPlan:
    """`plan` with other removed blocks, and no merged ones."""
    return replace(plan, prefill=StagePlan(tuple(sorted(prefill))), decode=StagePlan(tuple(sorted(decode))))


def removable_blocks(statistics: BlockStatistics, config: SearchConfig, at_least: int = 0) -> tuple[int, ...]:
    """
    The pruning set: blocks that may be removed outright, the most redundant first. These are the unprotected ones at
    least as redundant as the threshold; where they are fewer than `at_least`, as many as that.
    """
    ranked = unprotected_blocks(statistics, config)
    redundancy = statistics.redundancy
    pruning_set = tuple(block for block in ranked if redundancy[block] >= config.distillation_threshold)
    if len(pruning_set) < at_least:
        logger.warning(
            "only %d blocks are at least as redundant as distillation_threshold=%s; the next most redundant ones may "
            "be removed too, to have %d",
            len(pruning_set),
            config.distillation_threshold,
            at_least,
        )
        return ranked[:at_least]
    return pruning_set


def unprotected_blocks(statistics: BlockStatistics, config: SearchConfig) -> tuple[int, ...]:
    """All blocks but the protected ones at both ends, the most redundant first."""
    allowed = range(config.num_protected_first_blocks, statistics.num_hidden_layers - config.num_protected_last_blocks)
    return tuple(block for block in statistics.ranking if block in allowed)


class Operations:
    """
    The two operations, each of which makes a stage one block shorter: remove a block, or merge a pair of neighbours
    into its first block (see [`MergedPairs`]).

    Args:
        removable (`Iterable[int]`): Blocks that may be removed outright, the most redundant first.
        pairs (`Iterable[tuple[int, int]]`): Pairs [kept, absorbed] that may be merged, of neighbours.
        relaxed (`bool`, defaults to `False`): Whether prefill may do without blocks that decode has (the relaxed
            subset rule): of these it computes keys and values alone.

    Attributes:
        blocks (`tuple[int, ...]`): Blocks that a stage can do without, the removable ones first.
    """

    def __init__(self, removable: Iterable[int], pairs: Iterable[tuple[int, int]] = (), relaxed: bool = False):
        self.removable = tuple(removable)
        self.relaxed = relaxed
        self._kept_for = {absorbed: kept for kept, absorbed in pairs}
        self.blocks = (*self.removable, *sorted(set(self._kept_for) - set(self.removable)))

    @property
    def has_pairs(self) -> bool:
        """Whether any pair may be merged."""
        return bool(self._kept_for)

    def ways(self, block: int, missing: Missing) -> Iterator[int | None]:
        """How `block` can go from a stage that does without `missing`: merged into which block, or `None`: removed."""
        kept = self._kept_for.get(block)
        if kept is not None and kept not in missing:
            yield kept
        if block in self.removable:
            yield None

    def settled(self, missing: Missing) -> dict[int, int | None] | None:
        """`missing` where pairs whose kept block has gone are removals; `None` where one may not be removed."""
        settled = {}
        for block, kept in missing.items():
            kept = None if kept in missing else kept
            if kept is None and block not in self.removable:
                return None
            settled[block] = kept
        return settled

    def plan(self, plan: PruningPlan, prefill: Missing, decode: Missing) -> PruningPlan | None:
        """`plan` with these operations, or `None` where they are impossible or break the subset rule."""
        prefill, decode = self.settled(prefill), self.settled(decode)
        if prefill is None or decode is None:
            return None
        projected = prefill.keys() - decode.keys()
        if projected and not (self.relaxed and all(prefill[block] is None for block in projected)):
            return None
        return replace(plan, prefill=_stage_plan(prefill, projected), decode=_stage_plan(decode))

    def additions(self, plan: PruningPlan, in_prefill: bool, in_decode: bool) -> list[PruningPlan]:
        """
        Plans with one more block gone from both stages or from one of them: merged where it can be, which is nearly
        always better, and else removed, or projected where decode keeps it.
        """
        prefill, decode = missing_of(plan.prefill), missing_of(plan.decode)
        found = []
        for block in self.blocks:
            if in_prefill and block in prefill or in_decode and block in decode:
                continue
            ways = [decode.get(block)] if not in_decode else list(self.ways(block, decode))[:1]
            for way in ways:
                gone = {block: way}
                added = self.plan(
                    plan,
                    prefill | gone if in_prefill or block in prefill else prefill,
                    decode | gone if in_decode else decode,
                )
                found += [] if added is None else [added]
        return found


def _stage_plan(missing: Missing, projected: Collection[int] = ()) -> StagePlan:
    removed = sorted(block for block, kept in missing.items() if kept is None and block not in projected)
    merged = sorted((kept, block) for block, kept in missing.items() if kept is not None)
    return StagePlan(tuple(removed), tuple(merged), tuple(sorted(projected)))
