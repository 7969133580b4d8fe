"""The only file that knows architectures: finds the decoder blocks of a causal LM, bypasses or removes them."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from .shortened_config import check_attention_is_left, num_blocks, shortened_config, text_config_of
from .spread_weights import input_device


# Parameters with a slice for every block (gemma3n, gemma4), by the end of their names: the dimension of the slices.
_PACKED_PARAMETERS = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}

# What the argument is called by which an attention module gets the KV cache.
CACHE_ARGUMENTS = frozenset({"past_key_values", "layer_past"})

# Attributes that may differ between a block and its renumbered copy: in which a block knows its own number, and
# whether it keeps KV entries for others (that some block does so for each that reuses them is checked by itself).
_FREE_ATTRIBUTES = frozenset(
    {"layer_idx", "layer_id", "layer_number", "block_idx", "training", "store_full_length_kv"}
)


# What blocks are given beside hidden states, change, and return second (xlnet: query stream; zaya: router states).
_CARRIED_ARGUMENTS = frozenset({"output_g", "prev_router_hidden_states"})


def blocks_path(model: nn.Module) -> str:
    """
    Finds where the decoder blocks live: the outermost `nn.ModuleList` that is as long as the config says.

    Args:
        model (`nn.Module`): A causal language model of transformers, also wrapped by peft.

    Returns:
        `str`: Dotted path of the list, as in `model.get_submodule(path)`.

    Raises:
        `ValueError`: If there is no such list, so that no block could be removed.
    """
    expected = num_blocks(model.config)
    # Asked for with every prompt and in every step.
    if (known := model.__dict__.get("_pdprune_blocks_path")) is not None:
        with suppress(AttributeError):
            module = model.get_submodule(known)
            if isinstance(module, nn.ModuleList) and len(module) == expected:
                return known
    level = [("", model)]
    while level:  # level by level: what lies within the blocks need not be looked at
        for path, module in level:
            if isinstance(module, nn.ModuleList) and len(module) == expected:
                model.__dict__["_pdprune_blocks_path"] = path
                return path
        level = [
            (f"{path}.{name}".lstrip("."), child) for path, module in level for name, child in module.named_children()
        ]
    raise ValueError(
        f"{type(model).__name__} has no list of {expected} decoder blocks (nn.ModuleList as long as "
        "config.num_hidden_layers), so its blocks cannot be removed"
    )


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of `model`, in the order in which they run (see [`blocks_path`])."""
    return model.get_submodule(blocks_path(model))


