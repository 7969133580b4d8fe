"""CompactSlidingLayer: the cache of a sliding-window block, without the prompt behind it."""

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer


class CompactSlidingLayer(DynamicSlidingWindowLayer):
    """
    What `DynamicSlidingWindowLayer` is, but what it holds after a prompt is a tensor of its own. There it is a view of
    the whole prompt's keys and values, which stay in memory with it: until the next token, and in what is handed over
    as long as that lives.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # Behind a single token there is one token more at most, which is not worth a copy.
        if key_states.shape[-2] > 1 and self.keys.shape[-2] < keys.shape[-2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return keys, values
