"""PartialForward: calls a model from the middle, and keeps hidden states for the next such call."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..blocks import bypass_blocks, get_blocks


class PartialForward:
    """
    Calls the real model, of which only the blocks from `start` on run: the blocks before it are bypassed, and the
    hidden states that once arrived at block `start` take the place of what the embeddings gave. Masks, positions,
    final norm and LM head are the model's own, so it works for whatever architecture blocks can be bypassed in.

    It is passed as the `module` of a [`Stage`], or called while the stage's missing blocks are bypassed.

    Args:
        model (`nn.Module`): The dense model.
        start (`int`, defaults to 0): First block that runs; 0 is a plain forward.
        hidden_states (`torch.Tensor`, *optional*): Input of block `start`, shape `(batch_size, tokens, hidden_size)`.
        record (`Collection[int]`, *optional*): Blocks whose input is kept, in `recorded`; those up to `start` are not.
        record_dtype (`torch.dtype`, *optional*): In which it is kept. Default: as it is.

    Attributes:
        recorded (`dict[int, torch.Tensor]`): By block number, shape `(batch_size, tokens, hidden_size)`.
    """

    def __init__(
        self,
        model: nn.Module,
        start: int = 0,
        hidden_states: torch.Tensor | None = None,
        record: Collection[int] = (),
        record_dtype: torch.dtype | None = None,
    ):
        if start > 0 and hidden_states is None:
            raise ValueError(f"a forward from block {start} on needs the hidden states that arrive there")
        self.model = model
        self.start = start
        self.hidden_states = hidden_states
        self.record = record
        self.record_dtype = record_dtype
        self.recorded: dict[int, torch.Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = get_blocks(self.model)
        handles = []
        with bypass_blocks(self.model, range(self.start)):
            try:
                if self.start > 0:  # the last of the bypassed ones hands on what once came out of it
                    handles.append(blocks[self.start - 1].register_forward_hook(self._inject))
                for number in self.record:
                    if number > self.start:
                        handles.append(blocks[number - 1].register_forward_hook(self._recorder(number)))
                return self.model(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()

    def _inject(self, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return (self.hidden_states, *output[1:]) if isinstance(output, tuple) else self.hidden_states

    def _recorder(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self.recorded[number] = states.to(self.record_dtype or states.dtype)

        return hook