def get_decoder(model: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder blocks (`LlamaModel` in a `LlamaForCausalLM`)."""
    return model.get_submodule(blocks_path(model).rpartition(".")[0])


def get_attention(block: nn.Module) -> nn.Module:
    """
    The module of a block that writes into the KV cache and attends to what is there.

    Raises:
        `ValueError`: If there is none, or more than one.
    """
    takes_cache = {
        name: module
        for name, module in block.named_modules()
        if name and not CACHE_ARGUMENTS.isdisjoint(inspect.signature(module.forward).parameters)
    }
    # Some attention modules are a wrapper around the one that does it.
    innermost = [name for name in takes_cache if not any(other.startswith(name + ".") for other in takes_cache)]
    if len(innermost) != 1:
        raise ValueError(f"{type(block).__name__} has {len(innermost)} modules that take a KV cache, expected one")
    return takes_cache[innermost[0]]


def block_behind(block: nn.Module) -> nn.Module:
    """The block itself, where stand-ins (each with its `stands_for`) have taken its place in the list."""
    while "stands_for" in vars(block):
        block = vars(block)["stands_for"]
    return block


def check_takes_cache(model: nn.Module) -> None:
    """Raises a `ValueError` if the model takes no KV cache, so that there is nothing to hand over."""
    arguments = inspect.signature(get_decoder(model).forward).parameters
    if "past_key_values" not in arguments:
        raise ValueError(f"{type(model).__name__} takes no KV cache (past_key_values): there is nothing to hand over")
    if not {"input_ids", "inputs_embeds"} & set(arguments):
        # roformer: its blocks are in an inner module, which gets masks that have been put together already
        raise ValueError(
            f"{type(get_decoder(model)).__name__} has the blocks of {type(model).__name__} but does not embed tokens: "
            "how many come, and which are padding, cannot be read there"
        )


def check_attends_by_mask(model: nn.Module) -> None:
    """
    Raises a `ValueError` unless the blocks' attention depends on which tokens they see by the attention mask alone, so
    that KV entries from the middle can be left out together with their columns of the mask.
    """
    config = text_config_of(model.config)
    block = block_behind(get_blocks(model)[0])
    arguments = inspect.signature(block.forward).parameters
    if "attention_mask" not in arguments:
        why = "they take no attention mask"
    elif not {"alibi", "position_bias"}.isdisjoint(arguments) and getattr(config, "alibi", True):
        why = "they add a bias per key position (ALiBi) beside the mask"
    elif "local" in (getattr(config, "attention_layers", None) or ()):
        why = "they make the mask of local attention themselves, from the number of keys"
    elif config._attn_implementation == "flex_attention":
        why = "flex_attention compiles its mask; load the model with sdpa, eager or flash attention"
    else:
        return
    raise ValueError(f"the blocks of {type(model).__name__} cannot be token-aware: {why}")


def check_block_numbers(blocks: Iterable[int], total: int, name: str) -> tuple[int, ...]:
    """Returns the sorted numbers, or raises a `ValueError` that begins with `name` if any is twice or out of range."""
    blocks = tuple(blocks)
    wrong = [b for b in blocks if isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < total]
    if wrong:
        raise ValueError(f"{name}: block {wrong[0]!r} is not one of the {total} blocks 0 to {total - 1}")
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"{name}: block {next(b for b in blocks if blocks.count(b) > 1)} is named twice")
    return tuple(sorted(blocks))


class BypassedBlock(nn.Module):
    """
    Stands in for a block and hands its input on unchanged.

    It takes the block's place in the list instead of overriding the block's forward, so that no hook of the block
    runs (ZeRO-3 and FSDP gather no parameters that nobody uses). The block is not a submodule; its plain attributes
    (`attention_type` and the like, which some model loops read) are still readable through it.

    Args:
        block (`nn.Module`): The block.
        num_outputs (`int` or `None`): Length of the tuple that the block returns, `None` if it returns a tensor.
    """

    def __init__(self, block: nn.Module, num_outputs: int | None):
        super().__init__()
        self.__dict__["stands_for"] = block
        self.num_outputs = num_outputs
        arguments = list(inspect.signature(block_behind(block).forward).parameters)[1:2]
        self.carried_argument = next((name for name in arguments if name in _CARRIED_ARGUMENTS), None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        if self.num_outputs is None:
            return hidden_states
        if self.carried_argument is None:
            return (hidden_states,) + (None,) * (self.num_outputs - 1)
        carried = args[0] if args else kwargs.get(self.carried_argument)
        return (hidden_states, carried) + (None,) * (self.num_outputs - 2)


@torch.no_grad()
def num_block_outputs(model: nn.Module) -> int | None:
    """Runs one token through the model to see what a block returns: `None` for a tensor, else the tuple's length."""
    if "_pdprune_num_block_outputs" not in model.__dict__:
        seen: list[Any] = []
        handle = get_blocks(model)[0].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            device = input_device(model)
            token = torch.zeros((1, 1), dtype=torch.long, device=device)
            # Dropout must not draw: it would shift the random numbers of a training that is resumed.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=model.training):
                model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
        finally:
            handle.remove()
        if not isinstance(seen[0], torch.Tensor) and type(seen[0]) not in (tuple, list):
            # reformer: several streams, by name
            raise ValueError(
                f"the blocks of {type(model).__name__} cannot be bypassed: they return {type(seen[0]).__name__}, not "
                "hidden states, alone or first in a tuple"
            )
        # What a block returns cannot change during the life of a model, so one look is enough.
        several = not isinstance(seen[0], torch.Tensor)
        model.__dict__["_pdprune_num_block_outputs"] = len(seen[0]) if several else None
    return model.__dict__["_pdprune_num_block_outputs"]


@contextmanager
def bypass_blocks(model: nn.Module, blocks: Iterable[int]) -> Iterator[None]:
    """
    Within this context the given blocks hand their input on unchanged. Everything is restored afterwards, also after
    an exception. Contexts nest.

    Args:
        model (`nn.Module`): A causal language model.
        blocks (`Iterable[int]`): Numbers of the blocks, as they are counted in this model.

    Raises:
        `ValueError`: If a number is out of range or named twice.
    """
    if not (blocks := tuple(blocks)):
        yield
        return
    block_list = get_blocks(model)
    numbers = check_block_numbers(blocks, len(block_list), "bypass_blocks")
    check_kv_is_computed(model.config, numbers)
    num_outputs = num_block_outputs(model)
    originals = {number: block_list[number] for number in numbers}
    try:
        for number, block in originals.items():
            block_list[number] = BypassedBlock(block, num_outputs)
        yield
    finally:
        for number, block in originals.items():
            block_list[number] = block


def check_kv_is_computed(config: PreTrainedConfig, missing_blocks: Sequence[int]) -> None:
    """Raises a `ValueError` if without `missing_blocks` a block would reuse KV entries that no block computes."""
    text_config = text_config_of(config)
    modes = getattr(text_config, "kv_sharing_modes", None) or ()
    for block, mode in enumerate(modes):
        if mode != "reuse" or block in missing_blocks:
            continue
        kind = text_config.layer_types[block]
        sources = [b for b, m in enumerate(modes) if m == "store" and text_config.layer_types[b] == kind]
        if not set(sources).isdisjoint(missing_blocks):
            raise ValueError(f"block {sources[0]} cannot be removed: block {block} reuses the KV entries it computes")


def remove_blocks(
    model: PreTrainedModel, blocks: Iterable[int], state_dict: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """
    A model without the given blocks: of the same class, built from the shortened config, so that everything that
    depends on a block's number (cache slots, sliding windows, rotary choices) is what `from_pretrained` will build.

    Its parameters are those of `model`: nothing is copied, and changing one in place changes both. (But for what
    gemma3n and gemma4 pack for all blocks into one tensor.) `model` itself
    is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model with all blocks.
        blocks (`Iterable[int]`): Numbers of the blocks to remove.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): Weights to use instead of the model's own, under the
            names that the model has without adapters.

    Returns:
        [`~transformers.PreTrainedModel`]: The shorter model, in eval mode and with the same generation config.

    Raises:
        `ValueError`: If a number is out of range, if no block would be left, or if the shorter model's blocks are
        built differently from the kept ones (an architecture whose index rules are not known here).
    """
    shorter, kept = empty_shorter(model, blocks)
    state = shortened_state_dict(
        model.state_dict(keep_vars=True) if state_dict is None else state_dict,
        blocks_path(model),
        kept,
        num_blocks(model.config),
    )
    shorter.load_state_dict(state, strict=True, assign=True)
    shorter.tie_weights()
    return shorter


def empty_shorter(model: PreTrainedModel, blocks: Iterable[int]) -> tuple[PreTrainedModel, list[int]]:
    """
    The model without `blocks` but without its weights, and the numbers of the blocks that it keeps. Raises what
    [`remove_blocks`] raises.
    """
    total = num_blocks(model.config)
    removed = check_block_numbers(blocks, total, "remove_blocks")
    kept = [number for number in range(total) if number not in removed]
    if not kept:
        raise ValueError(f"remove_blocks: all {total} blocks would be removed")
    check_kv_is_computed(model.config, removed)
    check_attention_is_left(model.config, kept)
    shorter = empty_like(model, shortened_config(model.config, kept))
    # Compared with an empty dense model, since the blocks of this one may be wrapped (adapters, quantisation).
    dense = empty_like(model, copy.deepcopy(model.config))
    check_same_blocks(get_blocks(dense), get_blocks(shorter), kept)
    names, expected = shortened_names(dense.state_dict(), blocks_path(dense), kept), shorter.state_dict()
    strange = sorted(names.keys() ^ expected.keys())
    if strange:
        raise ValueError(
            f"{type(model).__name__} has weights of its blocks outside of {blocks_path(dense)} ({strange[0]}), so its "
            "blocks cannot be removed"
        )
    return shorter.eval(), kept


def empty_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class for `config`, with buffers on the model's device and parameters on the meta device."""
    config._attn_implementation = model.config._attn_implementation
    # ZeRO-3 would partition the empty weights, of which there is nothing.
    with set_zero3_state(), init_empty_weights(include_buffers=False):
        empty = type(model)._from_config(config, dtype=model.dtype)
    for module in empty.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(model.device)
    empty.generation_config = copy.deepcopy(model.generation_config)
    return empty


def shortened_state_dict(
    state: Mapping[str, torch.Tensor], path: str, kept_blocks: Sequence[int], total: int
) -> dict[str, torch.Tensor]:
    """
    The entries of `state` that a model with only `kept_blocks` of `total` has, under that model's names. Nothing is
    copied but what is packed for all blocks.
    """
    return {
        name: shortened_tensor(name, state[dense_name], kept_blocks, total)
        for name, dense_name in shortened_names(state, path, kept_blocks).items()
    }


def shortened_names(names: Iterable[str], path: str, kept_blocks: Sequence[int]) -> dict[str, str]:
    """Names of the weights of a model with only `kept_blocks`, each with the name it has in the dense model."""
    new_number = {str(number): str(index) for index, number in enumerate(kept_blocks)}
    dense_names = {}
    for name in names:
        number, dot, rest = name[len(path) + 1 :].partition(".")
        if not name.startswith(path + "."):
            dense_names[name] = name
        elif number in new_number:
            dense_names[f"{path}.{new_number[number]}{dot}{rest}"] = name
    return dense_names


def shortened_tensor(name: str, tensor: torch.Tensor, kept_blocks: Sequence[int], total: int) -> torch.Tensor:
    """The weight itself, or a copy of the kept blocks' slices where it is packed for all `total` blocks."""
    dim = next((dim for end, dim in _PACKED_PARAMETERS.items() if name.endswith(end)), None)
    if dim is None or len(kept_blocks) == total:
        return tensor
    kept = torch.tensor(kept_blocks, device=tensor.device)
    slices = tensor.detach().unflatten(dim, (total, -1)).index_select(dim, kept).flatten(dim, dim + 1)
    return nn.Parameter(slices, requires_grad=tensor.requires_grad)


def check_same_blocks(dense: Sequence[nn.Module], shorter: Sequence[nn.Module], kept_blocks: Sequence[int]) -> None:
    """
    Raises a `ValueError` unless block i of `shorter` is built like block `kept_blocks[i]` of `dense`: the same modules
    with the same parameter shapes and the same plain settings. It is what keeps a checkpoint from being silently wrong
    where an architecture derives settings from block numbers in a way that is not known here.
    """
    for index, number in enumerate(kept_blocks):
        expected, actual = _description(dense[number]), _description(shorter[index])
        for name in sorted(expected.keys() | actual.keys()):
            before, after = expected.get(name), actual.get(name)
            if before != after:
                raise ValueError(
                    f"block {number} would change when it becomes block {index}: {name or 'it'} is {before!r} there "
                    f"and {after!r} here; this architecture derives it from the block's number, so blocks cannot be "
                    "removed for good"
                )


def _description(block: nn.Module) -> dict[str, Any]:
    """Modules, parameter shapes and plain attributes of a block, by dotted name."""
    description: dict[str, Any] = {}
    for module_name, module in block.named_modules():
        description[module_name] = type(module).__name__
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, tuple)) or value is None
            if plain and not name.startswith("_") and name not in _FREE_ATTRIBUTES:
                description[f"{module_name}.{name}".lstrip(".")] = value
    for name, parameter in block.named_parameters():
        description[f"{name} (shape)"] = tuple(parameter.shape)
    return description
