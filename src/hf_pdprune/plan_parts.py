"""The parts of a pruning plan: what it says of one stage (StagePlan), and of the hand-over (KVPlan)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .blocks import check_block_numbers


TOKEN_CHOICES = ("first_last", "attention")
# With the choice by attention: the queries that choose, SnapKV's observation window. They are kept, too.
_MOST_OBSERVED_TOKENS = 32


def check_keys(data: Any, allowed: Iterable[str], where: str) -> None:
    """Raises a `ValueError` that names the first key of `data` which is unknown or missing."""
    allowed = list(allowed)
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(data).__name__}")
    for key in data:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {key!r}; known keys: {', '.join(allowed)}")
    for key in allowed:
        if key not in data:
            raise ValueError(f"{where}: key {key!r} is missing")


@dataclass(frozen=True)
class StagePlan:
    """
    What one stage does without.

    Args:
        removed_blocks (`tuple[int, ...]`): Blocks removed outright.
        merged_blocks (`tuple[tuple[int, int], ...]`): Pairs [kept, absorbed]: one distilled block at the kept one's
            place stands for both.
        projected_blocks (`tuple[int, ...]`): Blocks of which prefill computes keys and values alone, from the hidden
            states that pass by, since decode keeps the block (the relaxed subset rule).
    """

    removed_blocks: tuple[int, ...] = ()
    merged_blocks: tuple[tuple[int, int], ...] = ()
    projected_blocks: tuple[int, ...] = ()

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks that this stage does not run: the removed and the absorbed ones, rising."""
        return tuple(sorted((*self.removed_blocks, *(absorbed for _, absorbed in self.merged_blocks))))

    @property
    def skipped_blocks(self) -> tuple[int, ...]:
        """Blocks that add nothing to this stage's hidden states: the missing and the projected ones, rising."""
        return tuple(sorted((*self.missing_blocks, *self.projected_blocks)))

    def to_dict(self) -> dict[str, Any]:
        data = {
            "removed_blocks": list(self.removed_blocks),
            "merged_blocks": [list(pair) for pair in self.merged_blocks],
        }
        # Only where there are some: other plans stay readable for versions that know nothing of it.
        return data | ({"projected_blocks": list(self.projected_blocks)} if self.projected_blocks else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "StagePlan":
        if isinstance(data, dict):
            data = {"projected_blocks": [], **data}
        check_keys(data, ("removed_blocks", "merged_blocks", "projected_blocks"), where)
        for key, value in data.items():
            if not isinstance(value, list):
                raise ValueError(f"{where}.{key} must be a list, got {value!r}")
        for pair in data["merged_blocks"]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{where}.merged_blocks: {pair!r} is not a pair [kept, absorbed]")
        return cls(
            tuple(data["removed_blocks"]),
            tuple((kept, absorbed) for kept, absorbed in data["merged_blocks"]),
            tuple(data["projected_blocks"]),
        )

    def checked(self, total: int, where: str) -> "StagePlan":
        """This plan with sorted numbers, or a `ValueError` that names the key which is wrong."""
        removed = check_block_numbers(self.removed_blocks, total, f"{where}.removed_blocks")
        in_pairs = [number for pair in self.merged_blocks for number in pair]
        check_block_numbers(in_pairs, total, f"{where}.merged_blocks")
        both = sorted(set(removed) & set(in_pairs))
        if both:
            raise ValueError(f"{where}.merged_blocks: block {both[0]} is in {where}.removed_blocks too")
        projected = check_block_numbers(self.projected_blocks, total, f"{where}.projected_blocks")
        both = sorted(set(projected) & {*removed, *in_pairs})
        if both:
            raise ValueError(f"{where}.projected_blocks: block {both[0]} is removed or merged there too")
        checked = StagePlan(removed, tuple(sorted(tuple(pair) for pair in self.merged_blocks)), projected)
        if len(checked.missing_blocks) >= total:
            raise ValueError(f"{where} removes all {total} blocks; at least one has to stay")
        if len(checked.skipped_blocks) >= total:
            raise ValueError(f"{where} removes or projects all {total} blocks; at least one has to run")
        return checked


@dataclass(frozen=True)
class KVPlan:
    """
    Which KV entries of the prompt the decode stage receives.

    A token-aware block hands over `first_tokens + last_tokens` real prompt tokens per KV head (a shorter prompt: all).
    Which ones, `token_choice` says:

    - `"first_last"`: the first `first_tokens` and the last `last_tokens`.
    - `"attention"` (SnapKV, arXiv 2404.14469): the last `min(32, last_tokens)`, which are observed, and of those
      before them the ones to which the observed tokens' queries attend most, each with the mean of its five
      neighbours. Every block and KV head chooses for itself, so nothing but the bytes is the same. It costs prefill a
      few percent, and pays where the stages are otherwise dense (dev/LOG.md, "Token choice at equal bytes").

    A block may have another window, `block_windows` says which: what one block hardly misses is dear in another
    (dev/LOG.md, "Windows of blocks").

    Args:
        token_aware_blocks (`tuple[int, ...]`): Blocks that hand over only these; all others hand over everything.
        first_tokens (`int`, defaults to 16): Prompt tokens at the beginning that the window keeps.
        last_tokens (`int`, defaults to 112): Prompt tokens at the end that the window keeps.
        token_choice (`str`, defaults to `"first_last"`): `"first_last"` or `"attention"`.
        block_windows (`tuple[tuple[int, int, int], ...]`): `(block, first_tokens, last_tokens)` of the token-aware
            blocks with another window.
    """

    token_aware_blocks: tuple[int, ...] = ()
    first_tokens: int = 16
    last_tokens: int = 112
    token_choice: str = "first_last"
    block_windows: tuple[tuple[int, int, int], ...] = ()

    @property
    def windows(self) -> dict[int, tuple[int, int]]:
        """`first_tokens` and `last_tokens` of every token-aware block."""
        own = {block: (first, last) for block, first, last in self.block_windows}
        return {block: own.get(block, (self.first_tokens, self.last_tokens)) for block in self.token_aware_blocks}

    def with_windows(self, windows: Mapping[int, tuple[int, int]]) -> "KVPlan":
        """This plan with other token-aware blocks, and the window of each."""
        return replace(
            self,
            token_aware_blocks=tuple(sorted(windows)),
            block_windows=tuple((block, *windows[block]) for block in sorted(windows)),
        )

    @property
    def observed_tokens(self) -> int:
        """Prompt tokens at the end whose queries choose, and that are kept; 0 where nothing is chosen by attention."""
        return min(_MOST_OBSERVED_TOKENS, self.last_tokens) if self.token_choice == "attention" else 0

    def to_text(self) -> str:
        """The tokens that a token-aware block hands over, in words."""
        windows = sorted(set(self.windows.values()) or {(self.first_tokens, self.last_tokens)}, key=sum)
        least, most = sum(windows[0]), sum(windows[-1])
        if self.token_choice == "first_last":
            if len(windows) == 1:
                return f"the first {windows[0][0]} and the last {windows[0][1]} prompt tokens"
            return f"between {least} and {most} of the first and last prompt tokens"
        chosen = f"the {least - self.observed_tokens}"
        if least < most:
            chosen = f"{least - self.observed_tokens} to {most - self.observed_tokens}"
        return f"the last {self.observed_tokens} prompt tokens and, per head, {chosen} that these attend to most"

    def blocks_to_text(self, missing_blocks: Sequence[int] = ()) -> list[str]:
        """The token-aware blocks but `missing_blocks`, where windows differ with the tokens that each hands over."""
        windows = {block: sum(window) for block, window in self.windows.items() if block not in missing_blocks}
        return [f"{block} ({kept})" if self.block_windows else str(block) for block, kept in windows.items()]

    def to_dict(self) -> dict[str, Any]:
        data = {
            "token_aware_blocks": list(self.token_aware_blocks),
            "first_tokens": self.first_tokens,
            "last_tokens": self.last_tokens,
            "token_choice": self.token_choice,
        }
        # Only where there are some, as with projected blocks.
        return data | ({"block_windows": [list(own) for own in self.block_windows]} if self.block_windows else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KVPlan":
        if isinstance(data, dict):  # plans from before there was a choice
            data = {"token_choice": "first_last", "block_windows": [], **data}
        check_keys(data, ("token_aware_blocks", "first_tokens", "last_tokens", "token_choice", "block_windows"), "kv")
        for key in ("token_aware_blocks", "block_windows"):
            if not isinstance(data[key], list):
                raise ValueError(f"kv.{key} must be a list, got {data[key]!r}")
        for own in data["block_windows"]:
            if not isinstance(own, list) or len(own) != 3:
                raise ValueError(f"kv.block_windows: {own!r} is not [block, first_tokens, last_tokens]")
        lists = {
            "token_aware_blocks": tuple(data["token_aware_blocks"]),
            "block_windows": tuple(map(tuple, data["block_windows"])),
        }
        return cls(**{**data, **lists})

    def checked(self, total: int) -> "KVPlan":
        _check_window("kv.", self.first_tokens, self.last_tokens)
        if self.token_choice not in TOKEN_CHOICES:
            raise ValueError(f"kv.token_choice must be one of {', '.join(TOKEN_CHOICES)}, got {self.token_choice!r}")
        blocks = check_block_numbers(self.token_aware_blocks, total, "kv.token_aware_blocks")
        check_block_numbers([own[0] for own in self.block_windows], total, "kv.block_windows")
        for block, first, last in self.block_windows:
            if block not in blocks:
                raise ValueError(f"kv.block_windows: block {block} is not token-aware")
            _check_window(f"kv.block_windows: block {block}, ", first, last)
            if first + last < self.observed_tokens:
                raise ValueError(
                    f"kv.block_windows: block {block} keeps {first + last} tokens, fewer than the "
                    f"{self.observed_tokens} at the end of the prompt that choose"
                )
        default = self.first_tokens, self.last_tokens
        own = tuple(sorted(own for own in self.block_windows if own[1:] != default))
        return replace(self, token_aware_blocks=blocks, block_windows=own)


def _check_window(where: str, first_tokens: Any, last_tokens: Any) -> None:
    for name, value in (("first_tokens", first_tokens), ("last_tokens", last_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{where}{name} must be a whole number of tokens, got {value!r}")
    if last_tokens < 1:
        raise ValueError(f"{where}last_tokens must be at least 1: decode has to see the end of the prompt")
