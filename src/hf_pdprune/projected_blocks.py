"""Projected blocks: prefill computes their keys and values for decode, and nothing else of them."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, DynamicCache

from .adapters import active_adapter, adapter_layers, is_quantized
from .blocks import (
    BypassedBlock,
    block_behind,
    bypass_blocks,
    check_block_numbers,
    get_attention,
    get_blocks,
    num_block_outputs,
)
from .evaluating import evaluating
from .own_attribute import own_attribute
from .spread_weights import input_device, is_partitioned, is_readable


# What projects queries alone, within an attention module. Where one layer makes queries, keys and values, it runs.
_QUERY_LAYERS = ("q_proj",)
_PROBE_TOKENS = 3


class _Written(Exception):
    """The block has written into the cache."""


class ProjectedBlock(BypassedBlock):
    """
    Stands in for a block whose keys and values somebody needs, but whose output nobody does: the hidden states that
    arrive are hidden states that leave, and on their way the block's own norm and projections, rotation included,
    write keys and values into the cache. So it works for whatever way an architecture makes them.

    The block runs up to the moment in which it has written, but for the query projection where it is a layer of its
    own. Blocks whose weights are partitioned (ZeRO-3, FSDP) run to their end, since what gathers their weights waits
    for that: right, but nothing is saved. FSDP gathers them for the backward pass when a gradient arrives at the
    block's output, so there the output takes part in the graph, with a gradient of zero.

    Args:
        block (`nn.Module`): The block.
        num_outputs (`int` or `None`): As for [`BypassedBlock`].
    """

    def __init__(self, block: nn.Module, num_outputs: int | None):
        super().__init__(block, num_outputs)
        inner = self.block = block_behind(block)  # a submodule, unlike a bypassed one: it runs, adapters and all
        self.is_wrapped = any(isinstance(module, FSDPModule) for module in inner.modules())
        self.stops_early = not (self.is_wrapped or is_partitioned(inner))
        children = get_attention(inner).named_children()
        # A list, so that the layer is no submodule of the stand-in.
        self.query_layers = [layer for name, layer in children if name in _QUERY_LAYERS]

        @functools.wraps(inner.forward)  # who looks for an argument's place finds the block's
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
            for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
                output = self._write(cache, hidden_states, *args, **kwargs)
                if self.is_wrapped:
                    hidden_states = _PassedBy.apply(hidden_states, output)
            return BypassedBlock.forward(self, hidden_states, *args, **kwargs)

        self.forward = forward

    def _write(self, cache: Cache, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Runs the block until it has written into the cache, or to its end; then returns what comes out of it."""
        inner, output = self.block, None
        with ExitStack() as contexts:
            written = contexts.enter_context(_watching(cache, self.stops_early))
            if not self.stops_early:
                output = inner(*args, **kwargs)
                output = output if isinstance(output, torch.Tensor) else output[0]
            else:
                for layer in self.query_layers:
                    contexts.enter_context(_giving_zeros(layer))
                try:
                    # Not called as a module: activation checkpointing would run it with another cache.
                    inner.forward(*args, **kwargs)
                except _Written:
                    pass
        if not written:
            raise ValueError(f"{type(inner).__name__} does not write into the KV cache: it cannot be projected")
        return output


