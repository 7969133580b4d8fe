"""Objective: the energy of a plan, KL(dense || disaggregated forward) per completion token, at the least cost."""

import heapq
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from transformers import DynamicCache

from ..adapters import active_adapter
from ..blocks import bypass_blocks, num_blocks
from ..fingerprint import model_fingerprint
from ..inference import DecodeStage
from ..inference.stage import position_ids
from ..kv import KVPayload, PromptWindow
from ..plan import PruningPlan, StagePlan
from .calibration import Calibration, CalibrationBatch
from .partial_forward import PartialForward, evaluating
from .search_journal import SearchJournal


logger = logging.getLogger(__name__)


@dataclass
class SearchCost:
    """
    What a search has spent. A block forward is one block on one token.

    Args:
        evaluations (`int`): Plans of which at least one batch was evaluated.
        block_tokens (`int`): Block forwards x tokens of these evaluations.
        reference_block_tokens (`int`): Those spent on the hidden states of reference plans, beside evaluations.
        plain_block_tokens (`int`): What the same evaluations take where each runs all batches from block 0 to the end.
    """

    evaluations: int = 0
    block_tokens: int = 0
    reference_block_tokens: int = 0
    plain_block_tokens: int = 0


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
        kl_of_first (`float`): Sum of the KL of the first completion tokens.
        decode_inputs (`dict[int, torch.Tensor]`): Decode's hidden states before blocks.
    """

    plan: PruningPlan
    prefill_inputs: dict[int, torch.Tensor]
    entries: dict[int, tuple[torch.Tensor, torch.Tensor]]
    kl_of_first: float
    decode_inputs: dict[int, torch.Tensor]


class Objective:
    """
    The energy of a plan: mean KL(dense || disaggregated forward) per completion token, as
    [`~inference.disaggregated_forward`] computes it. All savings are exact:

    - Of a reference plan (see [`Objective.accept`]) the hidden states before every block and the prompt's KV entries
      are kept, for each batch. Another plan is computed from the first block on in which its prefill, or its decode,
      differs; where only decode differs, prefill is not run at all.
    - A plan is measured on a batch once.
    - KL is never negative, so a plan is given up as soon as its sum over batches passes the limit.

    Memory beyond the weights and the calibration: `state_nbytes` for the reference plan, and as much again for the
    candidate. Where that passes `hidden_cache_bytes`, hidden states are kept before every second, third, ... block
    only, or not at all; results stay the same.

    Where several processes run, each measures its share of the batches, and sums are reduced after every batch, so
    that all processes come to the same decisions.

    Args:
        model (`nn.Module`): The dense model.
        calibration ([`Calibration`]): The examples.
        hidden_cache_bytes (`int`, defaults to 4 GiB): Bound for hidden states and KV entries in this process.
        journal ([`SearchJournal`], *optional*): Where energies are written, and known ones come from.
        adapters (`Mapping[str, str]`, *optional*): Adapter that a stage applies, by the stage's name. Default: none.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        hidden_cache_bytes: int = 4 << 30,
        journal: SearchJournal | None = None,
        adapters: Mapping[str, str] | None = None,
    ):
        self.adapters = dict(adapters or {})
        self.model = model
        self.calibration = calibration
        self.dense_plan = PruningPlan.empty(model)
        self.total_blocks = num_blocks(model.config)
        self.journal = SearchJournal(None, calibration.digest) if journal is None else journal
        self.cost = SearchCost()
        self._fingerprint = model_fingerprint(model)
        self.recorded_blocks = self._choose_recorded_blocks(hidden_cache_bytes)
        self._reference: PruningPlan | None = None
        self._states: list[BatchState | None] = [None] * len(calibration)
        self._candidate: tuple[PruningPlan, dict[int, BatchState]] | None = None
        self._sums: dict[str, list[float]] = {}  # by plan digest, the KL sum of each batch so far
        batches = [calibration[index] for index in range(len(calibration))]
        self._prompt_tokens = self._all_reduced([int(b.tensors["prompt_mask"].sum()) for b in batches])
        self._decode_tokens = self._all_reduced([int(b.tensors["completion_mask"][:, :-1].sum()) for b in batches])

    # Energies

    def energy(self, plan: PruningPlan, limit: float = math.inf) -> float:
        """
        Mean KL per completion token in nats, or infinity as soon as it is certain to be above `limit`.

        Args:
            plan ([`PruningPlan`]): The plan.
            limit (`float`, *optional*): What the caller could still accept.
        """
        while (bound := self._lower_bound(plan)) <= limit and not self.is_known(plan):
            self._advance(plan, keep=True)
        return bound if bound <= limit else math.inf

    def best_of(
        self, plans: Sequence[PruningPlan], on_progress: Callable[[int], Any] | None = None
    ) -> tuple[PruningPlan, float]:
        """
        The plan with the least energy, and that energy.

        It always goes on with the plan whose sum so far is least: a plan is then never measured on a batch beyond what
        is needed to see that it is worse than the best.

        Args:
            plans (`Sequence[PruningPlan]`): At least one. Among equals the first wins.
            on_progress (`Callable`, *optional*): Called with 0 after every batch, as the `update` of a progress bar.
        """
        heap = [(self._lower_bound(plan), index) for index, plan in enumerate(plans)]
        heapq.heapify(heap)
        while True:
            bound, index = heap[0]
            if self.is_known(plans[index]):
                return plans[index], bound
            self._advance(plans[index], keep=False)
            heapq.heapreplace(heap, (self._lower_bound(plans[index]), index))
            if on_progress is not None:
                on_progress(0)

    def is_known(self, plan: PruningPlan) -> bool:
        """Whether the plan has been measured on all batches."""
        return len(self._sums.get(plan.digest, ())) == self.calibration.num_rounds

    def is_above(self, plan: PruningPlan, limit: float) -> bool:
        """Whether it is certain, without computing anything, that the plan's energy is above `limit`."""
        return self._lower_bound(plan) > limit

    def accept(self, plan: PruningPlan) -> None:
        """Makes `plan` the reference from which others are computed. Its states are computed when they are needed."""
        if self._candidate is not None and self._candidate[0] == plan:
            for index, state in self._candidate[1].items():
                self._states[index] = state
        self._reference, self._candidate = plan, None

    def forget(self) -> None:
        """Frees all hidden states and KV entries; energies stay known."""
        self._reference, self._candidate = None, None
        self._states = [None] * len(self._states)

    @property
    def dense_block_tokens(self) -> int:
        """Block forwards x tokens of one dense forward over the calibration set."""
        return self._plain_block_tokens(self.dense_plan)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the hidden states and KV entries that are kept for one plan in this process, at most."""
        hidden, entries = self._state_sizes()
        return hidden * len(self.recorded_blocks) + entries * bool(self.recorded_blocks)

    def _lower_bound(self, plan: PruningPlan) -> float:
        """The energy where all batches are measured, and else what it is at least."""
        return math.fsum(self._sums.get(plan.digest, ())) / self.calibration.num_completion_tokens

    def _plain_block_tokens(self, plan: PruningPlan) -> int:
        prefill, decode = len(plan.kept_blocks("prefill")), len(plan.kept_blocks("decode"))
        return prefill * sum(self._prompt_tokens) + decode * sum(self._decode_tokens)

    def _advance(self, plan: PruningPlan, keep: bool) -> None:
        """Measures `plan` on the next batch; with `keep` its states are kept, in case it is accepted."""
        digest = plan.digest
        sums = self._sums.setdefault(digest, [])
        index = len(sums)
        if not sums:
            self.cost.evaluations += 1
            self.cost.plain_block_tokens += self._plain_block_tokens(plan)
        if (known := self.journal.get(digest, index)) is not None:
            kl_sum, block_tokens = known
        else:
            kl_sum, block_tokens = self._measure(plan, index, keep)
            self.journal.add(digest, index, kl_sum, block_tokens)
        self.cost.block_tokens += block_tokens
        sums.append(kl_sum)

    def _measure(self, plan: PruningPlan, index: int, keep: bool) -> tuple[float, int]:
        """Sum of KL and block forwards x tokens of `plan` on every process's batch `index`."""
        kl_sum, block_tokens, spent_on_reference = 0.0, 0, 0
        if index < len(self.calibration):
            batch = self.calibration[index]
            with evaluating(self.model), active_adapter(self.model, None):
                spent_on_reference = self._update_reference(index)
                kl_sum, block_tokens, state = self._run(batch, plan, self._states[index], keep)
            if keep and state is not None:
                if self._candidate is None or self._candidate[0] != plan:
                    self._candidate = (plan, {})
                self._candidate[1][index] = state
        kl_sum, block_tokens, spent_on_reference = self._all_reduced([kl_sum, block_tokens, spent_on_reference])
        self.cost.reference_block_tokens += int(spent_on_reference)
        if not math.isfinite(kl_sum):
            logger.warning("a plan with non-finite logits counts as infinitely bad: %s", plan.decode.missing_blocks)
            kl_sum = math.inf
        return kl_sum, int(block_tokens)

    def _update_reference(self, index: int) -> int:
        """Brings the state of a batch to the reference plan; returns the block forwards x tokens that it took."""
        state = self._states[index]
        if (
            self._reference is None
            or not self.recorded_blocks
            or (state is not None and state.plan == self._reference)
        ):
            return 0
        _, block_tokens, self._states[index] = self._run(self.calibration[index], self._reference, state, keep=True)
        return block_tokens

    def _all_reduced(self, values: list[float]) -> list[float]:
        if PartialState().num_processes == 1:
            return values
        return reduce(torch.tensor(values, dtype=torch.float64, device=self.calibration.device), "sum").tolist()

    # The forward, from the first block that differs

    def _run(
        self, batch: CalibrationBatch, plan: PruningPlan, base: BatchState | None, keep: bool
    ) -> tuple[float, int, BatchState | None]:
        """Sum of KL over a batch, block forwards x tokens, and (`keep`) the state. `base` is another plan's state."""
        keep = keep and bool(self.recorded_blocks)
        prefill_start, decode_start = self._starts(plan, base)
        if prefill_start is None:
            state, block_tokens = replace(base, plan=plan), 0
        else:
            state, block_tokens = self._prefill(batch, plan, base, prefill_start, keep)
        kl_of_rest = 0.0
        if batch.tensors["completion_ids"].shape[1] > 1:
            kl_of_rest, decode_tokens = self._decode(batch, plan, base, state, decode_start, keep)
            block_tokens += decode_tokens
        return state.kl_of_first + kl_of_rest, block_tokens, state if keep else None

    def _starts(self, plan: PruningPlan, base: BatchState | None) -> tuple[int | None, int]:
        """First block to run in prefill (`None`: nothing differs) and in decode."""
        if base is None:
            return 0, 0
        prefill = _first_difference(plan.prefill, base.plan.prefill)
        decode = [_first_difference(plan.decode, base.plan.decode), prefill]
        windows = set(plan.kv.token_aware_blocks) ^ set(base.plan.kv.token_aware_blocks)
        if (plan.kv.first_tokens, plan.kv.last_tokens) != (base.plan.kv.first_tokens, base.plan.kv.last_tokens):
            windows |= {*plan.kv.token_aware_blocks, *base.plan.kv.token_aware_blocks}
        decode += windows
        # A plan that differs in nothing is run from the last block on: it is asked for its states or logits.
        decode_start = min((block for block in decode if block is not None), default=self.total_blocks - 1)
        return prefill if prefill is None else self._kept_before(prefill), self._kept_before(decode_start)

    def _kept_before(self, block: int) -> int:
        """The last block up to `block` whose input is kept."""
        return max((kept for kept in self.recorded_blocks if kept <= block), default=0)

    def _prefill(
        self, batch: CalibrationBatch, plan: PruningPlan, base: BatchState | None, start: int, keep: bool
    ) -> tuple[BatchState, int]:
        tensors = batch.tensors
        running = [block for block in plan.kept_blocks("prefill") if block >= start]
        cache = DynamicCache(config=self.model.config)
        forward = PartialForward(
            self.model,
            start,
            base.prefill_inputs[start] if start else None,
            self.recorded_blocks if keep else (),
        )
        adapted = active_adapter(self.model, self.adapters.get("prefill"))
        with bypass_blocks(self.model, plan.prefill.missing_blocks), adapted:
            output = forward(
                input_ids=tensors["prompt_ids"],
                attention_mask=tensors["prompt_mask"],
                position_ids=position_ids(tensors["prompt_mask"]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        entries = {block: (cache.layers[block].keys, cache.layers[block].values) for block in running}
        inputs = forward.recorded
        if start:
            entries |= {block: pair for block, pair in base.entries.items() if block < start}
            inputs = inputs | {block: states for block, states in base.prefill_inputs.items() if block <= start}
        state = BatchState(plan, inputs, entries, batch.kl_of_first(output.logits[:, -1]), {})
        return state, len(running) * int(tensors["prompt_mask"].sum())

    def _decode(
        self,
        batch: CalibrationBatch,
        plan: PruningPlan,
        base: BatchState | None,
        state: BatchState,
        start: int,
        keep: bool,
    ) -> tuple[float, int]:
        tensors = batch.tensors
        completion_mask = tensors["completion_mask"][:, :-1]
        forward = PartialForward(
            self.model, start, base.decode_inputs[start] if start else None, self.recorded_blocks if keep else ()
        )
        stage = DecodeStage(self.model, plan, self.adapters.get("decode"), module=forward)
        logits = stage.forward(self._payload(batch, plan, state), tensors["completion_ids"][:, :-1], completion_mask)
        state.decode_inputs = forward.recorded
        if start:
            kept = {block: states for block, states in base.decode_inputs.items() if block <= start}
            state.decode_inputs = forward.recorded | kept
        running = sum(block >= start for block in plan.kept_blocks("decode"))
        return batch.kl_of_rest(logits), running * int(completion_mask.sum())

    def _payload(self, batch: CalibrationBatch, plan: PruningPlan, state: BatchState) -> KVPayload:
        """What prefill hands over by the plan, selected from the whole prompt's entries."""
        ids, mask = batch.tensors["prompt_ids"], batch.tensors["prompt_mask"]
        window = PromptWindow.of_prompt(ids.shape[1], mask, plan.kv.first_tokens, plan.kv.last_tokens)
        layers = DynamicCache(config=self.model.config).layers
        entries = {}
        for block in plan.kept_blocks("decode"):
            keys, values = state.entries[block]
            token_aware = block in plan.kv.token_aware_blocks and not layers[block].is_sliding
            if token_aware and window is not None:
                keys, values = window.select(keys), window.select(values)
            entries[block] = (keys, values)
        return KVPayload(entries, ids, mask, plan.digest, self._fingerprint, nbytes_dense=0)

    # Memory

    def _state_sizes(self) -> tuple[int, int]:
        """Bytes of the hidden states before one block, and of the KV entries of all blocks, for one plan."""
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        size = torch.finfo(self.model.dtype).bits // 8
        shapes = [
            (tensors["prompt_ids"].numel(), tensors["completion_ids"].numel()) for tensors in self.calibration.batches
        ]
        prompt, completion = (sum(column) for column in zip(*shapes, strict=True)) if shapes else (0, 0)
        hidden = (prompt + completion) * config.hidden_size * size
        return hidden, self.total_blocks * prompt * 2 * kv_heads * head_dim * size

    def _choose_recorded_blocks(self, hidden_cache_bytes: int) -> tuple[int, ...]:
        """Blocks before which hidden states are kept: as many as fit, evenly spread; none where it is not worth it."""
        hidden, entries = self._state_sizes()
        available = hidden_cache_bytes / 2 - entries  # once for the reference and once for the candidate
        fitting = int(available // max(hidden, 1)) if available > 0 else 0
        if fitting < 1:
            logger.warning(
                "hidden_cache_bytes=%d is too little to keep hidden states (%d bytes per block and %d for KV entries, "
                "twice): every plan is computed from block 0 on",
                hidden_cache_bytes,
                hidden,
                entries,
            )
            return ()
        stride = math.ceil(self.total_blocks / min(fitting + 1, self.total_blocks))
        return tuple(range(stride, self.total_blocks, stride))


def _first_difference(stage: StagePlan, other: StagePlan) -> int | None:
    """First block that one of two stages runs and the other does not, or runs otherwise."""
    missing = set(stage.missing_blocks) ^ set(other.missing_blocks)
    merged = {block for pair in set(stage.merged_blocks) ^ set(other.merged_blocks) for block in pair}
    return min(missing | merged, default=None)
