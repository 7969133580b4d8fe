"""TokenAwareCache: after the prompt, token-aware blocks hold the KV of a few of its tokens only."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..blocks import check_attends_by_mask, check_takes_cache, get_blocks
from ..plan import PruningPlan
from ..spread_weights import execution_device
from .compact_sliding_layer import CompactSlidingLayer
from .forward_hooks import ForwardHooks
from .kv_payload import KVPayload
from .prompt_window import PromptWindow
from .reserved_layer import ReservedLayer
from .token_aware_layer import TokenAwareLayer
from .wire_format import PayloadError


class TokenAwareCache(Cache):
    """
    A cache for `model.generate(..., past_key_values=cache)` (arXiv 2509.04467, token-aware cache). While the prompt is
    read every block attends to all of it. Afterwards the plan's token-aware blocks physically hold only the KV of the
    real prompt tokens that the plan keeps (see [`KVPlan`]; padding does not count, shorter prompts keep all), and of
    everything since. The result is that of a full cache in which those blocks' dropped positions are masked.

    Where tokens are chosen by attention, each of these blocks attends once more, eagerly, for the few queries at the
    prompt's end (see [`AttentionReplay`]); the model's own attention implementation does everything else.

    transformers makes one attention mask for all full-attention blocks, as long as the logical length. Forward
    pre-hooks on the token-aware blocks pick the mask's columns that the block still holds. They act for this cache
    only, and go with it (or at the end of `with TokenAwareCache(...) as cache:`).

    Args:
        plan ([`PruningPlan`]): Says which blocks are token-aware and what the window is.
        model ([`~transformers.PreTrainedModel`]): The model that generates: the dense one, or a stage checkpoint,
            whose config says which stage it is.
        prompt_tokens (`int`, *optional*): Length of the (padded) prompt. By default the prompt is what the first
            forward reads; say it where that is not so: when the prompt is read in several chunks
            (`prefill_chunk_size`), and in assisted and prompt-lookup decoding, where it reads candidates too.
        running_blocks (`Sequence[int]`, *optional*): Dense numbers of the blocks that run, where some of `model` are
            bypassed. Default: all that the model has.

    Raises:
        `ValueError`: If the model is not one of the plan or takes no cache, if a block keeps anything but one KV entry
        per token (linear attention, state space, shared KV), if its attention depends on dropped tokens otherwise
        (ALiBi), or if tokens are to be chosen by attention that cannot be observed.
    """

    def __init__(
        self,
        plan: PruningPlan,
        model: nn.Module,
        prompt_tokens: int | None = None,
        running_blocks: Sequence[int] | None = None,
    ):
        if prompt_tokens is not None and prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {prompt_tokens}")
        super().__init__(layers=DynamicCache(config=model.config).layers)
        self.plan = plan
        self.blocks = plan.blocks_of(model.config)
        running = set(self.blocks if running_blocks is None else running_blocks)
        self.running_layers = tuple(index for index, block in enumerate(self.blocks) if block in running)
        self.prompt_tokens = prompt_tokens
        self.prompt_is_complete = False
        self.prompt_mask: torch.Tensor | None = None  # its padding, shape (rows, prompt_tokens)
        self.announced_tokens = 0  # length that the sequence has with the forward that the hooks saw begin
        self.repeats_sequence = False
        windows = plan.kv.windows
        for index in self.running_layers:
            kind = type(self.layers[index])
            if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"{model.config.model_type} keeps the state of block {self.blocks[index]} in a {kind.__name__}, "
                    "not in KV entries of its own, one per token: there is nothing to select and hand over"
                )
            if kind is DynamicSlidingWindowLayer:  # it is bounded already: nothing is selected from it
                self.layers[index] = CompactSlidingLayer(self.layers[index].sliding_window)
            else:
                own = windows.get(self.blocks[index])
                self.layers[index] = ReservedLayer() if own is None else TokenAwareLayer(*own, plan.kv.observed_tokens)
        check_takes_cache(model)
        if self.token_aware_layers:
            check_attends_by_mask(model)
        self._hooks = ForwardHooks(self, model)

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
        are the payload's own where these have the device and dtype of the model; else they are moved block by block.

        Raises:
            `PayloadError`: If the payload is of another plan, or lacks a block that the model runs.
        """
        cache = cls(plan, model, prompt_tokens=payload.prompt_tokens, running_blocks=running_blocks)
        payload.check_plan(plan)
        cache.complete_prompt(payload.prompt_mask)
        blocks = get_blocks(model)
        for index in cache.running_layers:
            layer = cache.layers[index]
            device = payload.device_of(cache.blocks[index])
            if device.type == "cpu":  # as it comes from a wire; what is on an accelerator was computed there
                device = execution_device(blocks[index])
            keys, values = payload.entries_of(cache.blocks[index], device)
            # Where autocast is on, it says what attention computes in.
            if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
                keys, values = keys.to(model.dtype), values.to(model.dtype)
            if isinstance(layer, TokenAwareLayer) and layer.window is not None:
                expected = layer.window.kept_tokens
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
                layer.is_shortened = layer.window is not None
            elif isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = payload.prompt_tokens
        return cache

    # Before a forward

    def begin_forward(self, rows: int, new_tokens: int, attention_mask: torch.Tensor | None) -> None:
        """
        Prepares a forward over `new_tokens` tokens: if it completes the prompt, works out what the window keeps. The
        hook on the decoder calls it before the blocks run.

        Args:
            rows (`int`): Rows of this forward.
            new_tokens (`int`): Tokens per row in this forward.
            attention_mask (`torch.Tensor`, *optional*): Shape `(rows, seen tokens + new_tokens)`, 0 for padding.

        Raises:
            `ValueError`: If that does not fit what the cache holds.
        """
        seen = self.get_seq_length()
        if self.batch_rows not in (0, rows):
            raise ValueError(f"the cache holds {self.batch_rows} rows, this forward has {rows}")
        if attention_mask is not None and attention_mask.shape != (rows, seen + new_tokens):
            raise ValueError(
                f"the cache has seen {seen} tokens and this forward brings {new_tokens}: it needs the padding mask of "
                f"all of them, of shape {(rows, seen + new_tokens)}, got {tuple(attention_mask.shape)}; for a new "
                "prompt, reset() the cache"
            )
        if self.prompt_is_complete and new_tokens > 1:
            self._check_same_prompt(attention_mask)
        self.announced_tokens = seen + new_tokens
        if self.prompt_is_complete or seen + new_tokens < (self.prompt_tokens or 0):
            return
        if self.prompt_tokens is None:
            self.prompt_tokens = seen + new_tokens
        self.complete_prompt(attention_mask)

    def complete_prompt(self, padding_mask: torch.Tensor | None) -> None:
        """Fixes the windows of the prompt. `padding_mask` has the shape `(batch_size, at least prompt_tokens)`."""
        if padding_mask is not None:
            padding_mask = padding_mask[:, : self.prompt_tokens]
        self.prompt_mask = padding_mask
        padded = self.plan.kv.observed_tokens > 0 and padding_mask is not None
        if padded and bool((padding_mask.bool().int().diff(dim=-1) < 0).any()):
            raise ValueError("tokens are chosen by attention of the prompt's end: prompts must be padded on the left")
        self.prompt_is_complete = True
        windows: dict[tuple[int, int], PromptWindow | None] = {}  # the same object where layers keep the same
        for layer in self.token_aware_layers:
            sizes = layer.first_tokens, layer.last_tokens
            if sizes not in windows:
                windows[sizes] = PromptWindow.of_prompt(self.prompt_tokens, padding_mask, *sizes)
            layer.window = windows[sizes]

    def _check_same_prompt(self, attention_mask: torch.Tensor | None) -> None:
        """Raises a `ValueError` if the padding mask of another turn begins with that of another prompt."""
        before, now = self.prompt_mask, attention_mask
        if before is None and now is None:
            return
        some = before if now is None else now  # `generate` passes no mask where nothing is padded
        before = torch.ones_like(some) if before is None else before.to(some.device)
        now = torch.ones_like(some) if now is None else now
        if not torch.equal(*(mask[:, : self.prompt_tokens].bool() for mask in (before, now))):
            raise ValueError(
                "the cache holds a prompt that is padded otherwise than this one: for a new prompt, reset() the cache"
            )

    @property
    def is_in_forward(self) -> bool:
        """Whether this thread runs a forward with this cache."""
        return self._hooks.is_active

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._hooks.is_active:
            self._check_announced(key_states.shape[-2], layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_announced(self, new_tokens: int, layer_idx: int) -> None:
        """
        Raises a `ValueError` if tokens come that no forward has announced. A model without this cache's hooks would
        append to it, and neither drop tokens nor mask them. (A block that is computed again in the backward pass has
        had its forward announced.)
        """
        held = self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else self.announced_tokens
        if self.announced_tokens < held + new_tokens:
            raise ValueError(
                "this cache was made for another model, or has been closed: make one for the model that runs, "
                "TokenAwareCache(plan, model)"
            )

    @property
    def token_aware_indices(self) -> list[int]:
        """Where the layers are that are shortened after the prompt."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, TokenAwareLayer)]

    @property
    def token_aware_layers(self) -> list[TokenAwareLayer]:
        """The layers that are shortened after the prompt."""
        return [self.layers[index] for index in self.token_aware_indices]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the cache holds."""
        tensors = (tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of memory that the cache takes: `nbytes`, and what is reserved for tokens to come."""
        reserved = 0
        for layer in self.layers:
            if isinstance(layer, ReservedLayer) and layer.is_initialized:
                ahead = layer.reserved_tokens - layer.keys.shape[-2]
                for states in (layer.keys, layer.values):
                    reserved += ahead * states[:, :, :1].numel() * states.element_size()
        return self.nbytes + reserved

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
        windows = {id(layer.window): layer.window for layer in layers if layer.window is not None}
        indexed = {key: window.index_rows(rows) for key, window in windows.items()}
        for layer in layers:
            layer.window = indexed.get(id(layer.window))
            if layer.attention is not None:
                layer.attention = layer.attention[rows.to(layer.attention.device)]
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[rows.to(self.prompt_mask.device)]

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

    def activate_past_recording(self) -> None:
        # Assisted decoding calls this and then hands its first forward the whole sequence, candidates included,
        # whatever the cache holds of it (transformers 5.23; a plain cache gives wrong tokens then).
        if self.prompt_tokens is None:
            raise ValueError(
                "assisted decoding reads the prompt together with its first candidates: say how long the prompt is, "
                "TokenAwareCache(..., prompt_tokens=input_ids.shape[1])"
            )
        super().activate_past_recording()
        self.repeats_sequence = True

    def unseen_tokens(self, tokens: int) -> int:
        """How many of the `tokens` that a forward is given are new; the last ones are."""
        seen = self.get_seq_length() if self.repeats_sequence else 0
        self.repeats_sequence = False
        return tokens - seen if tokens > seen else tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens. If any block cannot, it raises and leaves all as they are."""
        before = [dict(vars(layer)) for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for layer, state in zip(self.layers, before, strict=True):
                vars(layer).update(state)
            raise

    def reset(self) -> None:
        """Forgets everything, the length of the prompt too: the next forward reads a new one."""
        super().reset()
        self.prompt_tokens, self.prompt_is_complete, self.repeats_sequence = None, False, False
        self.prompt_mask, self.announced_tokens = None, 0

    def __deepcopy__(self, memo: dict) -> "TokenAwareCache":
        # The hooks know their cache: a copy, with which another answer to the same prompt begins, needs its own.
        duplicate = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            if name not in ("plan", "_hooks"):
                setattr(duplicate, name, copy.deepcopy(value, memo))
        duplicate.plan, duplicate._hooks = self.plan, ForwardHooks(duplicate, self._hooks.model)
        return duplicate

    def close(self) -> None:
        """Takes the hooks off the model. A later forward with this cache would not know what was dropped."""
        self._hooks.remove()

    def __enter__(self) -> "TokenAwareCache":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
