"""Parameter shares: which part of the parameters that a stage's time depends on was removed."""

from collections.abc import Collection

from torch import nn

from ..adapters import adapter_layers, name_without_adapters
from ..blocks import get_blocks
from ..inference import DecodeStage, PrefillStage
from ..projected_blocks import idle_layers


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
    blocks, head = sum(block_parameters(dense_model)), head_parameters(dense_model)
    prefill_blocks = sum(block_parameters(prefill.model, prefill.bypassed, prefill.projected))
    decode_blocks = sum(block_parameters(decode.model, decode.bypassed))
    return {
        "prefill_share_removed": 1 - prefill_blocks / blocks,
        "decode_share_removed": 1 - (decode_blocks + head_parameters(decode.model)) / (blocks + head),
    }


def block_parameters(model: nn.Module, bypassed: Collection[int] = (), projected: Collection[int] = ()) -> list[int]:
    """Parameters that each block runs with, without those of adapters, which an export merges."""
    counts = {index: _parameters(block) for index, block in enumerate(get_blocks(model)) if index not in bypassed}
    for index in projected:
        block = get_blocks(model)[index]
        counts[index] -= sum(_parameters(block, f"{layer}.") for layer in idle_layers(model, index))
    return list(counts.values())


def head_parameters(model: nn.Module) -> int:
    """Parameters of the LM head, tied to the embeddings or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else _parameters(head)


def _parameters(module: nn.Module, prefix: str = "") -> int:
    layers = adapter_layers(module)
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if name.startswith(prefix) and name_without_adapters(name, layers) is not None
    )
