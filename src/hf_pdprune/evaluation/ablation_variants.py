"""AblationVariants: the plans that a study puts beside a stage-wise plan, each differing from it in one thing."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..plan import KVPlan, PruningPlan, StagePlan


# As many blocks in all as the plan removes, in another split between the stages.
SPLITS = ("unified", "mirrored")


class AblationVariants:
    """
    Variants of one plan.

    Args:
        plan ([`PruningPlan`]): The stage-wise plan with token-aware blocks.

    Example:

    ```python
    for name, plan in AblationVariants(plan).parts():
        ...
    ```
    """

    def __init__(self, plan: PruningPlan):
        self.plan = plan

    def parts(self) -> Iterator[tuple[str, PruningPlan]]:
        """Nothing, blocks only, cache only, both; and prefill's blocks only (so decode's too, but no more)."""
        plan, nothing = self.plan, StagePlan()
        yield "nothing removed", replace(plan, prefill=nothing, decode=nothing, kv=self._no_window())
        yield "cache only", replace(plan, prefill=nothing, decode=nothing)
        yield "blocks only, decode alone", replace(plan, prefill=nothing, kv=self._no_window())
        yield "blocks only, those of prefill", replace(plan, **self._of_prefill(), kv=self._no_window())
        yield "blocks only", replace(plan, kv=self._no_window())
        yield "blocks and cache", plan

    def windows(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, PruningPlan]]:
        """
        Other windows for the same token-aware blocks.

        Args:
            sizes (`Sequence[tuple[int, int]]`): First and last prompt tokens that are kept.
        """
        for first, last in sizes:
            kv = replace(self.plan.kv, first_tokens=first, last_tokens=last, block_windows=())
            yield f"window {first} + {last}", replace(self.plan, kv=kv)

    def caches(self, prompt_tokens: int, seed: int = 0) -> Iterator[tuple[str, PruningPlan]]:
        """
        All prompt tokens; and at equal bytes the plan's token-aware blocks with the tokens chosen by attention and
        with the first and last ones, the first and last tokens in all blocks (StreamingLLM), and in as many random
        blocks.

        Args:
            prompt_tokens (`int`): For prompts of so many tokens bytes are equal.
            seed (`int`, defaults to 0): Of the random blocks.
        """
        plan, kv, blocks = self.plan, self.plan.kv, self.plan.kept_blocks("decode")
        budget = sum(plan.kept_prompt_tokens(block, prompt_tokens) for block in blocks) // len(blocks)
        first_tokens = min(kv.first_tokens, budget - 1)
        ends = replace(kv, token_choice="first_last")
        drawn = random.Random(seed).sample(blocks, len(kv.token_aware_blocks))
        yield "all tokens", replace(plan, kv=self._no_window())
        yield "attention, our blocks", replace(plan, kv=self._by_attention())
        yield "first + last, our blocks", replace(plan, kv=ends)
        yield "first + last, all blocks", replace(plan, kv=KVPlan(blocks, first_tokens, budget - first_tokens))
        windows = dict(zip(drawn, ends.windows.values(), strict=True))
        yield "first + last, random blocks", replace(plan, kv=ends.with_windows(windows))

    def _by_attention(self) -> KVPlan:
        """The plan's windows with tokens chosen by attention, by no more queries than the smallest window has room."""
        kv = self.plan.kv
        smallest = min((sum(own) for own in kv.windows.values()), default=kv.last_tokens)
        # What the blocks hand over stays: with windows of their own, last_tokens says how many queries choose alone.
        fitting = kv if smallest >= kv.last_tokens else replace(kv.with_windows(kv.windows), last_tokens=smallest)
        return replace(fitting, token_choice="attention")

    def with_blocks(self, other: PruningPlan) -> PruningPlan:
        """
        The blocks of another plan with this one's windows: its token-aware blocks where decode keeps them, and as many
        others instead of those that it does not, so that as many bytes cross the wire.
        """
        kept = other.kept_blocks("decode")
        windows = {b: own for b, own in self.plan.kv.windows.items() if b in self.plan.kept_blocks("decode")}
        chosen = {block: own for block, own in windows.items() if block in kept}
        homeless = [own for block, own in windows.items() if block not in kept]
        chosen |= dict(zip((block for block in kept if block not in chosen), homeless, strict=False))
        return replace(other, kv=self.plan.kv.with_windows(chosen))

    def split(self, strategy: str) -> tuple[str, int, int]:
        """
        How a strategy is searched, and how many blocks it takes from prefill and from decode: as many as the plan
        (most strategies know the strict subset rule alone), or with one of [`SPLITS`] as many in all.

        Args:
            strategy (`str`): One of the search's, or `"unified"` (the same blocks out of both stages, greedy), or
                `"mirrored"` (the plan's two numbers exchanged; under the relaxed subset rule, which is annealed).
        """
        decode = len(self.plan.decode.missing_blocks)
        prefill = min(len(self.plan.prefill.skipped_blocks), decode)
        if strategy == "unified":
            return "greedy", self.unified_blocks, self.unified_blocks
        return ("annealing", decode, prefill) if strategy == "mirrored" else (strategy, prefill, decode)

    @property
    def unified_blocks(self) -> int:
        """
        Blocks that a unified plan of the same cost removes from both stages: half of what the stages lose together,
        rounded down, in the unified plan's favour.
        """
        return (len(self.plan.prefill.skipped_blocks) + len(self.plan.decode.missing_blocks)) // 2

    def _of_prefill(self) -> dict[str, StagePlan]:
        """Both stages without the blocks that prefill lacks; what it projects, decode runs."""
        both = replace(self.plan.prefill, projected_blocks=())
        return {"prefill": both, "decode": both}

    def _no_window(self) -> KVPlan:
        return self.plan.kv.with_windows({})
