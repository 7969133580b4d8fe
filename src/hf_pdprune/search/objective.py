"""Objective: the energy of a plan, KL(dense || disaggregated forward) per completion token, at the least cost."""

import heapq
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from ..adapters import active_adapter
from ..evaluating import evaluating
from ..plan import PruningPlan
from ..spread_weights import gathering
from .calibration import Calibration
from .incremental_forward import BatchState, IncrementalForward
from .merged_pairs import MergedPairs
from .search_journal import SearchJournal


logger = logging.getLogger(__name__)

# Batches on which a plan is measured at least before the others are guessed from them.
_FEWEST_SAMPLED = 4


@dataclass
class SearchCost:
    """
    What a search has spent. A block forward is one block on one token.

    Args:
        evaluations (`int`): Plans of which at least one batch was evaluated.
        block_tokens (`int`): Block forwards x tokens of these evaluations, those that a journal saved included.
        reference_block_tokens (`int`): Those spent on the hidden states of reference plans, beside evaluations.
        plain_block_tokens (`int`): What the same evaluations take where each runs all batches from block 0 to the end.
    """

    evaluations: int = 0
    block_tokens: int = 0
    reference_block_tokens: int = 0
    plain_block_tokens: int = 0

    @property
    def total(self) -> int:
        """Block forwards x tokens of evaluations and reference plans."""
        return self.block_tokens + self.reference_block_tokens


