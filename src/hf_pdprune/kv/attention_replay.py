"""AttentionReplay: a block's attention once more, for a few tokens of a forward, with its weights shown."""

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ..blocks import CACHE_ARGUMENTS, get_attention
from .call_arguments import CallArguments


# The dimension of the tokens in what an attention module is given of each token.
_TOKEN_DIMENSIONS = {"hidden_states": 1, "position_embeddings": -2, "position_ids": -1, "cache_position": -1}
# Arguments that concern no token by itself, or are `None` in a decoder without a bias per position.
_OTHER_ARGUMENTS = {"use_cache", "output_attentions", "alibi"}
_UNUSED_ARGUMENTS = {"encoder_hidden_states", "encoder_attention_mask", "key_value_states"}
_OTHER_CHOICE = "choose them by token_choice first_last"


class AttentionReplay:
    """
    Runs a block's attention module once more for a few of the tokens that it has just read, on keys and values that
    are given, and returns its attention weights.

    What does it is a shallow copy of the module, the same weights and submodules under a config that says eager
    attention: scaling, soft-capping, normed and rotated queries, sinks, adapters are whatever the architecture does,
    while the model itself is not touched and goes on with its own attention implementation. The weights are those that
    an eager model computes, for these tokens only: memory is tokens x keys.

    Args:
        block (`nn.Module`): The block.

    Raises:
        `ValueError`: If it has other than one attention module, or one with arguments that are not known, so that
            they cannot be cut to a few tokens.
    """

    def __init__(self, block: nn.Module):
        try:
            self.module = get_attention(block)
        except ValueError as error:
            raise ValueError(f"tokens cannot be chosen by attention: {error}; {_OTHER_CHOICE}") from error
        self.arguments = CallArguments(self.module)
        named = inspect.signature(self.module.forward).parameters.values()
        names = {p.name for p in named if p.kind is not inspect.Parameter.VAR_KEYWORD}
        known = {*_TOKEN_DIMENSIONS, *_OTHER_ARGUMENTS, *_UNUSED_ARGUMENTS, *CACHE_ARGUMENTS, "attention_mask"}
        if not {"hidden_states", "attention_mask"} <= names <= known:
            what = ", ".join(sorted(names - known)) or "no hidden states or no mask"
            raise ValueError(
                f"tokens cannot be chosen by attention: {type(self.module).__name__} takes arguments that are not "
                f"known ({what}); {_OTHER_CHOICE}"
            )

    def __call__(
        self,
        args: tuple,
        kwargs: dict,
        tokens: slice,
        seen_tokens: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        visible: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            args (`tuple`): What the module's forward was called with.
            kwargs (`dict`): Likewise.
            tokens (`slice`): Which of its tokens are run.
            seen_tokens (`int`): Tokens before the first of these.
            keys (`torch.Tensor`): Shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`, the last ones
                those of `tokens`.
            values (`torch.Tensor`): Shape as `keys`.
            visible (`torch.Tensor`): Which key each token sees, boolean, of shape
                `(batch_size, 1, tokens, held_tokens)`.

        Returns:
            The module's output, shape `(batch_size, tokens, hidden_size)`, and its weights, shape
            `(batch_size, num_attention_heads, tokens, held_tokens)`.

        Raises:
            `ValueError`: If the module shows no weights, or is given what cannot be cut.
        """
        given = self.arguments.by_name(args, kwargs)
        cache = _GivenStates(keys, values, seen_tokens)
        replayed = {name: self._cut(name, value, tokens) for name, value in given.items()}
        replayed |= {name: cache for name in CACHE_ARGUMENTS & given.keys()}
        dtype = replayed["hidden_states"].dtype
        hidden = torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
        replayed["attention_mask"] = hidden.expand(len(keys), -1, -1, -1)
        eager = copy.copy(self.module)
        eager.training = False
        if "config" in vars(eager):  # without one, a module attends in one way only
            eager.config = _EagerConfig(self.module.config)
        # The class's own forward: one that was put onto the module (accelerate does) would run the module itself.
        output = type(self.module).forward(eager, **replayed)
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, torch.Tensor) or weights.dim() != 4:
            raise ValueError(
                f"tokens cannot be chosen by attention: {type(self.module).__name__} shows no attention weights; "
                f"load the model with sdpa or eager attention, or {_OTHER_CHOICE}"
            )
        return output[0], weights

    def _cut(self, name: str, value: Any, tokens: slice) -> Any:
        if name in _TOKEN_DIMENSIONS:
            if isinstance(value, tuple):
                return tuple(self._cut(name, part, tokens) for part in value)
            if value is None:
                return None
            part = value.narrow(_TOKEN_DIMENSIONS[name], tokens.start, tokens.stop - tokens.start)
            return part.contiguous()  # gpt2 views it
        if isinstance(value, torch.Tensor) and name != "attention_mask":
            raise ValueError(f"tokens cannot be chosen by attention: {name} cannot be cut to a few tokens")
        return value


class _GivenStates:
    """What a replayed attention finds in the place of a cache: keys and values that are there already."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen_tokens: int):
        self.states = keys, values
        self.seen_tokens = seen_tokens

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens


class _EagerConfig:
    """A config that says eager attention, and is the given one otherwise."""

    _attn_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
