"""Roofline: what limits each stage (FLOPs of prefill, bytes that a decode step reads), and how much of it is gone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..inference import DecodeStage, PrefillStage
from .parameter_share import block_parameters, head_parameters


def roofline(
    dense_model: nn.Module,
    prefill: PrefillStage,
    decode: DecodeStage,
    prompt_tokens: int,
    batch_size: int,
    kv_bytes: Mapping[str, int],
) -> dict[str, Any]:
    """
    Prefill is bound by FLOPs: 2 per block parameter and token, 2 x 2 per head dimension and pair of tokens that causal
    attention looks at, and the LM head on the last token. A decode step is bound by the bytes that it reads: the
    weights of blocks and LM head, and the KV entries. Time saved beside these shares says how near to the limit a
    stage is; more than all of it can be saved where something else is the limit (few rows, short prompts, a slow CPU).

    Args:
        dense_model (`nn.Module`): The dense model.
        prefill ([`PrefillStage`]): The prefill stage.
        decode ([`DecodeStage`]): The decode stage.
        prompt_tokens (`int`): Length of the prompts.
        batch_size (`int`): Their number.
        kv_bytes (`Mapping[str, int]`): Bytes of KV entries that decode holds of them, `dense` and `pruned`.

    Returns:
        `dict[str, Any]`: `prefill_flops` and `decode_bytes`, each of `dense` and `pruned`, and the shares removed,
        `prefill_flops_removed` and `decode_bytes_removed`.
    """
    config = dense_model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = prompt_tokens * (prompt_tokens + 1) // 2
    attention = 2 * 2 * heads * head_dim * pairs
    head = head_parameters(dense_model)
    blocks = {
        "dense": block_parameters(dense_model),
        "pruned": block_parameters(prefill.model, prefill.bypassed, prefill.projected),
    }
    attending = {"dense": len(blocks["dense"]), "pruned": len(blocks["pruned"]) - len(prefill.projected)}
    flops = {
        name: batch_size * (2 * sum(counts) * prompt_tokens + attending[name] * attention + 2 * head)
        for name, counts in blocks.items()
    }
    blocks["pruned"] = block_parameters(decode.model, decode.bypassed)
    size = dense_model.get_input_embeddings().weight.element_size()
    read = {name: (sum(counts) + head) * size + kv_bytes[name] for name, counts in blocks.items()}
    return {
        "prefill_flops": flops,
        "prefill_flops_removed": 1 - flops["pruned"] / flops["dense"],
        "decode_bytes": read,
        "decode_bytes_removed": 1 - read["pruned"] / read["dense"],
    }
