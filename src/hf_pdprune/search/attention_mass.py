"""AttentionMass: how much of its attention each block spends outside the token window, the paper's criterion."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from ..adapters import active_adapter
from ..blocks import get_attention, get_blocks, num_blocks
from ..evaluating import evaluating
from ..inference.stage import position_ids
from ..kv import PromptWindow
from ..spread_weights import gathering, in_step
from .calibration import Calibration


class AttentionMass:
    """
    Mean share of the attention of completion tokens that falls on prompt tokens outside the window, per block of the
    dense model. PDTrim (arXiv 2509.04467) makes those blocks token-aware whose attention rests on the beginning and
    the end of the prompt. It is here as a baseline: it does not see what the dropped tokens change.

    Args:
        num_hidden_layers (`int`): Blocks of the model.
        first_tokens (`int`): Prompt tokens at the beginning that the window keeps.
        last_tokens (`int`): Prompt tokens at the end that it keeps.
    """

    def __init__(self, num_hidden_layers: int, first_tokens: int, last_tokens: int):
        self.first_tokens = first_tokens
        self.last_tokens = last_tokens
        self.outside = torch.zeros(num_hidden_layers, dtype=torch.float64)
        self.num_queries = 0
        self._seen = torch.zeros(num_hidden_layers, dtype=torch.float64)  # forwards in which a block showed weights

    @classmethod
    def measure(
        cls, model: nn.Module, calibration: Calibration, first_tokens: int, last_tokens: int
    ) -> "AttentionMass":
        """
        One pass of the dense model with eager attention, the only one that shows its weights.

        Args:
            model (`nn.Module`): The dense model.
            calibration ([`Calibration`]): Prompts longer than the window.
            first_tokens (`int`): As for the class.
            last_tokens (`int`): As for the class.

        Raises:
            `ValueError`: If the model's attention modules do not return their weights.
        """
        mass = cls(num_blocks(model.config), first_tokens, last_tokens)
        with gathering(model), evaluating(model), active_adapter(model, None), _eager_attention(model):
            for tensors in in_step(model, calibration.batches):
                if tensors is None:
                    model(input_ids=torch.ones((1, 1), dtype=torch.long, device=calibration.device), use_cache=False)
                    continue
                mask = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1)
                ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1)
                queries = tensors["completion_mask"].bool()
                with ExitStack() as hooks:
                    for number, block in enumerate(get_blocks(model)):
                        # What stands around it, the block itself or another module, may hand the weights on.
                        attention = get_attention(block)
                        handle = attention.register_forward_hook(mass._hook(number, tensors["prompt_mask"], queries))
                        hooks.callback(handle.remove)
                    model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
                mass.num_queries += int(queries.sum())
        mass._reduce(calibration.device)
        if not mass._seen.all():  # in any process: some may have no batch
            raise ValueError(
                f"{type(model).__name__} does not show all attention weights, so blocks cannot be chosen by "
                "attention mass"
            )
        return mass

    def _reduce(self, device: torch.device) -> None:
        """Adds up what all processes have seen."""
        if PartialState().num_processes > 1:
            queries = torch.tensor([self.num_queries], dtype=torch.float64)
            counted = reduce(torch.cat([self.outside, self._seen, queries]).to(device), "sum").cpu()
            self.outside, self._seen, queries = counted.split([len(self.outside), len(self._seen), 1])
            self.num_queries = int(queries)

    def _hook(self, number: int, prompt_mask: torch.Tensor, queries: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            # Every attention module of transformers returns (output, weights).
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                self._seen[number] += 1
                self.update(number, weights, prompt_mask, queries)

        return hook

    def update(self, block: int, weights: torch.Tensor, prompt_mask: torch.Tensor, queries: torch.Tensor) -> None:
        """
        Adds one block's attention over a batch.

        Args:
            block (`int`): Its number.
            weights (`torch.Tensor`): Shape `(batch_size, num_heads, tokens, tokens)`.
            prompt_mask (`torch.Tensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
            queries (`torch.Tensor`): Which completion tokens count, shape `(batch_size, completion_tokens)`.
        """
        width = prompt_mask.shape[1]
        window = PromptWindow.of_prompt(width, prompt_mask, self.first_tokens, self.last_tokens)
        if window is None:
            return
        columns = torch.atleast_2d(window.columns.to(prompt_mask.device)).expand(len(prompt_mask), -1)
        dropped = prompt_mask.bool().scatter(-1, columns, False).to(weights.device)
        on_prompt = weights[:, :, width:, :width].float().mean(dim=1)  # (batch_size, completion_tokens, prompt_tokens)
        outside = (on_prompt * dropped[:, None, :]).sum(dim=-1)
        self.outside[block] += outside[queries.to(outside.device)].double().sum().cpu()

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of attention outside the window per block, from 0 to 1."""
        return tuple((self.outside / max(self.num_queries, 1)).tolist())


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes attention weights; its own implementation is restored."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
