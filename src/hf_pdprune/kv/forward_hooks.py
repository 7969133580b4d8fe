"""ForwardHooks: fits the one attention mask that transformers makes to what each token-aware block holds."""

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from ..blocks import get_blocks, get_decoder


if TYPE_CHECKING:
    from .token_aware_cache import TokenAwareCache
    from .token_aware_layer import TokenAwareLayer


class ForwardHooks:
    """
    The forward hooks of one cache on a model: on the decoder, and on each token-aware block. They act in forwards with
    this cache only.

    Args:
        cache ([`TokenAwareCache`]): The cache; the hooks go when it goes.
        model ([`~transformers.PreTrainedModel`]): The model that runs with it.
    """

    def __init__(self, cache: "TokenAwareCache", model: nn.Module):
        self.cache = weakref.ref(cache)
        self.model = model
        self.is_active = False  # whether a forward with this cache is running
        self.first_query, self.queries = 0, 0  # its first token's position, and how many tokens it reads
        self.mask: tuple[torch.Tensor | None, torch.Tensor] | None = None  # its mask, and what became of it
        decoder, blocks = get_decoder(model), get_blocks(model)
        handles = [
            decoder.register_forward_pre_hook(self._begin_forward(decoder), with_kwargs=True),
            decoder.register_forward_hook(self._end_forward, always_call=True),
        ]
        for index in cache.token_aware_indices:
            hook = self._fit_mask(blocks[index], cache.layers[index])
            handles.append(blocks[index].register_forward_pre_hook(hook, with_kwargs=True))
        self.remove = weakref.finalize(cache, _remove_all, handles)

    def _begin_forward(self, decoder: nn.Module) -> Callable:
        arguments = _Arguments(decoder)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            cache = self.cache()
            if cache is None or arguments.get("past_key_values", args, kwargs) is not cache:
                return None
            name = "input_ids" if arguments.get("input_ids", args, kwargs) is not None else "inputs_embeds"
            rows, tokens = arguments.get(name, args, kwargs).shape[:2]
            new_tokens = cache.unseen_tokens(tokens)
            if new_tokens < tokens:
                for cut in (name, "position_ids"):
                    value = arguments.get(cut, args, kwargs)
                    if value is not None:
                        args, kwargs = arguments.replaced(cut, value[:, -new_tokens:], args, kwargs)
            self.first_query, self.queries = cache.get_seq_length(), new_tokens
            cache.begin_forward(rows, new_tokens, arguments.get("attention_mask", args, kwargs))
            self.is_active = True
            return args, kwargs

        return hook

    def _end_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.is_active, self.mask = False, None

    def _fit_mask(self, block: nn.Module, layer: "TokenAwareLayer") -> Callable:
        arguments = _Arguments(block)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.is_active or layer.window is None:
                return None
            mask = arguments.get("attention_mask", args, kwargs)
            if mask is None and layer.is_shortened:  # nothing is padded and one query sees all that is held
                return None
            if self.mask is None or self.mask[0] is not mask:  # one mask serves all blocks: fitted once per forward
                self.mask = (mask, self._fitted(mask, layer))
            return arguments.replaced("attention_mask", self.mask[1], args, kwargs)

        return hook

    def _fitted(self, mask: torch.Tensor | None, layer: "TokenAwareLayer") -> torch.Tensor | None:
        if layer.is_shortened:
            return layer.window.select_mask(mask)
        if self.first_query + self.queries <= layer.window.prompt_tokens:
            return mask
        # This forward goes on after the prompt's end: what the block will drop is still there and has to be hidden.
        if is_flash_attention_requested(self.model.config):
            raise ValueError("with flash attention, a forward has to end where the prompt ends")
        return layer.window.hide_dropped(mask, self.first_query, self.queries)


def _remove_all(handles: list) -> None:
    for handle in handles:
        handle.remove()


class _Arguments:
    """Reads and replaces an argument of a module's forward by name, however it was passed."""

    def __init__(self, module: nn.Module):
        self.index = {name: index for index, name in enumerate(inspect.signature(module.forward).parameters)}

    def get(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self.index.get(name, len(args))
        return args[index] if index < len(args) else None

    def replaced(self, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if name in kwargs or self.index[name] >= len(args):
            return args, {**kwargs, name: value}
        index = self.index[name]
        return (*args[:index], value, *args[index + 1 :]), kwargs
