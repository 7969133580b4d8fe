"""DecoderForward: calls a model without its LM head, as a stage's module."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from ..blocks import get_blocks, get_decoder


class DecoderForward:
    """
    Calls a model without its LM head. It is passed as the `module` of a [`Stage`] or of [`dense_forward`]: what these
    return as logits are then the hidden states that the LM head would get, so that logits can be made in chunks.

    Args:
        model (`nn.Module`): A causal language model, wrapped by peft or not.
        record (`Collection[int]`, *optional*): Blocks whose output is kept, in `recorded`.
        scales (`Mapping[int, float]`, *optional*): By block number, what it adds to the hidden states is multiplied
            with. 1 changes nothing, 0 is a block that is bypassed.

    Attributes:
        recorded (`dict[int, torch.Tensor]`): By block number, shape `(batch_size, tokens, hidden_size)`.
    """

    def __init__(self, model: nn.Module, record: Collection[int] = (), scales: Mapping[int, float] | None = None):
        self.model = model
        self.record = record
        self.scales = scales or {}
        self.recorded: dict[int, torch.Tensor] = {}

    def __call__(self, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutput:
        """
        Args:
            logits_to_keep (`int`, defaults to 0): The last so many tokens are returned; 0: all.
            kwargs: As for the model (`input_ids`, `attention_mask`, `past_key_values`, ...).

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits` are hidden states, of shape
            `(batch_size, tokens, hidden_size)`.
        """
        with self._hooks():
            hidden_states = get_decoder(self.model)(**kwargs)[0]
        return CausalLMOutput(logits=hidden_states[:, -logits_to_keep:])

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        blocks = get_blocks(self.model)
        handles = [
            blocks[number].register_forward_hook(_scaled_by(scale), with_kwargs=True)
            for number, scale in self.scales.items()
        ]
        handles += [blocks[number].register_forward_hook(self._recorder(number)) for number in self.record]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            self.recorded[number] = output[0] if isinstance(output, tuple) else output

        return hook


def _scaled_by(scale: float) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        given = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (torch.lerp(given, output[0], scale), *output[1:])
        return torch.lerp(given, output, scale)

    return hook
