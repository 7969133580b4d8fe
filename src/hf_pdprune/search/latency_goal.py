"""LatencyGoal: a faster answer, from whichever stage's blocks cost least for the time that they save."""

from collections.abc import Collection

from torch import nn

from ..blocks import get_blocks
from ..plan import PruningPlan
from ..spread_weights import num_parameters
from .block_sizes import fewest_blocks, head_size, idle_sizes
from .removal_goal import RemovalGoal, Stages


class LatencyGoal(RemovalGoal):
    """
    An answer that is faster than the dense model's, from the first token of its prompt to its own last one. The split
    between the stages is left to the search: each block goes out of the stages where it costs least KL for the time
    that it saves, of which no more counts than is still to be saved.

    Prefill's time goes by the parameters of its blocks, that of decode steps by those of blocks and LM head, which are
    read for every token. Of a block that prefill projects, keys and values still take theirs. What a shorter KV cache
    saves comes on top.

    Args:
        model (`nn.Module`): The dense model.
        speedup (`float`): How many times faster the answer is to be, at least.
        prefill_share (`float`): Prefill's share of the dense model's latency, 0 to 1.
        relaxed (`bool`, defaults to `False`): Whether prefill may lose blocks that decode keeps. Else a block goes out
            of both stages or of decode alone.
        num_protected_blocks (`int`, defaults to `0`): Blocks that may not be removed.

    Raises:
        `ValueError`: If the answer cannot be so much faster.
    """

    num_steps = None

    def __init__(
        self,
        model: nn.Module,
        speedup: float,
        prefill_share: float,
        relaxed: bool = False,
        num_protected_blocks: int = 0,
    ):
        self.speedup = speedup
        self.prefill_share = prefill_share
        self.relaxed = relaxed
        self.sizes = [num_parameters(block) for block in get_blocks(model)]
        self.idle_sizes = idle_sizes(model) if relaxed else []
        self.decode_size = sum(self.sizes) + head_size(model)
        most = min(max(len(self.sizes) - num_protected_blocks, 0), len(self.sizes) - 1)
        self.num_prefill_blocks = self.num_decode_blocks = most
        # Out of both stages, blocks of mean size; where decode's time does not count, out of prefill alone.
        own = sum(self.idle_sizes if relaxed and prefill_share == 1 else self.sizes) / sum(self.sizes)
        block = (prefill_share * own + (1 - prefill_share) * sum(self.sizes) / self.decode_size) / len(self.sizes)
        self.fewest_blocks = fewest_blocks("target_latency_speedup", speedup, 1, block, most)
        self.required_blocks = self.fewest_blocks

    def latency(self, plan: PruningPlan) -> float:
        """Time of an answer, as a part of the dense model's."""
        gone = sum(self.sizes[block] for block in plan.prefill.missing_blocks)
        idle = sum(self.idle_sizes[block] for block in plan.prefill.projected_blocks)
        prefill = 1 - (gone + idle) / sum(self.sizes)
        decode = 1 - sum(self.sizes[block] for block in plan.decode.missing_blocks) / self.decode_size
        return self.prefill_share * prefill + (1 - self.prefill_share) * decode

    def next_stages(self, plan: PruningPlan, closed: Collection[Stages] = ()) -> list[Stages]:
        if self._left(plan) <= 0:
            return []
        candidates = [(True, False), (False, True)] if self.relaxed else [(True, True), (False, True)]
        # What saves nothing is left alone.
        useful = [(p, d) for p, d in candidates if (p and self.prefill_share > 0) or (d and self.prefill_share < 1)]
        return [stages for stages in useful if stages not in closed]

    def price(self, before: PruningPlan, after: PruningPlan, kl: float) -> float:
        saved, left = self.latency(before) - self.latency(after), self._left(before)
        # The greedy path may be there before the annealed one, which has as many blocks gone, but others projected.
        return kl / (min(saved, left) if left > 0 else saved)

    def shortfall(self, plan: PruningPlan) -> str | None:
        if self._left(plan) <= 0:
            return None
        return f"target_latency_speedup {self.speedup} is not met, {1 / self.latency(plan):.2f} is reached"

    def _left(self, plan: PruningPlan) -> float:
        """What is still to be saved, as a part of the dense model's latency."""
        # Speedups are given as rounded numbers.
        return self.latency(plan) - 1 / self.speedup - 1e-9
