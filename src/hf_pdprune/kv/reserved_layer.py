"""ReservedLayer: a cache layer that appends tokens in place, in memory it holds in reserve."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


# Tokens that are allocated ahead: an eighth of what is held, within these bounds. With 32k tokens held, a decode step
# copies 128 of them on average instead of all.
_LEAST_RESERVE, _MOST_RESERVE = 32, 256


class ReservedLayer(DynamicLayer):
    """
    What `DynamicLayer` is, but appending a token does not copy the tokens that are already there: `keys` and `values`
    are the filled part of a longer tensor, which is allocated at the first append after the prompt and then whenever
    it is full. Where gradients flow, tensors are concatenated as ever.

    Tensors have the shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.
    """

    def __init__(self):
        super().__init__()
        self._reserve: tuple[torch.Tensor, torch.Tensor] | None = None
        # The `keys` that are the filled part of the reserve; any other (reordered rows, say) are not in it.
        self._filled: torch.Tensor | None = None

    @property
    def reserved_tokens(self) -> int:
        """Tokens per row for which there is memory, those that are held included."""
        if not self.is_initialized:
            return 0
        return self._reserve[0].shape[-2] if self._appends_in_place else self.keys.shape[-2]

    @property
    def _appends_in_place(self) -> bool:
        return self._reserve is not None and self.keys is self._filled

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Each line runs once per block and token, where a small model waits for the host: no loops, few views.
        if not self.is_initialized or _needs_gradient(key_states, value_states, self.keys) or self.keys.dim() < 4:
            self._reserve = self._filled = None
            return super().update(key_states, value_states)
        held, new = self.keys.shape[-2], key_states.shape[-2]
        total = held + new
        if not self._appends_in_place or total > self._reserve[0].shape[-2]:
            reserve = min(max(held // 8, _LEAST_RESERVE), _MOST_RESERVE)
            # After a long piece, a chunk of a prompt, another of its kind would not fit anyway.
            tokens = total + (reserve if new < reserve else 0)
            self._reserve = _grown(self.keys, tokens), _grown(self.values, tokens)
        keys, values = self._reserve
        _tokens_of(keys, held, new).copy_(key_states)
        _tokens_of(values, held, new).copy_(value_states)
        self.keys = self._filled = _tokens_of(keys, 0, total)
        self.values = _tokens_of(values, 0, total)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        in_place = self._appends_in_place
        super().crop(tokens_to_remove)
        if in_place:
            self._filled = self.keys

    def reset(self) -> None:
        super().reset()
        self._reserve = self._filled = None


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _tokens_of(reserve: torch.Tensor, begin: int, tokens: int) -> torch.Tensor:
    """`reserve.narrow(-2, begin, tokens)` in half of its time, for a tensor that begins where its memory does."""
    batch_size, num_heads, _, head_dim = reserve.shape
    strides = reserve.stride()
    return reserve.as_strided((batch_size, num_heads, tokens, head_dim), strides, begin * strides[-2])


def _grown(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """A tensor with room for `tokens` tokens that begins with `states`."""
    batch_size, num_heads, held, head_dim = states.shape
    with torch.inference_mode(False):  # a later turn may append to it outside of somebody's inference mode
        grown = states.new_empty((batch_size, num_heads, tokens, head_dim))
    grown[:, :, :held] = states
    return grown