class Objective:
    """
    The energy of a plan: mean KL(dense || disaggregated forward) per completion token, as
    [`~inference.disaggregated_forward`] computes it. All savings are exact:

    - Of a reference plan (see [`Objective.accept`]) the hidden states before every block and the prompt's KV entries
      are kept, for each batch. Another plan is computed from the first block on in which its prefill, or its decode,
      differs (see [`IncrementalForward`]).
    - A plan is measured on a batch once.
    - KL is never negative, so a plan is given up as soon as its sum over batches passes the limit.

    What is not exact happens within [`Objective.estimating`] alone.

    Memory beyond the weights and the calibration: `state_nbytes` for the reference plan, and as much again for the
    candidate; see [`IncrementalForward`] for the bound.

    Where several processes run, each measures its share of the batches, and sums are reduced after every batch, so
    that all processes come to the same decisions.

    Args:
        model (`nn.Module`): The dense model.
        calibration ([`Calibration`]): The examples.
        hidden_cache_bytes (`int`, defaults to 4 GiB): Bound for hidden states and KV entries in this process.
        journal ([`SearchJournal`], *optional*): Where energies are written, and known ones come from.
        hidden_cache_dtype (`torch.dtype`, *optional*): See [`IncrementalForward`].
        merged_pairs ([`MergedPairs`], *optional*): What merged blocks do.
        adapters (`Mapping[str, str]`, *optional*): Adapter that a stage applies, by the stage's name. Default: none.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        hidden_cache_bytes: int = 4 << 30,
        journal: SearchJournal | None = None,
        hidden_cache_dtype: torch.dtype | None = None,
        merged_pairs: MergedPairs | None = None,
        adapters: Mapping[str, str] | None = None,
    ):
        self.model = model
        self.calibration = calibration
        self.dense_plan = PruningPlan.empty(model)
        self.journal = SearchJournal(None, calibration.round_digest) if journal is None else journal
        self.cost = SearchCost()
        self.forward = IncrementalForward(
            model, calibration, hidden_cache_bytes, hidden_cache_dtype, merged_pairs, adapters
        )
        self.total_blocks = self.forward.total_blocks
        self._reference: PruningPlan | None = None
        self._states: list[BatchState | None] = [None] * len(calibration)
        self._candidate: tuple[PruningPlan, dict[int, BatchState]] | None = None
        # What the states are of, batch by batch, and on which the candidate was measured: as they are where nothing
        # comes from a journal, so that a resumed search counts the same cost.
        self._plan_of_state: list[PruningPlan | None] = [None] * calibration.num_rounds
        self._candidate_rounds: tuple[PruningPlan | None, set[int]] = (None, set())
        batches = list(calibration.batches)
        self._prompt_tokens = self._per_round([int(b["prompt_mask"].sum()) for b in batches])
        self._decode_tokens = self._per_round([int(b["completion_mask"][:, :-1].sum()) for b in batches])
        self._counts = self._per_round([int((b["labels"] != -100).sum()) for b in batches])
        self._rounds = calibration.num_rounds
        self._num_tokens = calibration.num_completion_tokens
        self._confidence: float | None = None
        # By plan digest, the KL sum of each batch so far. The dense plan's are known.
        self._sums: dict[str, list[float]] = {self.dense_plan.digest: [0.0] * calibration.num_rounds}

    # Energies

    def energy(self, plan: PruningPlan, limit: float = math.inf) -> float:
        """
        Mean KL per completion token in nats, or infinity as soon as it is certain to be above `limit`.

        Args:
            plan ([`PruningPlan`]): The plan.
            limit (`float`, *optional*): What the caller could still accept.
        """
        while (bound := self.lower_bound(plan)) <= limit and not self.is_known(plan):
            self._advance(plan)
        return bound if bound <= limit else math.inf

    def best_of(
        self,
        plans: Sequence[PruningPlan],
        on_progress: Callable[[int], Any] | None = None,
        expected: Sequence[float] | None = None,
    ) -> tuple[PruningPlan, float]:
        """
        The plan with the least energy, and that energy.

        It always goes on with the plan whose energy may be least by what is known so far: a plan is then never
        measured on a batch beyond what is needed to see that it is worse than the best.

        Args:
            plans (`Sequence[PruningPlan]`): At least one. Among equals the first wins.
            on_progress (`Callable`, *optional*): Called with 0 after every batch, as the `update` of a progress bar.
            expected (`Sequence[float]`, *optional*): For each plan an energy that it is not expected to be below. As
                long as others may be below that, it is not measured.
        """

        def bound(index: int) -> float:
            if expected is not None and not self._sums.get(plans[index].digest):
                return expected[index]
            return self.lower_bound(plans[index])

        heap = [(bound(index), index) for index in range(len(plans))]
        heapq.heapify(heap)
        while True:
            least, index = heap[0]
            if self.is_known(plans[index]):
                return plans[index], least
            self._advance(plans[index])
            heapq.heapreplace(heap, (bound(index), index))
            if on_progress is not None:
                on_progress(0)

    def is_known(self, plan: PruningPlan) -> bool:
        """Whether the plan has been measured on all batches (of the part, within [`estimating`])."""
        return len(self._sums.get(plan.digest, ())) >= self._rounds

    @contextmanager
    def estimating(self, share: float, confidence: float | None) -> Iterator[None]:
        """
        Within this context energies are means over the first batches, which tell most for what they cost, and plans
        are given up by a guess of what their energy will be. A plan may so be given up wrongly; an energy that is
        returned is always that of all batches of the part. What is measured counts afterwards, when the other batches
        are measured too.

        The guess is the reference's energy plus the mean difference on the batches that a plan has been measured on:
        two plans' losses go up and down together, so their difference is known after a few batches where the losses
        themselves are not.

        Args:
            share (`float`): Share of the completion tokens up to which batches are taken.
            confidence (`float`, *optional*): A plan is given up where even the guess less so many standard errors
                passes the limit. `None`: only where it is certain.
        """
        before = self._rounds, self._num_tokens, self._confidence
        wanted, self._rounds, self._num_tokens = share * self.calibration.num_completion_tokens, 0, 0
        self._confidence = confidence
        for count in self._counts:
            if self._num_tokens >= wanted:
                break
            self._rounds, self._num_tokens = self._rounds + 1, self._num_tokens + count
        try:
            yield
        finally:
            self._rounds, self._num_tokens, self._confidence = before

    def is_above(self, plan: PruningPlan, limit: float) -> bool:
        """Whether the plan is given up at this `limit` by what is known of it so far."""
        return self.lower_bound(plan) > limit

    def accept(self, plan: PruningPlan) -> None:
        """Makes `plan` the reference from which others are computed. Its states are computed when they are needed."""
        if self._candidate is not None and self._candidate[0] == plan:
            for index, state in self._candidate[1].items():
                self._states[index] = state
        if self._candidate_rounds[0] == plan:
            for index in self._candidate_rounds[1]:
                self._plan_of_state[index] = plan
        self._reference, self._candidate, self._candidate_rounds = plan, None, (None, set())

    def forget(self) -> None:
        """Frees all hidden states and KV entries; energies stay known."""
        self._reference, self._candidate, self._candidate_rounds = None, None, (None, set())
        self._states = [None] * len(self._states)
        self._plan_of_state = [None] * len(self._plan_of_state)

    @property
    def dense_block_tokens(self) -> int:
        """Block forwards x tokens of one dense forward over the calibration set."""
        return self.plain_block_tokens(self.dense_plan)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the hidden states and KV entries that are kept for one plan in this process, at most."""
        return self.forward.state_nbytes

    def lower_bound(self, plan: PruningPlan) -> float:
        """The energy where all batches are measured, and else what it is at least (or `confidence` says)."""
        sums, total = self._sums.get(plan.digest, [])[: self._rounds], self._num_tokens
        certain = math.fsum(sums) / total
        known = self._sums.get("" if self._reference is None else self._reference.digest, [])[: self._rounds]
        sampled = len(sums)
        enough = len(known) == self._rounds and _FEWEST_SAMPLED <= sampled < self._rounds
        if self._confidence is None or not enough or math.isinf(certain):
            return certain
        # Ratio estimator of the difference per token, with the correction for a finite number of batches.
        counts = self._counts[:sampled]
        differences = [own - other for own, other in zip(sums, known, strict=False)]
        mean = math.fsum(differences) / math.fsum(counts)
        squares = math.fsum((d - mean * count) ** 2 for d, count in zip(differences, counts, strict=True))
        left = 1 - math.fsum(counts) / total
        error = math.sqrt(left * squares * sampled / (sampled - 1)) / math.fsum(counts)
        return max(certain, math.fsum(known) / total + mean - self._confidence * error)

    def plain_block_tokens(self, plan: PruningPlan) -> int:
        """Block forwards x tokens of `plan` on all batches, from block 0 to the end."""
        prefill, decode = len(plan.kept_blocks("prefill")), len(plan.kept_blocks("decode"))
        return prefill * sum(self._prompt_tokens) + decode * sum(self._decode_tokens)

    def _advance(self, plan: PruningPlan) -> None:
        """Measures `plan` on the next batch."""
        digest = plan.digest
        sums = self._sums.setdefault(digest, [])
        index = len(sums)
        if not sums:
            self.cost.evaluations += 1
            self.cost.plain_block_tokens += self.plain_block_tokens(plan)
        self._count_cost(plan, index)
        if (kl_sum := self.journal.get(digest, index)) is None:
            kl_sum = self._measure(plan, index)
            self.journal.add(digest, index, kl_sum)
        sums.append(kl_sum)

    def _count_cost(self, plan: PruningPlan, index: int) -> None:
        """Adds what measuring `plan` on batch `index` costs, also where it comes from the journal."""
        reference, there = self._reference, self._plan_of_state[index]
        if reference is not None and self.forward.recorded_blocks:
            if there != reference:
                self.cost.reference_block_tokens += self._block_tokens(reference, there, index)
            self._plan_of_state[index] = there = reference
        self.cost.block_tokens += self._block_tokens(plan, there, index)
        if self._candidate_rounds[0] != plan:
            self._candidate_rounds = (plan, set())
        self._candidate_rounds[1].add(index)

    def _block_tokens(self, plan: PruningPlan, base: PruningPlan | None, index: int) -> int:
        """Block forwards x tokens of `plan` on batch `index`, given the state of `base`."""
        prefill_start, decode_start = self.forward.starts(plan, base)
        prefill, decode = plan.kept_blocks("prefill"), plan.kept_blocks("decode")
        prefill_blocks = 0 if prefill_start is None else sum(block >= prefill_start for block in prefill)
        decode_blocks = sum(block >= decode_start for block in decode)
        return prefill_blocks * self._prompt_tokens[index] + decode_blocks * self._decode_tokens[index]

    def _measure(self, plan: PruningPlan, index: int) -> float:
        """
        Sum of KL of `plan` on every process's batch `index`. Its state is kept, in case it is accepted, until another
        plan is measured.
        """
        kl_sum = 0.0
        if index < len(self.calibration):
            batch = self.calibration[index]
            with gathering(self.model), evaluating(self.model), active_adapter(self.model, None):
                self._update_reference(index)
                kl_sum, state = self.forward.run(batch, plan, self._states[index], keep=True)
            kl_sum = kl_sum if batch.counts else 0.0
            if state is not None:
                if self._candidate is None or self._candidate[0] != plan:
                    self._candidate = (plan, {})
                self._candidate[1][index] = state
        (kl_sum,) = self._all_reduced([kl_sum])
        if not math.isfinite(kl_sum):
            logger.warning("a plan with non-finite logits counts as infinitely bad: %s", plan.decode.missing_blocks)
            kl_sum = math.inf
        return kl_sum

    def _update_reference(self, index: int) -> None:
        """Brings the state of a batch to the reference plan."""
        state = self._states[index]
        if self._reference is None or not self.forward.recorded_blocks:
            return
        if state is None or state.plan != self._reference:
            batch = self.calibration[index]
            _, self._states[index] = self.forward.run(batch, self._reference, state, keep=True)

    def _per_round(self, values: list[int]) -> list[int]:
        """Sums over all processes, of which some may have one batch less than others."""
        padded = values + [0] * (self.calibration.num_rounds - len(values))
        return [int(value) for value in self._all_reduced(padded)]

    def _all_reduced(self, values: list[float]) -> list[float]:
        if PartialState().num_processes == 1:
            return values
        return reduce(torch.tensor(values, dtype=torch.float64, device=self.calibration.device), "sum").tolist()
