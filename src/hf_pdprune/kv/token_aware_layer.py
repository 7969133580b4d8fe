"""TokenAwareLayer: the cache of one token-aware block, which keeps the prompt tokens that the plan says."""

from typing import Any

import torch

from .prompt_window import PromptWindow
from .reserved_layer import ReservedLayer
from .token_choice import observed, select_per_head


class TokenAwareLayer(ReservedLayer):
    """
    The cache of one token-aware block. While the prompt is read it returns all of the prompt's keys and values, but
    stores, as soon as the prompt is complete, only those that are kept. Its `get_seq_length` is the logical length:
    all tokens seen, dropped ones included, so that positions stay the original ones.

    The window's columns are what it keeps, or, where tokens are chosen by attention, as many of each KV head. In both
    cases the window says how much of what is held is padding: prompts are padded on the left then, and the padding
    that fills up a short prompt comes first in every head.

    Tensors have the shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.

    Args:
        first_tokens (`int`): Real prompt tokens that the window keeps at the beginning.
        last_tokens (`int`): Those that it keeps at the end.
        observed_tokens (`int`, defaults to 0): Prompt tokens at the end whose queries choose; 0: the window does.
    """

    def __init__(self, first_tokens: int, last_tokens: int, observed_tokens: int = 0):
        super().__init__()
        self.first_tokens, self.last_tokens = first_tokens, last_tokens
        self.observed_tokens = observed_tokens
        self.seen_tokens = 0
        # Set by the cache before the forward that completes the prompt; None as long as every token is kept.
        self.window: PromptWindow | None = None
        self.is_shortened = False
        # What the observed queries attend to, those read so far, (batch_size, num_key_value_heads, prompt_tokens);
        # and when all are, what follows from it, (batch_size, num_key_value_heads, kept_tokens).
        self.attention: torch.Tensor | None = None
        self.columns: torch.LongTensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        if self.window is not None and not self.is_shortened and not self.observed_tokens:
            self.shorten()
        return keys, values

    def observe(self, attention: torch.Tensor | None) -> None:
        """Adds what more of the observed queries attend to; see [`observed_attention`]."""
        if attention is not None:
            self.attention = attention if self.attention is None else self.attention + attention

    def choose(self, padding_mask: torch.Tensor | None) -> None:
        """Fixes the tokens that each head keeps. `padding_mask` has the shape `(batch_size, prompt_tokens)`."""
        self.columns = observed(self.attention, self.window.kept_tokens, self.observed_tokens, padding_mask)
        self.attention = None

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values without the dropped prompt tokens, shape `(batch_size, num_heads, tokens, head_dim)`."""
        if self.columns is None:
            return self.window.select(states)
        prompt, since = states.tensor_split([self.window.prompt_tokens], dim=-2)
        kept = select_per_head(prompt, self.columns)
        return torch.cat([kept, since], dim=-2) if since.shape[-2] else kept

    def shorten(self) -> None:
        """Drops the prompt tokens that are not kept."""
        self.keys, self.values = self.select(self.keys), self.select(self.values)
        self._reserve = self._filled = self.columns = None
        self.is_shortened = True

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_shortened and self.seen_tokens + min(tokens_to_remove, 0) < self.window.prompt_tokens:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} of {self.seen_tokens} tokens: that reaches into the prompt "
                f"({self.window.prompt_tokens} tokens), of which only some are held"
            )
        if self.attention is not None and tokens_to_remove < 0:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} of {self.seen_tokens} tokens: those at the end of the prompt have "
                "been observed already, and only some of them are read"
            )
        super().crop(tokens_to_remove)
        self.seen_tokens = max(self.seen_tokens + tokens_to_remove, 0)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.window, self.is_shortened = 0, None, False
        self.attention = self.columns = None
