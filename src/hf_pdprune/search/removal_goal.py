"""RemovalGoal: how far blocks are removed, and from which stage the next one goes."""

from abc import ABC, abstractmethod
from collections.abc import Collection

from ..plan import PruningPlan


# Whether prefill, and whether decode, loses a block.
Stages = tuple[bool, bool]


class RemovalGoal(ABC):
    """
    What a search goes block by block for, see [`StepwiseSearch`].

    Attributes:
        num_prefill_blocks (`int`): Blocks that prefill loses, at most.
        num_decode_blocks (`int`): Blocks that decode loses, at most.
        fewest_blocks (`int`): So many blocks have to be removable, for the goal to be in reach.
        required_blocks (`int`): So many of these also where `max_kl` decides how many go: a speedup was asked for.
        num_steps (`int`, *optional*): Steps that it takes, where that is known.
    """

    num_prefill_blocks: int
    num_decode_blocks: int
    fewest_blocks: int
    required_blocks: int
    num_steps: int | None

    @abstractmethod
    def next_stages(self, plan: PruningPlan, closed: Collection[Stages] = ()) -> list[Stages]:
        """
        What the next block may go out of, `closed` left out. Of several the search takes the one with the least
        `price`; without any it has ended.
        """

    @abstractmethod
    def price(self, before: PruningPlan, after: PruningPlan, kl: float) -> float:
        """What a step from one plan to the next, which adds `kl` to the energy, costs by this goal."""

    @abstractmethod
    def shortfall(self, plan: PruningPlan) -> str | None:
        """What was asked for and is not met by a plan that `max_kl` has cut short; `None` if all is."""


class BlockCounts(RemovalGoal):
    """
    So many blocks out of each stage: first out of both, then out of decode alone; under the relaxed subset rule out of
    decode and of prefill in turns.

    Args:
        num_prefill_blocks (`int`): Blocks that prefill loses.
        num_decode_blocks (`int`): Blocks that decode loses, those among them but under the relaxed subset rule.
        relaxed (`bool`, defaults to `False`): Whether that holds.
        least (`tuple[int, int]`, defaults to `(0, 0)`): Blocks of prefill and of decode that have to go, whatever
            `max_kl` says, since a speedup was asked for.
    """

    def __init__(
        self, num_prefill_blocks: int, num_decode_blocks: int, relaxed: bool = False, least: tuple[int, int] = (0, 0)
    ):
        self.num_prefill_blocks = num_prefill_blocks
        self.num_decode_blocks = num_decode_blocks
        self.relaxed = relaxed
        self.least = least
        self.fewest_blocks = max(num_prefill_blocks, num_decode_blocks)
        self.required_blocks = max(least)
        self.num_steps = num_prefill_blocks + num_decode_blocks if relaxed else num_decode_blocks

    def next_stages(self, plan: PruningPlan, closed: Collection[Stages] = ()) -> list[Stages]:
        lost, goals = _lost(plan), (self.num_prefill_blocks, self.num_decode_blocks)
        from_prefill, from_decode = lost[0] < goals[0], lost[1] < goals[1]
        if not self.relaxed:
            candidates = [(True, True)] * from_prefill + [(False, True)] * from_decode
        else:  # in turns, neither far ahead of the other: each is chosen with most of what the other will lack
            candidates = [(False, True)] * from_decode + [(True, False)] * from_prefill
            candidates.sort(key=lambda stages: lost[0] / goals[0] if stages[0] else lost[1] / goals[1])
        return [stages for stages in candidates if stages not in closed][:1]

    def price(self, before: PruningPlan, after: PruningPlan, kl: float) -> float:
        return kl

    def shortfall(self, plan: PruningPlan) -> str | None:
        if all(lost >= least for lost, least in zip(_lost(plan), self.least, strict=True)):
            return None
        return (
            f"the speedups asked for take {self.num_prefill_blocks} blocks from prefill and {self.num_decode_blocks} "
            "from decode"
        )


def _lost(plan: PruningPlan) -> tuple[int, int]:
    """Blocks that prefill and decode do without."""
    return len(plan.prefill.skipped_blocks), len(plan.decode.missing_blocks)
