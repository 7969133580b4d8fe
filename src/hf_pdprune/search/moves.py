"""Moves: the neighbours of a plan, all of which keep the numbers of blocks and the subset rule."""

import random
from collections.abc import Collection, Sequence

from ..plan import PruningPlan
from .operations import Missing, Operations, missing_of


# Chance of each next block in the ranking, relative to the one before it, to be drawn for removal.
_RANK_DECAY = 0.92
# Share of moves that go to a block nearby: what can be removed lies in runs, and runs are improved at their ends.
_LOCAL_SHARE = 0.4
# Share of moves, where pairs can be merged, that change how a block goes and not which.
_WAY_SHARE = 0.1


class Moves:
    """
    Draws a neighbour of a plan: one block comes back and another one goes, in prefill and decode together or in
    decode alone; or prefill's choice among decode's missing blocks changes; or a block that was removed is merged
    into its neighbour, or the reverse. The one that goes is drawn by redundancy, or it is one near the one that comes
    back, so that runs of missing blocks grow, shrink and shift.

    Under the relaxed subset rule prefill's choice is among all blocks, and decode may take back what prefill lacks.

    Args:
        operations ([`Operations`]): What may be done.
    """

    def __init__(self, operations: Operations):
        self.operations = operations
        self._weight = {block: _RANK_DECAY**rank for rank, block in enumerate(operations.blocks)}

    def __call__(self, plan: PruningPlan, rng: random.Random) -> PruningPlan:
        """A neighbour of `plan`; `plan` itself where the draw gives none."""
        prefill, decode = missing_of(plan.prefill), missing_of(plan.decode)
        if self.operations.has_pairs and decode and rng.random() < _WAY_SHARE:
            return self._other_way(plan, prefill, decode, rng)
        # By kind: blocks that may come back, and blocks that may go for one of them.
        blocks, relaxed = self.operations.blocks, self.operations.relaxed
        decode_only = sorted(decode.keys() - prefill.keys())
        candidates = {
            "both": (
                sorted(prefill.keys() & decode.keys()),
                [block for block in blocks if block not in decode and block not in prefill],
            ),
            "decode": (
                sorted(decode) if relaxed else decode_only,
                [block for block in blocks if block not in decode],
            ),
            "prefill": (
                sorted(prefill),
                [block for block in blocks if block not in prefill] if relaxed else decode_only,
            ),
        }
        kinds = [kind for kind, (backs, goners) in candidates.items() if backs and goners]
        if not kinds:
            return plan
        kind = rng.choice(kinds)
        backs, goners = candidates[kind]
        back = rng.choice(backs)
        changed = prefill if kind == "prefill" else decode
        gone = self._draw(back, goners, (decode if not relaxed else changed).keys() - {back}, rng)
        if kind == "prefill":
            way = decode.get(gone)
        else:
            del decode[back]
            way = self._way(gone, decode, rng)
            decode[gone] = way
        if kind != "decode":
            del prefill[back]
        if kind != "decode" or gone in prefill:
            prefill[gone] = way
        return self.operations.plan(plan, prefill, decode) or plan

    def _draw(self, back: int, candidates: Sequence[int], missing: Collection[int], rng: random.Random) -> int:
        """The block that goes for `back`."""
        if rng.random() < _LOCAL_SHARE:
            step, gone = rng.choice((-1, 1)), back
            while gone in missing or gone == back:  # over the run of missing blocks to its end
                gone += step
            if gone in candidates:
                return gone
        return rng.choices(candidates, [self._weight[block] for block in candidates])[0]

    def _way(self, block: int, missing: Missing, rng: random.Random) -> int | None:
        """How it goes: merged where it can be, most of the time."""
        ways = list(self.operations.ways(block, missing))
        return ways[0] if ways and rng.random() < 1 - _WAY_SHARE else (ways or [None])[-1]

    def _other_way(
        self, plan: PruningPlan, prefill: dict[int, int | None], decode: dict[int, int | None], rng: random.Random
    ) -> PruningPlan:
        block = rng.choice(sorted(decode))
        ways = [way for way in self.operations.ways(block, decode) if way != decode[block]]
        if not ways:
            return plan
        decode[block] = ways[0]
        if block in prefill:
            prefill[block] = ways[0]
        return self.operations.plan(plan, prefill, decode) or plan
