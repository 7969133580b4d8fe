"""IncrementalForward: the disaggregated forward of a plan, from where it differs from another plan on."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from transformers import DynamicCache

from ..adapters import active_adapter
from ..blocks import bypass_blocks, num_blocks
from ..fingerprint import model_fingerprint
from ..inference import DecodeStage
from ..inference.stage import position_ids
from ..kv import KVPayload, PromptWindow
from ..kv.observed_attention import observing
from ..kv.token_choice import observed, select_per_head
from ..plan import PruningPlan, StagePlan
from ..projected_blocks import project_blocks
from .calibration import Calibration, CalibrationBatch
from .merged_pairs import MergedPairs
from .partial_forward import PartialForward


logger = logging.getLogger(__name__)


@dataclass
class BatchState:
    """
    What is kept of one plan's forward over one batch, so that a similar plan can be computed from the first block that
    differs.

    Args:
        plan (`PruningPlan`): The plan.
        prefill_inputs (`dict[int, torch.Tensor]`): Prefill's hidden states before blocks, shape
            `(batch_size, prompt_tokens, hidden_size)`.
        entries (`dict[int, tuple[torch.Tensor, torch.Tensor]]`): Keys and values of the whole prompt for all blocks
            that prefill runs, shape `(batch_size, num_key_value_heads, prompt_tokens, head_dim)`.
        attention (`dict[int, torch.Tensor]`): Where the plan chooses tokens by attention, what the prompts' last
            queries attend to in these blocks, shape `(batch_size, num_key_value_heads, prompt_tokens)`.
        kl_of_first (`float`): Sum of the KL of the first completion tokens.
        decode_inputs (`dict[int, torch.Tensor]`): Decode's hidden states before blocks.
    """

    plan: PruningPlan
    prefill_inputs: dict[int, torch.Tensor]
    entries: dict[int, tuple[torch.Tensor, torch.Tensor]]
    attention: dict[int, torch.Tensor]
    kl_of_first: float
    decode_inputs: dict[int, torch.Tensor]


class IncrementalForward:
    """
    Runs plans on batches of a calibration as [`~inference.disaggregated_forward`] does, from the first block on in
    which a plan's prefill, or its decode, differs from that of a plan whose state is at hand. Where only decode
    differs, prefill is not run at all.

    Memory of a state: `state_nbytes` over all batches. Where two of them (the reference's and a candidate's) pass
    `cache_bytes`, hidden states are kept before every second, third, ... block only, or not at all; results stay the
    same. A narrower `cache_dtype` instead keeps more of them and rounds what is computed from them.

    Args:
        model (`nn.Module`): The dense model.
        calibration ([`Calibration`]): The batches.
        cache_bytes (`int`): Bound for hidden states and KV entries in this process.
        cache_dtype (`torch.dtype`, *optional*): In which these are kept. Default: the model's, which is exact.
        merged_pairs ([`MergedPairs`], *optional*): What merged blocks do. Only plans without any can do without.
        adapters (`Mapping[str, str]`, *optional*): Adapter that a stage applies, by the stage's name. Default: none.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        cache_bytes: int,
        cache_dtype: torch.dtype | None = None,
        merged_pairs: MergedPairs | None = None,
        adapters: Mapping[str, str] | None = None,
    ):
        self.model = model
        self.calibration = calibration
        self.adapters = dict(adapters or {})
        self.total_blocks = num_blocks(model.config)
        self.cache_dtype = cache_dtype or model.dtype
        self.merged_pairs = merged_pairs or MergedPairs()
        self._fingerprint = model_fingerprint(model)
        self.recorded_blocks = self._choose_recorded_blocks(cache_bytes)

    def run(
        self, batch: CalibrationBatch, plan: PruningPlan, base: BatchState | None, keep: bool
    ) -> tuple[float, BatchState | None]:
        """
        Args:
            batch ([`CalibrationBatch`]): What it runs on.
            plan ([`PruningPlan`]): The plan.
            base ([`BatchState`], *optional*): State of another plan on this batch.
            keep (`bool`): Whether the state is kept.

        Returns:
            Sum of KL over the batch, and the state.
        """
        keep = keep and bool(self.recorded_blocks)
        prefill_start, decode_start = self.starts(plan, None if base is None else base.plan)
        if prefill_start is None:
            state = replace(base, plan=plan)
        else:
            state = self._prefill(batch, plan, base, prefill_start, keep)
        kl_of_rest = 0.0
        if batch.tensors["completion_ids"].shape[1] > 1:
            kl_of_rest = self._decode(batch, plan, base, state, decode_start, keep)
        return state.kl_of_first + kl_of_rest, state if keep else None

    def starts(self, plan: PruningPlan, base: PruningPlan | None) -> tuple[int | None, int]:
        """First block to run in prefill (`None`: nothing differs) and in decode, given the state of `base`."""
        if base is None:
            return 0, 0
        prefill = _first_difference(plan.prefill, base.prefill)
        if plan.kv.observed_tokens not in (0, base.kv.observed_tokens):
            prefill = 0  # the base's prefill has not been observed so
        decode = [_first_difference(plan.decode, base.decode), prefill]
        windows, others = plan.kv.windows, base.kv.windows
        same_choice = (plan.kv.token_choice, plan.kv.observed_tokens) == (
            base.kv.token_choice,
            base.kv.observed_tokens,
        )
        decode += [
            block
            for block in windows.keys() | others.keys()
            if windows.get(block) != others.get(block) or not same_choice
        ]
        # A plan that differs in nothing is run from the last block on: it is asked for its states or logits.
        decode_start = min((block for block in decode if block is not None), default=self.total_blocks - 1)
        return prefill if prefill is None else self._kept_before(prefill), self._kept_before(decode_start)

    def _kept_before(self, block: int) -> int:
        """The last block up to `block` whose input is kept."""
        return max((kept for kept in self.recorded_blocks if kept <= block), default=0)

    def _prefill(
        self, batch: CalibrationBatch, plan: PruningPlan, base: BatchState | None, start: int, keep: bool
    ) -> BatchState:
        tensors = batch.tensors
        running = [block for block in plan.kept_blocks("prefill") if block >= start]
        cache = DynamicCache(config=self.model.config)
        forward = self._forward(start, base.prefill_inputs[start] if start else None, keep)
        merged = self.merged_pairs.active(self.model, plan.prefill.merged_blocks)
        adapted = active_adapter(self.model, self.adapters.get("prefill"))
        may_drop = [
            block
            for block in running
            if plan.kv.observed_tokens
            and not cache.layers[block].is_sliding
            and block not in plan.prefill.projected_blocks
        ]
        projected = project_blocks(self.model, plan.prefill.projected_blocks)
        with merged, bypass_blocks(self.model, plan.prefill.missing_blocks), projected, adapted:
            with observing(self.model, may_drop, cache, tensors["prompt_mask"], plan.kv.observed_tokens) as attention:
                output = forward(
                    input_ids=tensors["prompt_ids"],
                    attention_mask=tensors["prompt_mask"],
                    position_ids=position_ids(tensors["prompt_mask"]),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        entries = {block: (cache.layers[block].keys, cache.layers[block].values) for block in running}
        if keep:
            entries = {block: (self._narrow(keys), self._narrow(values)) for block, (keys, values) in entries.items()}
        inputs = forward.recorded
        if start:
            entries |= {block: pair for block, pair in base.entries.items() if block < start}
            attention |= {block: sums for block, sums in base.attention.items() if block < start}
            inputs = inputs | {block: states for block, states in base.prefill_inputs.items() if block <= start}
        return BatchState(plan, inputs, entries, attention, batch.kl_of_first(output.logits[:, -1]), {})

    def _decode(
        self,
        batch: CalibrationBatch,
        plan: PruningPlan,
        base: BatchState | None,
        state: BatchState,
        start: int,
        keep: bool,
    ) -> float:
        tensors = batch.tensors
        completion_mask = tensors["completion_mask"][:, :-1]
        forward = self._forward(start, base.decode_inputs[start] if start else None, keep)
        adapter = self.adapters.get("decode")
        stage = DecodeStage(self.model, plan, adapter, module=forward, fingerprint=self._fingerprint)
        with self.merged_pairs.active(self.model, plan.decode.merged_blocks):
            payload = self._payload(batch, plan, state)
            logits = stage.forward(payload, tensors["completion_ids"][:, :-1], completion_mask)
        state.decode_inputs = forward.recorded
        if start:
            kept = {block: states for block, states in base.decode_inputs.items() if block <= start}
            state.decode_inputs = forward.recorded | kept
        return batch.kl_of_rest(logits)

    def _forward(self, start: int, hidden_states: torch.Tensor | None, keep: bool) -> PartialForward:
        hidden_states = None if hidden_states is None else hidden_states.to(self.model.dtype)
        return PartialForward(
            self.model, start, hidden_states, self.recorded_blocks if keep else (), record_dtype=self.cache_dtype
        )

    def _narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.cache_dtype)

    def _payload(self, batch: CalibrationBatch, plan: PruningPlan, state: BatchState) -> KVPayload:
        """What prefill hands over by the plan, selected from the whole prompt's entries."""
        ids, mask = batch.tensors["prompt_ids"], batch.tensors["prompt_mask"]
        sizes_of = plan.kv.windows
        windows = {sizes: PromptWindow.of_prompt(ids.shape[1], mask, *sizes) for sizes in set(sizes_of.values())}
        layers = DynamicCache(config=self.model.config).layers
        entries = {}
        for block in plan.kept_blocks("decode"):
            keys, values = (tensor.to(self.model.dtype) for tensor in state.entries[block])
            window = None if layers[block].is_sliding else windows.get(sizes_of.get(block))
            if window is not None and plan.kv.observed_tokens:
                columns = observed(state.attention[block], window.kept_tokens, plan.kv.observed_tokens, mask)
                keys, values = select_per_head(keys, columns), select_per_head(values, columns)
            elif window is not None:
                keys, values = window.select(keys), window.select(values)
            entries[block] = (keys, values)
        return KVPayload(entries, ids, mask, plan.digest, self._fingerprint, nbytes_dense=0)

    # Memory

    @property
    def state_nbytes(self) -> int:
        """Bytes of the hidden states and KV entries that are kept for one plan in this process, at most."""
        hidden, entries = self.state_sizes
        return hidden * len(self.recorded_blocks) + entries * bool(self.recorded_blocks)

    @cached_property
    def state_sizes(self) -> tuple[int, int]:
        """Bytes of the hidden states before one block, and of the KV entries of all blocks, for one plan."""
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        size = torch.finfo(self.cache_dtype).bits // 8
        shapes = [
            (tensors["prompt_ids"].numel(), tensors["completion_ids"].numel()) for tensors in self.calibration.batches
        ]
        prompt, completion = (sum(column) for column in zip(*shapes, strict=True)) if shapes else (0, 0)
        if PartialState().num_processes > 1:  # the largest share decides, so that all processes do alike
            shares = gather(torch.tensor([[prompt, completion]], device=self.calibration.device))
            prompt, completion = shares.amax(dim=0).tolist()
        hidden = (prompt + completion) * config.hidden_size * size
        return hidden, self.total_blocks * prompt * 2 * kv_heads * head_dim * size

    def _choose_recorded_blocks(self, cache_bytes: int) -> tuple[int, ...]:
        """Blocks before which hidden states are kept: as many as fit, evenly spread; none where it is not worth it."""
        hidden, entries = self.state_sizes
        available = cache_bytes / 2 - entries  # once for the reference and once for the candidate
        fitting = int(available // max(hidden, 1)) if available > 0 else 0
        if fitting < 1:
            logger.warning(
                "%d bytes are too little to keep hidden states (%d bytes per block and %d for KV entries, twice): "
                "every plan is computed from block 0 on",
                cache_bytes,
                hidden,
                entries,
            )
            return ()
        stride = math.ceil(self.total_blocks / min(fitting + 1, self.total_blocks))
        return tuple(range(stride, self.total_blocks, stride))


def _first_difference(stage: StagePlan, other: StagePlan) -> int | None:
    """First block that one of two stages runs and the other does not, or runs otherwise."""
    missing = set(stage.missing_blocks) ^ set(other.missing_blocks)
    missing |= set(stage.projected_blocks) ^ set(other.projected_blocks)
    merged = {block for pair in set(stage.merged_blocks) ^ set(other.merged_blocks) for block in pair}
    return min(missing | merged, default=None)