class _PassedBy(torch.autograd.Function):
    """Hidden states that pass by a block: its output counts for nothing, but a gradient, zero, arrives at it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.zeros_like(gradient)


@contextmanager
def project_blocks(model: nn.Module, blocks: Iterable[int]) -> Iterator[None]:
    """
    Within this context the given blocks write their keys and values into the cache, if there is one, and hand their
    input on unchanged. Everything is restored afterwards. Contexts nest, with [`bypass_blocks`] too.

    Args:
        model (`nn.Module`): A causal language model.
        blocks (`Iterable[int]`): Numbers of the blocks, as they are counted in this model.

    Raises:
        `ValueError`: If a number is out of range or named twice, or if a block has no attention with a KV cache.
    """
    if not (blocks := tuple(blocks)):
        yield
        return
    block_list = get_blocks(model)
    numbers = check_block_numbers(blocks, len(block_list), "project_blocks")
    num_outputs = num_block_outputs(model)
    originals = {number: block_list[number] for number in numbers}
    stand_ins = {number: ProjectedBlock(block, num_outputs) for number, block in originals.items()}
    try:
        for number, block in stand_ins.items():
            block_list[number] = block
        yield
    finally:
        for number, block in originals.items():
            block_list[number] = block


def idle_layers(model: nn.Module, block: int) -> list[str]:
    """
    What of a projected block does not run: the layers behind its cache, and the one that projects queries alone.

    Args:
        model (`nn.Module`): A causal language model, wrapped by peft or not.
        block (`int`): The block's number.

    Returns:
        `list[str]`: Names, within the block, of the modules that have weights of their own. What peft adds to a
        module belongs to it.

    Raises:
        `ValueError`: If the block's weights are partitioned (ZeRO-3, FSDP), and were so when this was first asked for.
    """
    inner = block_behind(get_blocks(model)[block])
    # What runs cannot change during the life of a model, so one look is enough: at its whole weights.
    if "_pdprune_idle_layers" not in inner.__dict__:
        inner.__dict__["_pdprune_idle_layers"] = _find_idle_layers(model, block, inner)
    return list(inner.__dict__["_pdprune_idle_layers"])


def _find_idle_layers(model: nn.Module, block: int, inner: nn.Module) -> list[str]:
    if is_partitioned(inner):
        raise ValueError("projected blocks need a model that is loaded whole, and partitioned only then")
    adapted = tuple(f"{name}." for name in adapter_layers(inner))
    layers = {
        name: module
        for name, module in inner.named_modules()
        if (f"{name}." in adapted or next(module.parameters(recurse=False), None) is not None)
        and not name.startswith(adapted)  # what is within an adapted module belongs to it
    }
    ran: set[str] = set()
    cache = DynamicCache(config=model.config)
    with ExitStack() as contexts:
        contexts.enter_context(project_blocks(model, (block,)))
        stand_in = get_blocks(model)[block]
        written = contexts.enter_context(_watching(cache, stop=False))

        def note(layer: nn.Module, *_: Any) -> None:
            if not written:
                ran.add(names[layer])

        names = {layer: name for name, layer in layers.items()}
        for layer in layers.values():
            contexts.callback(layer.register_forward_pre_hook(note).remove)
        _probe(model, block, cache)
        skipped = {names[layer] for layer in stand_in.query_layers}
    return [name for name in layers if name not in ran or name in skipped]


def check_projectable(model: nn.Module, blocks: Sequence[int]) -> None:
    """
    Raises a `ValueError` where a block would not write the keys and values that it does write and hand its input on as
    it is, when it is projected, or when what is idle then has weights of zero, as in a checkpoint.
    """
    for block in blocks:
        inner = block_behind(get_blocks(model)[block])
        if is_partitioned(inner):
            continue
        keys, values, *_ = _probe(model, block, DynamicCache(config=model.config))
        with project_blocks(model, (block,)):
            results = [_probe(model, block, DynamicCache(config=model.config))]
        if is_readable(inner):  # else its weights are not where zeros could be put
            with _without_weights([inner.get_submodule(name) for name in idle_layers(model, block)]):
                results.append(_probe(model, block, DynamicCache(config=model.config)))
        for found_keys, found_values, states, handed_on in results:
            same = torch.equal(found_keys, keys) and torch.equal(found_values, values)
            if not same or not torch.equal(states, handed_on):
                raise ValueError(
                    f"block {block} of {type(model).__name__} cannot be projected: without its attention and MLP it "
                    "does not hand hidden states on as they are, or writes other keys and values"
                )


def _probe(model: nn.Module, block: int, cache: Cache) -> tuple[torch.Tensor, ...]:
    """Keys and values that one block writes when it runs alone on a few tokens, and its input and output."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks = get_blocks(model)
    num_block_outputs(model)  # it runs the model for that, the first time
    handle = blocks[block].register_forward_hook(note, with_kwargs=True)
    try:
        others = (number for number in range(len(blocks)) if number != block)
        with evaluating(model), active_adapter(model, None), bypass_blocks(model, others):
            ids = torch.arange(_PROBE_TOKENS, device=input_device(model))[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    finally:
        handle.remove()
    return cache.layers[block].keys, cache.layers[block].values, *seen


@contextmanager
def _watching(cache: Cache, stop: bool) -> Iterator[list[bool]]:
    """Within this context the yielded list is filled as soon as something is written, and with `stop` that raises."""
    written: list[bool] = []
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        written.append(True)
        if stop:
            raise _Written
        return result

    with own_attribute(cache, "update", watched):
        yield written


def _giving_zeros(layer: nn.Module) -> AbstractContextManager[None]:
    """Within this context a linear layer gives zeros, for nothing."""

    def forward(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return states.new_zeros(1).expand(*states.shape[:-1], layer.out_features)

    return own_attribute(layer, "forward", forward)


@contextmanager
def _without_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context the weights of the modules are zero."""
    quantized = [module for module in modules if any(map(is_quantized, module.modules()))]
    others = [module for module in modules if module not in quantized]
    weights = {parameter: parameter.data for module in others for parameter in module.parameters()}
    with ExitStack() as stack:
        for module in quantized:  # what is stored as zero is no zero there
            stack.enter_context(_giving_zeros(module))
        try:
            for parameter in weights:
                parameter.data = torch.zeros_like(parameter.data)
            yield
        finally:
            for parameter, data in weights.items():
                parameter.data = data
