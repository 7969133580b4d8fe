"""The disaggregated forward: the one meaning that search, training, evaluation and serving share."""

from collections.abc import Mapping

import torch
from torch import nn

from ..adapters import active_adapter
from .decode_stage import DecodeStage
from .prefill_stage import PrefillStage
from .stage import position_ids


def disaggregated_forward(
    prefill: PrefillStage, decode: DecodeStage, batch: Mapping[str, torch.Tensor]
) -> torch.FloatTensor:
    """
    prompt -> prefill stage, cache everything -> select KV entries by the plan -> completion -> decode stage -> logits.

    Args:
        prefill ([`PrefillStage`]): The stage that reads the prompts and predicts the first completion token.
        decode ([`DecodeStage`]): The stage that predicts the others.
        batch (`Mapping[str, torch.Tensor]`): `prompt_ids` and `prompt_mask` of shape `(batch_size, prompt_tokens)`,
            padded left; `completion_ids` and `completion_mask` of shape `(batch_size, completion_tokens)`, padded
            right.

    Returns:
        `torch.FloatTensor`: Logits that predict each completion token, shape
        `(batch_size, completion_tokens, vocab_size)`.
    """
    payload = prefill.forward(batch["prompt_ids"], batch["prompt_mask"])
    first_logits = payload.first_logits.unsqueeze(1)
    if batch["completion_ids"].shape[1] == 1:
        return first_logits
    rest = decode.forward(payload, batch["completion_ids"][:, :-1], batch["completion_mask"][:, :-1])
    return torch.cat([first_logits.to(rest.device), rest], dim=1)


def dense_forward(
    model: nn.Module, batch: Mapping[str, torch.Tensor], module: nn.Module | None = None
) -> torch.FloatTensor:
    """
    What the dense model, without adapters, predicts for the same batch: the teacher.

    Args:
        model (`nn.Module`): The dense model.
        batch (`Mapping[str, torch.Tensor]`): As for [`disaggregated_forward`].
        module (`nn.Module`, *optional*): What is called, where that is a wrapper around `model`.

    Returns:
        `torch.FloatTensor`: Logits of shape `(batch_size, completion_tokens, vocab_size)`.
    """
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"][:, :-1]], dim=1)
    with active_adapter(model, None):
        output = (module or model)(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"][:, :-1]], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=batch["completion_ids"].shape[1],
        )
    return output.logits
