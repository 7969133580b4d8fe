"""LMHead: a model's last step, from hidden states to logits, by itself."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..blocks import blocks_path


class LMHead:
    """
    Makes logits of hidden states, as the model does: its own forward runs, in which only the decoder is left out. So
    whatever comes after the decoder (bias, scaling, soft cap) is right for every architecture, and so are the hooks
    that gather a partitioned weight.

    Args:
        model (`nn.Module`): A causal language model, wrapped by peft or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.parent, _, self.name = blocks_path(self.model).rpartition(".")[0].rpartition(".")

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): What the decoder returns, shape `(num_tokens, hidden_size)`.

        Returns:
            `torch.Tensor`: Shape `(num_tokens, vocab_size)`.
        """
        parent = self.model.get_submodule(self.parent)
        decoder = getattr(parent, self.name)
        ids = torch.zeros((1, len(hidden_states)), dtype=torch.long, device=hidden_states.device)
        setattr(parent, self.name, _Given(decoder, hidden_states[None]))
        try:
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(parent, self.name, decoder)


class _Given(nn.Module):
    """Stands in for a decoder and returns hidden states that are there already."""

    def __init__(self, decoder: nn.Module, hidden_states: torch.Tensor):
        super().__init__()
        self.__dict__["_decoder"] = decoder  # not a submodule: nothing of it runs
        self.hidden_states = hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> "_HiddenStatesAlone":
        return _HiddenStatesAlone(last_hidden_state=self.hidden_states)


class _HiddenStatesAlone(BaseModelOutputWithPast):
    """Output of a decoder in which nothing but the hidden states is there, whatever else a model looks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None
