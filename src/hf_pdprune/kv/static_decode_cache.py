"""StaticDecodeCache: after the prompt, tensors whose shapes stay the same (torch.compile, CUDA graphs)."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.utils.generic import is_flash_attention_requested

from ..blocks import check_attends_by_mask, get_blocks
from .call_arguments import CallArguments
from .longest_with_cache import check_keeps_cache, longest_with_cache
from .token_aware_cache import TokenAwareCache
from .token_aware_layer import TokenAwareLayer


# The logical length is a multiple of this, so that prompts of about one length share buffers and a compiled step.
_LENGTH_STEP = 128


class StaticDecodeLayer(StaticLayer):
    """
    What one block holds of the prompt, and room for what is generated, in tensors of shape
    `(batch_size, num_key_value_heads, slots, head_dim)` that stay where they are.

    Args:
        max_length (`int`): Logical length for which there are masks.
        slots (`int`): Tokens for which there is room.
    """

    def __init__(self, max_length: int, slots: int):
        super().__init__(max_cache_len=max_length)
        self.slots = slots
        self.filled = torch.tensor(0, dtype=int)  # slots; `cumulative_length` counts dropped tokens too

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        max_length, self.max_cache_len = self.max_cache_len, self.slots
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = max_length
        self.filled = self.filled.to(self.device)
        torch._dynamo.mark_static_address(self.filled)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, seen_tokens: int) -> None:
        """
        Begins with what is held of a prompt.

        Args:
            keys (`torch.Tensor`): Shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.
            values (`torch.Tensor`): Likewise.
            seen_tokens (`int`): Logical length, dropped tokens included.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        held = keys.shape[-2]
        self.keys[:, :, :held], self.values[:, :, :held] = keys, values
        self.cumulative_length.fill_(seen_tokens)
        self.filled.fill_(held)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_tokens = key_states.shape[-2]
        # To look on an accelerator would be to wait for it; there index_copy_ itself stops with an error.
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            seen = int(self.cumulative_length) + new_tokens
            if seen >= self.max_cache_len or int(self.filled) + new_tokens > self.slots:
                raise ValueError("the cache is full: make it with a larger max_new_tokens")
        places = torch.arange(new_tokens, device=self.device) + self.filled
        self.filled.add_(new_tokens)
        self.cumulative_length.add_(new_tokens)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a StaticDecodeCache does not go back (assisted and prompt-lookup decoding do): use a TokenAwareCache"
        )

    def reset(self) -> None:
        raise ValueError("a StaticDecodeCache does not read prompts: `fill` it from another TokenAwareCache")


