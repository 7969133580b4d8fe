"""ForwardHooks: what a cache does to a model's forward, so that token-aware blocks see what they hold."""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from ..blocks import get_blocks, get_decoder
from .attention_replay import AttentionReplay
from .call_arguments import CallArguments
from .longest_with_cache import check_keeps_cache, longest_with_cache
from .observed_attention import observed_attention, visible_keys


if TYPE_CHECKING:
    from .token_aware_cache import TokenAwareCache
    from .token_aware_layer import TokenAwareLayer


class ForwardHooks:
    """
    The forward hooks of one cache on a model: on the decoder, and on each token-aware block. They act in forwards with
    this cache only, whatever other threads run with other caches. They fit the one attention mask that transformers
    makes to what each block holds; where tokens are chosen by attention, they observe the queries at the prompt's end
    and have the layer drop the others.

    torch registers and removes a hook in two steps, between which another thread's forward calls it without the
    keyword arguments: hooks that take them do nothing then.

    Args:
        cache ([`TokenAwareCache`]): The cache; the hooks go when it goes.
        model ([`~transformers.PreTrainedModel`]): The model that runs with it.
    """

    def __init__(self, cache: "TokenAwareCache", model: nn.Module):
        self.cache = weakref.ref(cache)
        self.model = model
        self._thread: int | None = None  # the one that runs a forward with this cache
        self._last_thread = threading.get_ident()  # the last one that did, or made it
        self.first_query, self.queries = 0, 0  # its first token's position, and how many tokens it reads
        self.padding_mask: torch.Tensor | None = None  # (rows, seen tokens + new ones), 0 for padding
        # Its mask, and what became of it in layers that keep the same.
        self.mask: tuple[torch.Tensor | None, dict[int, torch.Tensor | None]] | None = None
        decoder, blocks = get_decoder(model), get_blocks(model)
        token_aware = {index: cache.layers[index] for index in cache.token_aware_indices}
        # Made before any hook is registered, since this may raise.
        replays = {
            index: AttentionReplay(blocks[index]) for index in token_aware if token_aware[index].observed_tokens
        }
        handles = [
            decoder.register_forward_pre_hook(self._begin_forward(decoder), with_kwargs=True),
            decoder.register_forward_hook(self._end_forward, always_call=True),
        ]
        for index, layer in token_aware.items():
            block = blocks[index]
            handles.append(block.register_forward_pre_hook(self._fit_mask(block, layer), with_kwargs=True))
            if index in replays:
                observe = self._observe(replays[index], layer)
                handles.append(replays[index].module.register_forward_hook(observe, with_kwargs=True))
                handles.append(block.register_forward_hook(self._shorten(layer)))
        self.remove = weakref.finalize(cache, _remove_all, handles)

    @property
    def is_active(self) -> bool:
        """Whether this thread runs a forward with this cache."""
        return self._thread == threading.get_ident()

    def _begin_forward(self, decoder: nn.Module) -> Callable:
        arguments = CallArguments(decoder)
        longest = longest_with_cache(self.model)

        def hook(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
            if kwargs is None:
                return None
            cache, given = self.cache(), arguments.get("past_key_values", args, kwargs)
            if cache is None or given is not cache:
                # What looks like the forward of a `generate` that has forgotten the open cache.
                tokens, is_own = arguments.get("input_ids", args, kwargs), self._last_thread == threading.get_ident()
                if longest and is_own and given is None and arguments.get("use_cache", args, kwargs):
                    check_keeps_cache(longest, 0 if tokens is None else tokens.shape[1])
                return None
            if arguments.get("use_cache", args, kwargs) is False:
                raise ValueError("use_cache=False and a cache to go on from exclude each other")
            name = "input_ids" if arguments.get("input_ids", args, kwargs) is not None else "inputs_embeds"
            rows, tokens = arguments.get(name, args, kwargs).shape[:2]
            new_tokens = cache.unseen_tokens(tokens)
            if new_tokens < tokens:
                for cut in (name, "position_ids"):
                    value = arguments.get(cut, args, kwargs)
                    if value is not None:
                        args, kwargs = arguments.replaced(cut, value[:, -new_tokens:], args, kwargs)
            self.first_query, self.queries = cache.get_seq_length(), new_tokens
            self.padding_mask = arguments.get("attention_mask", args, kwargs)
            cache.begin_forward(rows, new_tokens, self.padding_mask)
            self._thread = self._last_thread = threading.get_ident()
            return args, kwargs

        return hook

    def _end_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.is_active:
            self._thread, self.mask, self.padding_mask = None, None, None

    def _fit_mask(self, block: nn.Module, layer: "TokenAwareLayer") -> Callable:
        arguments = CallArguments(block)

        def hook(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
            if kwargs is None or not self.is_active or layer.window is None:
                return None
            mask = arguments.get("attention_mask", args, kwargs)
            if mask is None and layer.is_shortened:  # nothing is padded and one query sees all that is held
                return None
            if self.mask is None or self.mask[0] is not mask:
                self.mask = (mask, {})
            fitted = self.mask[1]
            if id(layer.window) not in fitted:  # one mask serves all blocks with a window: fitted once per forward
                fitted[id(layer.window)] = self._fitted(mask, layer)
            return arguments.replaced("attention_mask", fitted[id(layer.window)], args, kwargs)

        return hook

    def _fitted(self, mask: torch.Tensor | None, layer: "TokenAwareLayer") -> torch.Tensor | None:
        if layer.is_shortened:
            return layer.window.select_mask(mask)
        if self.first_query + self.queries <= layer.window.prompt_tokens or layer.observed_tokens:
            return mask
        # This forward goes on after the prompt's end: what the block will drop is still there and has to be hidden.
        if is_flash_attention_requested(self.model.config):
            raise ValueError("with flash attention, a forward has to end where the prompt ends")
        return layer.window.hide_dropped(mask, self.first_query, self.queries)

    def _observe(self, replay: AttentionReplay, layer: "TokenAwareLayer") -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple | None = None) -> tuple | None:
            if output is None or not self.is_active:
                return None
            cache = self.cache()
            prompt_tokens, padding_mask = cache.prompt_tokens, self.padding_mask
            # So short a prompt loses at most padding, and that the window says.
            if layer.is_shortened or prompt_tokens <= layer.first_tokens + layer.last_tokens:
                return None
            attention = observed_attention(
                replay,
                args,
                kwargs,
                layer.keys,
                layer.values,
                padding_mask,
                self.first_query,
                prompt_tokens,
                layer.observed_tokens,
            )
            layer.observe(attention)
            if not cache.prompt_is_complete:
                return None
            layer.choose(None if padding_mask is None else padding_mask[:, :prompt_tokens])
            since = self.first_query + self.queries - prompt_tokens
            if since == 0:
                return None
            # This forward goes on after the prompt's end, and these queries have seen what is dropped only now.
            keys, values = layer.select(layer.keys), layer.select(layer.values)
            real = None if padding_mask is None else layer.window.select_mask(padding_mask).bool()
            visible = visible_keys(real, keys.shape[-2], since, keys.device)
            tokens = slice(self.queries - since, self.queries)
            seen_again, _ = replay(args, kwargs, tokens, prompt_tokens, keys, values, visible)
            return (torch.cat([output[0][:, : tokens.start], seen_again], dim=1), *output[1:])

        return hook

    def _shorten(self, layer: "TokenAwareLayer") -> Callable:
        # Not in the attention module's hook: a block that is computed again in the backward pass does not drop again.
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self.is_active and layer.window is not None and not layer.is_shortened:
                layer.shorten()

        return hook


def _remove_all(handles: list) -> None:
    for handle in handles:
        handle.remove()
