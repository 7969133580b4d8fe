"""PromptAttention: where the prompt's queries look, per block and KV head, recorded during an eager prefill."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..blocks import get_blocks


class PromptAttention:
    """
    The attention that each prompt token gets in each block: of all queries, which H2O chooses by, and of the last ones
    (SnapKV). For baselines; the plan's own choice needs no eager prefill, see [`observed_attention`].

    Args:
        recent_queries (`int`, defaults to 32): Queries at the prompt's end of which `recent` is the mean.
    """

    def __init__(self, recent_queries: int = 32):
        self.recent_queries = recent_queries
        self.recent: dict[int, torch.Tensor] = {}  # by block as the model counts: (batch_size, kv_heads, tokens)
        self.accumulated: dict[int, torch.Tensor] = {}

    @contextmanager
    def recording(self, model: nn.Module, num_key_value_heads: int) -> Iterator[None]:
        """
        Within this context forwards of `model` over whole prompts are recorded. It attends eagerly, the only way that
        shows its weights.

        Raises:
            `ValueError`: At the end, if the model's attention modules did not show them.
        """
        previous = model.config._attn_implementation
        blocks = get_blocks(model)
        model.set_attn_implementation("eager")
        try:
            with ExitStack() as hooks:
                for index, block in enumerate(blocks):
                    for module in list(block.modules())[1:]:
                        handle = module.register_forward_hook(self._hook(index, num_key_value_heads))
                        hooks.callback(handle.remove)
                yield
        finally:
            model.set_attn_implementation(previous)
        if not self.accumulated:
            raise ValueError(f"{type(model).__name__} does not show its attention weights")

    def _hook(self, index: int, num_key_value_heads: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            # Every attention module of transformers returns (output, weights).
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                self.update(index, weights, num_key_value_heads)

        return hook

    def update(self, index: int, weights: torch.Tensor, num_key_value_heads: int) -> None:
        """
        Records one block.

        Args:
            index (`int`): Its number.
            weights (`torch.Tensor`): Shape `(batch_size, num_attention_heads, tokens, tokens)`.
            num_key_value_heads (`int`): Heads that share a KV head count together.
        """
        grouped = weights.detach().float().unflatten(1, (num_key_value_heads, -1)).mean(dim=2)
        self.recent[index] = grouped[:, :, -self.recent_queries :].mean(dim=2)
        self.accumulated[index] = grouped.sum(dim=2)