class StaticDecodeCache(Cache):
    """
    What a [`TokenAwareCache`] holds after the prompt, with room for a given number of tokens. No shape changes while
    they are generated, so a decode step is compiled once; `generate` does that by itself on accelerators, and
    `torch.compile(model.forward)` anywhere. The result is that of the cache that it is made from.

    ```python
    with TokenAwareCache(plan, model) as cache:
        model(**prompt, past_key_values=cache)
        static = StaticDecodeCache(cache, model, max_new_tokens=64)
    model.generate(**prompt_and_first_token, past_key_values=static, max_new_tokens=63)
    ```

    Make it once and [`~StaticDecodeCache.fill`] it for the next prompts: compiled code and CUDA graphs know its
    tensors and its hooks. [`DecodeStage`] does so where it is told to (`static_shapes=True`).

    Args:
        cache ([`TokenAwareCache`]): After the prompt. It is closed: this cache goes on in its place.
        model ([`~transformers.PreTrainedModel`]): The model that generates.
        max_new_tokens (`int`): Tokens after what `cache` has seen for which there is room.

    Raises:
        `ValueError`: If the prompt has not been read to its end, if blocks attend to a sliding window or by distance
        (ALiBi, local attention), with flash attention, or where `generate` forgets its cache within that length.
    """

    def __init__(self, cache: TokenAwareCache, model: nn.Module, max_new_tokens: int):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if is_flash_attention_requested(model.config):
            raise ValueError("static shapes need attention with a mask (sdpa or eager), not flash attention")
        if any(cache.is_sliding[index] for index in cache.running_layers):
            raise ValueError(
                f"{model.config.model_type} has blocks with a sliding window, which static shapes are not made for: "
                "use the TokenAwareCache itself"
            )
        check_attends_by_mask(model)
        _check_complete(cache)
        self.running_layers = cache.running_layers
        self.windows = _windows(cache)
        token_aware = {index: cache.layers[index] for index in self.windows}
        seen = cache.get_seq_length()
        check_keeps_cache(longest_with_cache(model), seen + max_new_tokens)
        slots = {
            index: layer.first_tokens + layer.last_tokens + (seen - cache.prompt_tokens) + max_new_tokens
            for index, layer in token_aware.items()
        }
        # One more than is needed: to the last place of all point the slots that no mask has a column for.
        longest = max([seen + max_new_tokens, *slots.values()]) + 1
        max_length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        with torch.inference_mode(False):  # it may be used outside of it later
            layers = [StaticDecodeLayer(max_length, slots.get(index, max_length)) for index in range(len(cache))]
        super().__init__(layers=layers)
        # By window, the logical place of what lies in each slot, (batch_size, slots).
        self._columns: dict[tuple[int, int], torch.LongTensor] = {}
        self.fill(cache)
        blocks = get_blocks(model)
        handles = [
            blocks[index].register_forward_pre_hook(
                self._select_columns(blocks[index], index, layer), with_kwargs=True
            )
            for index, layer in token_aware.items()
        ]
        self.close = weakref.finalize(self, _remove_all, handles)

    def has_room_for(self, cache: TokenAwareCache, max_new_tokens: int) -> bool:
        """
        Whether this cache can be filled from another one and then take so many tokens, without being much too large.
        """
        if (cache.running_layers, _windows(cache)) != (self.running_layers, self.windows):
            return False
        pairs = [(self.layers[index], cache.layers[index]) for index in self.running_layers]
        own, other = (layer.keys for layer in pairs[0])
        if (len(own), own.dtype, own.device) != (len(other), other.dtype, other.device):
            return False
        length = cache.get_seq_length() + max_new_tokens
        fits = all(layer.keys.shape[-2] + max_new_tokens <= static.slots for static, layer in pairs)
        # Attention goes over all of the buffer: one that a long prompt has left slows short ones down.
        return fits and length < self.get_max_length() <= 2 * length + _LENGTH_STEP

    def fill(self, cache: TokenAwareCache) -> None:
        """
        Begins anew with what a cache holds after its prompt, in the same memory.

        Args:
            cache ([`TokenAwareCache`]): Of the same model and plan, with as many rows and for which there is room
                (see [`~StaticDecodeCache.has_room_for`]). It is closed.
        """
        _check_complete(cache)
        seen = cache.get_seq_length()
        # What stays for other prompts must belong neither to a graph nor to somebody's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for index in self.running_layers:
                layer = cache.layers[index]
                self.layers[index].fill(layer.keys, layer.values, seen)
                if index in self.windows:
                    self._set_columns(self.layers[index], layer, cache.batch_rows)
        cache.close()

    def _set_columns(self, layer: StaticDecodeLayer, source: TokenAwareLayer, rows: int) -> None:
        places = torch.arange(layer.slots, device=layer.device)
        if source.window is not None:  # behind what is kept of the prompt, all that came and comes after it
            columns = source.window.columns.to(layer.device)
            since = source.window.prompt_tokens + places[: layer.slots - columns.shape[-1]]
            places = torch.cat([columns, since.expand(*columns.shape[:-1], -1)], dim=-1)
        window = source.first_tokens, source.last_tokens
        columns = self._columns.setdefault(window, places.new_zeros(rows, layer.slots))
        columns.copy_(places.clamp(max=layer.max_cache_len - 1))

    def _select_columns(self, block: nn.Module, index: int, source: TokenAwareLayer) -> Callable:
        arguments = CallArguments(block)
        layer, columns = self.layers[index], self._columns[source.first_tokens, source.last_tokens]

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
            if not caches or len(caches[0].layers) <= index or caches[0].layers[index] is not layer:
                return None
            mask = arguments.get("attention_mask", args, kwargs)
            mask = mask.expand(len(columns), -1, -1, -1)
            mask = mask.gather(-1, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
            return arguments.replaced("attention_mask", mask, args, kwargs)

        return hook

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of memory that keys and values take."""
        tensors = (states for i in self.running_layers for states in (self.layers[i].keys, self.layers[i].values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # A bypassed block has seen nothing

    @property
    def batch_size(self) -> int:
        return self.layers[self.running_layers[0]].batch_size

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self.layers[self.running_layers[0]].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[self.running_layers[0]].get_mask_sizes(query_length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for index in self.running_layers:
            self.layers[index].reorder_cache(beam_idx)
        for columns in self._columns.values():
            columns.copy_(columns[beam_idx.to(columns.device)])

    def __enter__(self) -> "StaticDecodeCache":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _windows(cache: TokenAwareCache) -> dict[int, tuple[int, int]]:
    """First and last tokens that each token-aware layer keeps."""
    layers = ((index, cache.layers[index]) for index in cache.token_aware_indices)
    return {index: (layer.first_tokens, layer.last_tokens) for index, layer in layers}


def _check_complete(cache: TokenAwareCache) -> None:
    if not cache.prompt_is_complete or not cache.batch_rows:
        raise ValueError("the prompt has to be read to its end before shapes can stay the same")


def _remove_all(handles: list) -> None:
    for handle in handles:
        handle.remove()
