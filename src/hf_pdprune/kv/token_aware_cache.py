"""TokenAwareCache: after the prompt, token-aware blocks hold the KV of its first and last tokens only."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..blocks import get_blocks, get_decoder
from ..plan import PruningPlan
from .kv_payload import KVPayload, PayloadError
from .prompt_window import PromptWindow


class TokenAwareLayer(DynamicLayer):
    """
    The cache of one token-aware block. While the prompt is read it returns all of the prompt's keys and values, but
    stores, as soon as the prompt is complete, only those of the window. Its `get_seq_length` is the logical length:
    all tokens seen, dropped ones included, so that positions stay the original ones.

    Tensors have the shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.
    """

    def __init__(self):
        super().__init__()
        self.seen_tokens = 0
        # Set by the cache before the forward that completes the prompt; None as long as every token is kept.
        self.window: PromptWindow | None = None
        self.is_shortened = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        if self.window is not None and not self.is_shortened:
            self.keys, self.values = self.window.select(keys), self.window.select(values)
            self.is_shortened = True
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_shortened and self.seen_tokens + min(tokens_to_remove, 0) < self.window.prompt_tokens:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} of {self.seen_tokens} tokens: that reaches into the prompt "
                f"({self.window.prompt_tokens} tokens), of which only the first and the last are held"
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.window, self.is_shortened = 0, None, False


class TokenAwareCache(Cache):
    """
    A cache for `model.generate(..., past_key_values=cache)` (arXiv 2509.04467, token-aware cache). While the prompt is
    read every block attends to all of it. Afterwards the plan's token-aware blocks physically hold only the KV of the
    first and the last real prompt tokens (padding does not count, shorter prompts keep all), and of everything since.
    The result is that of a full cache in which those blocks' dropped positions are masked.

    transformers makes one attention mask for all full-attention blocks, as long as the logical length. Forward
    pre-hooks on the token-aware blocks pick the mask's columns that the block still holds. They act for this cache
    only, and go with it (or at the end of `with TokenAwareCache(...) as cache:`).

    Args:
        plan ([`PruningPlan`]): Says which blocks are token-aware and what the window is.
        model ([`~transformers.PreTrainedModel`]): The model that generates: the dense one, or a stage checkpoint,
            whose config says which stage it is.
        prompt_tokens (`int`, *optional*): Length of the (padded) prompt. By default the prompt is what the first
            forward reads; say it when the prompt is read in several chunks (`prefill_chunk_size`).
        running_blocks (`Sequence[int]`, *optional*): Dense numbers of the blocks that run, where some of `model` are
            bypassed. Default: all that the model has.

    Raises:
        `ValueError`: If the model is not one of the plan, or if a token-aware block is of a kind that cannot be
        shortened (linear attention, state space, shared KV).
    """

    def __init__(
        self,
        plan: PruningPlan,
        model: nn.Module,
        prompt_tokens: int | None = None,
        running_blocks: Sequence[int] | None = None,
    ):
        super().__init__(layers=DynamicCache(config=model.config).layers)
        self.plan = plan
        self.blocks = plan.blocks_of(model.config)
        running = set(self.blocks if running_blocks is None else running_blocks)
        self.running_layers = tuple(index for index, block in enumerate(self.blocks) if block in running)
        self.prompt_tokens = prompt_tokens
        self.prompt_is_complete = False
        token_aware = [i for i in self.running_layers if self.blocks[i] in plan.kv.token_aware_blocks]
        for index in token_aware:
            layer = self.layers[index]
            if type(layer) is DynamicLayer:
                self.layers[index] = TokenAwareLayer()
            elif not isinstance(layer, DynamicSlidingWindowLayer):  # a sliding window is bounded already: left as it is
                raise ValueError(
                    f"block {self.blocks[index]} cannot be token-aware: {model.config.model_type} keeps its state in "
                    f"a {type(layer).__name__}, which has no entry per prompt token"
                )
        self._hooks = _ForwardHooks(self, model)

    @classmethod
    def from_payload(
        cls,
        payload: KVPayload,
        plan: PruningPlan,
        model: nn.Module,
        running_blocks: Sequence[int] | None = None,
    ) -> "TokenAwareCache":
        """
        The cache of the decode side of a hand-over: what the payload carries, at the original positions. Its tensors
        are the payload's own.

        Raises:
            `PayloadError`: If the payload is of another plan, or lacks a block that the model runs.
        """
        cache = cls(plan, model, prompt_tokens=payload.prompt_tokens, running_blocks=running_blocks)
        payload.check_plan(plan)
        window = cache.complete_prompt(payload.prompt_mask)
        for index in cache.running_layers:
            layer = cache.layers[index]
            keys, values = payload.entries_of(cache.blocks[index])
            if isinstance(layer, TokenAwareLayer) and window is not None:
                expected = window.kept_tokens
            elif isinstance(layer, DynamicSlidingWindowLayer):
                expected = min(payload.prompt_tokens, layer.sliding_window - 1)
            else:
                expected = payload.prompt_tokens
            if keys.shape[-2] != expected:
                raise PayloadError(
                    f"block {cache.blocks[index]}: the payload holds {keys.shape[-2]} tokens, the plan says {expected}"
                )
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if isinstance(layer, TokenAwareLayer):
                layer.seen_tokens = payload.prompt_tokens
                layer.is_shortened = window is not None
            elif isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = payload.prompt_tokens
        return cache

    # Before a forward

    def begin_forward(self, new_tokens: int, attention_mask: torch.Tensor | None) -> None:
        """
        Prepares a forward over `new_tokens` tokens: if it completes the prompt, works out what the window keeps. The
        hook on the decoder calls it before the blocks run.

        Args:
            new_tokens (`int`): Tokens per row in this forward.
            attention_mask (`torch.Tensor`, *optional*): Shape `(batch_size, seen_tokens + new_tokens)`, 0 for padding.
        """
        total = self.get_seq_length() + new_tokens
        if self.prompt_is_complete or total < (self.prompt_tokens or 0):
            return
        if self.prompt_tokens is None:
            self.prompt_tokens = total
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "TokenAwareCache needs the 2D padding mask (batch_size, tokens), got one of shape "
                f"{tuple(attention_mask.shape)}"
            )
        self.complete_prompt(attention_mask)

    def complete_prompt(self, padding_mask: torch.Tensor | None) -> PromptWindow | None:
        """Fixes the window of the prompt, whose `padding_mask` has the shape `(batch_size, at least prompt_tokens)`."""
        self.prompt_is_complete = True
        if padding_mask is not None:
            padding_mask = padding_mask[:, : self.prompt_tokens]
        kv = self.plan.kv
        window = PromptWindow.of_prompt(self.prompt_tokens, padding_mask, kv.first_tokens, kv.last_tokens)
        for layer in self.token_aware_layers:
            layer.window = window
        return window

    @property
    def token_aware_layers(self) -> list[TokenAwareLayer]:
        """The layers that are shortened after the prompt."""
        return [layer for layer in self.layers if isinstance(layer, TokenAwareLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the cache holds."""
        tensors = (tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def batch_rows(self) -> int:
        """Rows that the cache holds, 0 before the first forward."""
        layers = (self.layers[index] for index in self.running_layers)
        return next((layer.keys.shape[0] for layer in layers if layer.is_initialized), 0)

    # The logical length is that of a block which runs: a bypassed one has seen nothing

    def _running_like(self, layer_idx: int) -> int:
        if layer_idx in self.running_layers or not self.running_layers:
            return layer_idx
        sliding = self.is_sliding
        same_kind = [index for index in self.running_layers if sliding[index] == sliding[layer_idx]]
        return (same_kind or self.running_layers)[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._running_like(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._running_like(layer_idx))

    # Rows: a window belongs to rows too

    def _index_windows(self, rows: torch.Tensor) -> None:
        layers = self.token_aware_layers
        if layers and layers[0].window is not None:
            window = layers[0].window.index_rows(rows)
            for layer in layers:
                layer.window = window

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._index_windows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._index_windows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_rows)
        super().batch_repeat_interleave(repeats)
        self._index_windows(rows.repeat_interleave(repeats))

    # Going back

    def crop(self, tokens_to_remove: int) -> None:
        # All or nothing: the shortened layers refuse before any other has been cropped.
        for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, TokenAwareLayer)):
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.prompt_tokens, self.prompt_is_complete = None, False

    def close(self) -> None:
        """Takes the hooks off the model. A later forward with this cache would not know what was dropped."""
        self._hooks.remove()

    def __enter__(self) -> "TokenAwareCache":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class _ForwardHooks:
    """The forward pre-hooks of one cache on a model: one on the decoder, one on each token-aware block."""

    def __init__(self, cache: TokenAwareCache, model: nn.Module):
        self.cache = weakref.ref(cache)
        self.is_active = False  # whether the running forward is one with this cache
        self.mask: tuple[torch.Tensor, torch.Tensor] | None = None  # the running forward's mask and the part held
        decoder, blocks = get_decoder(model), get_blocks(model)
        handles = [decoder.register_forward_pre_hook(self._begin_forward(decoder), with_kwargs=True)]
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, TokenAwareLayer):
                hook = self._fit_mask(blocks[index], layer)
                handles.append(blocks[index].register_forward_pre_hook(hook, with_kwargs=True))
        self.remove = weakref.finalize(cache, _remove_all, handles)

    def _begin_forward(self, decoder: nn.Module) -> Callable:
        arguments = _Arguments(decoder)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            cache = self.cache()
            self.is_active = cache is not None and arguments.get("past_key_values", args, kwargs) is cache
            self.mask = None
            if self.is_active:
                tokens = arguments.get("input_ids", args, kwargs)
                if tokens is None:
                    tokens = arguments.get("inputs_embeds", args, kwargs)
                cache.begin_forward(tokens.shape[1], arguments.get("attention_mask", args, kwargs))

        return hook

    def _fit_mask(self, block: nn.Module, layer: TokenAwareLayer) -> Callable:
        arguments = _Arguments(block)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.is_active or not layer.is_shortened:
                return None
            mask = arguments.get("attention_mask", args, kwargs)
            if mask is None:  # nothing is padded and one query sees all that is held
                return None
            if self.mask is None or self.mask[0] is not mask:  # one mask serves all blocks: fitted once per forward
                self.mask = (mask, layer.window.select_mask(mask))
            return arguments.replaced("attention_mask", self.mask[1], args, kwargs)

        return hook


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
        if name in kwargs:
            return args, {**kwargs, name: value}
        index = self.index[name]
        return (*args[:index], value, *args[index + 1 :]), kwargs
