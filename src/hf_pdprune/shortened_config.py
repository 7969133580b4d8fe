"""What of a model's config follows its blocks: the config of the model that keeps only some of them."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


# The number of decoder blocks, where `num_hidden_layers` means the encoder's.
_NUM_BLOCKS_ENTRIES = ("decoder_layers", "num_decoder_layers")
# One value per block, although the names do not say so.
_PER_BLOCK_ENTRIES = ("activation_sparsity_pattern", "indexer_types", "intermediate_size")
# Lists of block numbers (by the end of their names).
_BLOCK_NUMBERS_ENTRIES = (
    "layer_ids",
    "layer_indices",
    "attn_idxs",
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
)
# The same, counted from 1.
_BLOCK_NUMBERS_FROM_ONE = ("ple_layer_ids",)
# Kinds of blocks whose state is no KV cache, or that have none.
_KINDS_WITHOUT_KV = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp", "linear"})
# How many blocks at the beginning, or at the end, are built differently.
_LEADING_BLOCKS_ENTRIES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_TRAILING_BLOCKS_ENTRIES = ("num_kv_shared_layers",)


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the decoder blocks: itself, or what it nests. Never a copy."""
    if config.is_encoder_decoder and any(name in vars(config) for name in _NUM_BLOCKS_ENTRIES):
        return config  # `get_text_config` would give a copy with other names
    return config.get_text_config(decoder=True)


def num_blocks(config: PreTrainedConfig) -> int:
    """Number of decoder blocks that a model of this config has."""
    text_config = text_config_of(config)
    return getattr(text_config, _num_blocks_entry(text_config))


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model of this config can read; `None` where it does not say so."""
    return getattr(text_config_of(config), "max_position_embeddings", None)


def _num_blocks_entry(text_config: PreTrainedConfig) -> str:
    return next((name for name in _NUM_BLOCKS_ENTRIES if name in vars(text_config)), "num_hidden_layers")


def shortened_config(config: PreTrainedConfig, kept_blocks: Sequence[int]) -> PreTrainedConfig:
    """
    The config of the model that has only `kept_blocks`: their number, every list with an entry per block
    (`layer_types`, `no_rope_layers`, ...), every list of block numbers (`mlp_only_layers`, ...), and every rule that
    counts blocks from the beginning or the end (`first_k_dense_replace`, `max_window_layers`, ...).

    Args:
        config (`PreTrainedConfig`): Config of the model with all blocks; not changed.
        kept_blocks (`Sequence[int]`): Block numbers, rising.

    Raises:
        `ValueError`: If the config would be read back differently from what is written, since the architecture
            prescribes something that the kept blocks break (gemma4: the last block attends to everything).
    """
    config = copy.deepcopy(config)
    text_config = text_config_of(config)
    total = num_blocks(config)
    overrides = text_config.to_dict().get("per_layer_config")  # {block number: {entry: value}}
    if overrides is not None:
        text_config.per_layer_config = None
    _list_dense_blocks(text_config, total)
    for name, value in list(vars(text_config).items()):
        shortened = _shortened_entry(name, value, kept_blocks, total)
        if shortened != value:
            setattr(text_config, name, shortened)
    if getattr(text_config, "attention_types", None) is not None:  # gpt_neo: attention_layers as [[kinds], times]
        text_config.attention_types = [[[kind], 1] for kind in text_config.attention_layers]
    setattr(text_config, _num_blocks_entry(text_config), len(kept_blocks))
    if overrides is not None:
        overrides = {int(number): values for number, values in overrides.items()}
        text_config.per_layer_config = {
            index: overrides[number] for index, number in enumerate(kept_blocks) if number in overrides
        }
    _check_read_back(config)
    return config


def check_attention_is_left(config: PreTrainedConfig, kept_blocks: Sequence[int]) -> None:
    """Raises a `ValueError` if of a hybrid model only blocks without KV entries would be left."""
    text_config = text_config_of(config)
    kinds = getattr(text_config, "layer_types", None) or getattr(text_config, "layers_block_type", None) or ()
    attending = [number for number, kind in enumerate(kinds) if kind not in _KINDS_WITHOUT_KV]
    if attending and set(attending).isdisjoint(kept_blocks):
        raise ValueError(
            f"block {attending[-1]} cannot be removed: it is the last one left with a KV cache, without which "
            "transformers does not generate"
        )


def _check_read_back(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` unless reading the config gives what was written."""
    try:
        read = text_config_of(type(config).from_dict(config.to_dict())).to_dict()
    except Exception as error:  # of any kind: validators raise their own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(config).__name__} cannot express the model with these blocks only: {reason}"
        ) from error
    for name, value in text_config_of(config).to_dict().items():
        if "layer" in name and value != read.get(name):
            raise ValueError(
                f"{type(config).__name__} cannot express the model with these blocks only: it makes {name} "
                f"{read.get(name)!r} of {value!r}"
            )


def _list_dense_blocks(text_config: PreTrainedConfig, total: int) -> None:
    """Says by their numbers which blocks have no experts, where the config says that every n-th one has them."""
    step = getattr(text_config, "decoder_sparse_step", 1)
    dense = getattr(text_config, "mlp_only_layers", None)
    if step > 1 and dense is not None:
        text_config.mlp_only_layers = [number for number in range(total) if number in dense or (number + 1) % step]
        text_config.decoder_sparse_step = 1


def _shortened_entry(name: str, value: Any, kept_blocks: Sequence[int], total: int) -> Any:
    """What an entry becomes; most stay as they are."""
    if name.startswith(("mtp_", "encoder_")):  # of other blocks than those of the decoder
        return value
    if isinstance(value, (list, tuple)):
        if name in _BLOCK_NUMBERS_FROM_ONE:
            return [index for index, number in enumerate(kept_blocks, start=1) if number + 1 in value]
        if name.endswith(_BLOCK_NUMBERS_ENTRIES):
            return [index for index, number in enumerate(kept_blocks) if number in value]
        if name == "block_types":  # repeated over the blocks
            return [value[number % len(value)] for number in kept_blocks]
        if len(value) == total and (name in _PER_BLOCK_ENTRIES or "layer" in name):
            return [value[number] for number in kept_blocks]
    elif isinstance(value, int) and not isinstance(value, bool):
        if name in _LEADING_BLOCKS_ENTRIES:
            return sum(number < value for number in kept_blocks)
        if name in _TRAILING_BLOCKS_ENTRIES:
            return sum(number >= total - value for number in kept_blocks)
        if name == "moe_layer_end_index" and value >= 0:  # the last one that has experts
            return sum(number <= value for number in kept_blocks) - 1
    return value
