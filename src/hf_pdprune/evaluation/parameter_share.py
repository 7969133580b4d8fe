"""Parameter shares: which part of the parameters that a stage's time depends on was removed."""

from torch import nn

from ..adapters import adapter_layers
from ..blocks import get_blocks
from ..inference import DecodeStage, PrefillStage, Stage


def parameter_shares(dense_model: nn.Module, prefill: PrefillStage, decode: DecodeStage) -> dict[str, float]:
    """
    Shares of parameters that the stages do without, counted from the models. Prefill's time goes by its blocks'
    parameters; decode reads those of the blocks and of the LM head for every token (tied to the embeddings or not).

    Args:
        dense_model (`nn.Module`): The dense model.
        prefill ([`PrefillStage`]): The prefill stage, a checkpoint or a view.
        decode ([`DecodeStage`]): The decode stage.

    Returns:
        `dict[str, float]`: `prefill_share_removed` (of block parameters) and `decode_share_removed` (of block and
        LM-head parameters).
    """
    blocks = sum(_parameters(block) for block in get_blocks(dense_model))
    head = _head_parameters(dense_model)
    decode_total = blocks + head
    return {
        "prefill_share_removed": 1 - _running_parameters(prefill) / blocks,
        "decode_share_removed": 1 - (_running_parameters(decode) + _head_parameters(decode.model)) / decode_total,
    }


def _running_parameters(stage: Stage) -> int:
    """Parameters of the blocks that the stage runs."""
    return sum(_parameters(block) for i, block in enumerate(get_blocks(stage.model)) if i not in stage.bypassed)


def _parameters(module: nn.Module) -> int:
    """Parameters of a module without those of adapters, which an export merges."""
    layers = adapter_layers(module)
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if ".base_layer." in name or not any(name.startswith(f"{layer}.") for layer in layers)
    )


def _head_parameters(model: nn.Module) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else _parameters(head)
