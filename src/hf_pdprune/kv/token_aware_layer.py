"""TokenAwareLayer: the cache of one token-aware block, which keeps the prompt's first and last tokens."""

from typing import Any

import torch

from .prompt_window import PromptWindow
from .reserved_layer import ReservedLayer


class TokenAwareLayer(ReservedLayer):
    """
    The cache of one token-aware block. While the prompt is read it returns all of the prompt's keys and values, but
    stores, as soon as the prompt is complete, only those of the window. Its `get_seq_length` is the logical length:
    all tokens seen, dropped ones included, so that positions stay the original ones.

    Tensors have the shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.
    """

    def __init__(self):
        super().__init__()
        self.seen_tokens = 0
        # Set by the cache before the forward that completes the prompt; None as long as every token is kept.
        self.window: PromptWindow | None = None
        self.is_shortened = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        if self.window is not None and not self.is_shortened:
            self.shorten()
        return keys, values

    def shorten(self) -> None:
        """Drops the prompt tokens outside the window."""
        self.keys, self.values = self.window.select(self.keys), self.window.select(self.values)
        self._reserve = self._filled = None
        self.is_shortened = True

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_shortened and self.seen_tokens + min(tokens_to_remove, 0) < self.window.prompt_tokens:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} of {self.seen_tokens} tokens: that reaches into the prompt "
                f"({self.window.prompt_tokens} tokens), of which only the first and the last are held"
            )
        super().crop(tokens_to_remove)
        self.seen_tokens = max(self.seen_tokens + tokens_to_remove, 0)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.window, self.is_shortened = 0, None, False
