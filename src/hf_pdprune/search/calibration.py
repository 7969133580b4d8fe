"""Calibration: the examples that a search measures on, with what the dense model says about them."""

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import PromptCompletionCollator, tokenize_examples
from ..evaluating import evaluating
from ..fingerprint import model_fingerprint
from ..inference import dense_forward
from ..shortened_config import context_length
from ..spread_weights import gathering, input_device, is_partitioned, whole_embeddings


logger = logging.getLogger(__name__)

# With fewer tokens the energies of two plans differ by chance more than by what the plans do.
MIN_COMPLETION_TOKENS = 64
# So many batches' worth of neighbours by prompt length are sorted once more by completion length, whichever of these
# leaves least padding: for PIQA and MMLU in batches of 4 it falls from 10 to 6 %, in batches of 8 from 20 to 11 %.
_WINDOWS = (1, 2, 4, 8)


@dataclass
class Teacher:
    """
    The dense model's distributions over the next token, of some tokens of a batch.

    Args:
        probabilities (`torch.Tensor`): Shape `(num_tokens, vocab_size)`, in the dtype in which they are kept.
        sums (`torch.Tensor`): Sum of each row after rounding to that dtype, shape `(num_tokens,)`.
        negative_entropies (`torch.Tensor`): Sum of p log p of each rounded and normalised row, shape `(num_tokens,)`.
    """

    probabilities: torch.Tensor
    sums: torch.Tensor
    negative_entropies: torch.Tensor

    @classmethod
    def from_logits(cls, logits: torch.Tensor, dtype: torch.dtype) -> "Teacher":
        probabilities = logits.float().softmax(dim=-1).to(dtype)
        rounded = probabilities.float()
        sums = rounded.sum(dim=-1)
        return cls(probabilities, sums, (torch.xlogy(rounded, rounded).sum(dim=-1) / sums) - sums.log())

    def kl_sum(self, logits: torch.Tensor) -> float:
        """
        Sum over the tokens of KL(teacher || student), in nats and never negative.

        Args:
            logits (`torch.Tensor`): The student's, shape `(num_tokens, vocab_size)`.
        """
        # Probabilities and not their logarithms are kept, so that no exponential is taken again for every candidate:
        # KL = sum(p log p) - sum(p z) + logsumexp(z).
        logits = logits.float()
        logits = logits - logits.amax(dim=-1, keepdim=True)
        cross = (self.probabilities * logits).sum(dim=-1, dtype=torch.float32) / self.sums
        kl = self.negative_entropies - cross + logits.logsumexp(dim=-1)
        return float(kl.double().clamp(min=0).sum())

    @property
    def nbytes(self) -> int:
        tensors = (self.probabilities, self.sums, self.negative_entropies)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class CalibrationBatch:
    """
    One batch and its teacher.

    Args:
        tensors (`dict[str, torch.Tensor]`): As [`PromptCompletionCollator`] makes them.
        first (`Teacher`): For the first completion tokens that prefill predicts, a row each.
        rest (`Teacher`): For the others that have a label, row by row, which decode predicts.
        counts (`bool`, defaults to `True`): Whether it is one of the calibration. A process that has a batch less than
            others runs the model on one that does not count where all have to run it together.
    """

    tensors: dict[str, torch.Tensor]
    first: Teacher
    rest: Teacher
    counts: bool = True

    @property
    def rest_mask(self) -> torch.Tensor:
        """Which of the tokens that decode predicts have a label, shape `(batch_size, completion_tokens - 1)`."""
        return self.tensors["labels"][:, 1:] != -100

    def kl_of_first(self, logits: torch.Tensor) -> float:
        """Sum of the KL of what prefill predicts, from logits of shape `(batch_size, vocab_size)`."""
        return self.first.kl_sum(logits[(self.tensors["labels"][:, 0] != -100).to(logits.device)])

    def kl_of_rest(self, logits: torch.Tensor) -> float:
        """Sum of the KL of the others, from logits of shape `(batch_size, completion_tokens - 1, vocab_size)`."""
        return self.rest.kl_sum(logits[self.rest_mask])


class Calibration:
    """
    The examples that a search measures on, in batches of about equal length, each with the dense model's
    distributions over the completion tokens, computed once. Where several processes run, each holds its share.

    Batches that have many completion tokens for what they cost come first: they tell most about a plan, and a plan
    that they rule out is never measured on the others.

    Memory: `nbytes`, mostly `vocab_size` numbers of `teacher_dtype` per completion token.

    Args:
        model (`nn.Module`): The dense model.
        examples (`Sequence[dict]`): Each with `input_ids` and `labels` (see [`tokenize_examples`]).
        pad_token_id (`int`): Fills up the rows.
        batch_size (`int`, defaults to 8): Examples per batch.
        teacher_dtype (`torch.dtype`, defaults to `torch.float32`): In which probabilities are kept. Half of the memory
            is `torch.bfloat16`; the rounded distribution is normalised, so KL stays a KL.
        name (`str`, *optional*): What the text is, for the plan's provenance.
        first_token (`str`, defaults to `"prefill"`): Which stage predicts the first completion token, see
            [`PromptCompletionCollator`].

    Attributes:
        num_examples (`int`): Examples of all processes.
        num_prompt_tokens (`int`): Their prompt tokens.
        num_completion_tokens (`int`): Their completion tokens.
        longest_prompt (`int`): Tokens of the longest prompt.
        num_rounds (`int`): Batches of the process that has most.
        digest (`str`): Tells calibrations apart whose energies may differ.

    Raises:
        `ValueError`: If there are too few completion tokens, if an example is longer than the model's context, or if
            the dense model's logits are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[dict[str, Any]],
        pad_token_id: int,
        batch_size: int = 8,
        teacher_dtype: torch.dtype = torch.float32,
        name: str = "",
        first_token: str = "prefill",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.name = name
        self.num_examples = len(examples)
        _check_examples(examples, model)
        state = PartialState()
        self.device = input_device(model)
        together = is_partitioned(model) and state.num_processes > 1
        # Then all run decode equally often, also for completions of a single token.
        least = 2 if together else 1
        collator = PromptCompletionCollator(pad_token_id, min_completion_tokens=least, first_token=first_token)
        groups = _group([_lengths(example) for example in examples], batch_size)
        self.num_rounds = math.ceil(len(groups) / state.num_processes)
        own = groups[state.process_index :: state.num_processes]
        fillers = [groups[0][:1]] * (self.num_rounds - len(own) if together else 0)
        shard = [collator([examples[index] for index in group]) for group in (*own, *fillers)]
        self._batches = [self._with_teacher(model, tensors, teacher_dtype) for tensors in self._progress(shard)]
        for batch in self._batches[len(own) :]:
            batch.counts = False
        self._count()
        with whole_embeddings(model):
            self.digest = _digest(examples, groups, model, teacher_dtype, first_token)
        if self.num_completion_tokens < MIN_COMPLETION_TOKENS:
            raise ValueError(
                f"the calibration set has {self.num_completion_tokens} completion tokens in {self.num_examples} "
                f"examples; a search needs at least {MIN_COMPLETION_TOKENS}"
            )
        logger.info(
            "calibration: %d examples, %d prompt and %d completion tokens; the dense model's predictions take %.0f MB",
            self.num_examples,
            self.num_prompt_tokens,
            self.num_completion_tokens,
            self.nbytes / 1e6,
        )

    @classmethod
    def from_rows(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Iterable[dict[str, Any]],
        prompt_tokens: int,
        completion_tokens: int,
        max_examples: int | None = None,
        **kwargs: Any,
    ) -> "Calibration":
        """The calibration made from rows of text; see [`tokenize_examples`] for these, the class for `kwargs`."""
        examples = tokenize_examples(rows, tokenizer, prompt_tokens, completion_tokens, max_examples)
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(model, examples, pad_token_id or 0, **kwargs)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> CalibrationBatch:
        return self._batches[index]

    @property
    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches that count, without the teacher, as [`BlockStatistics.measure`] takes them."""
        return (batch.tensors for batch in self._batches if batch.counts)

    @property
    def round_digest(self) -> str:
        """
        Tells calibrations apart whose sums per round may differ: the digest, and where several processes run their
        number, since a round is then a batch of each.
        """
        processes = PartialState().num_processes
        return self.digest if processes == 1 else f"{self.digest}-{processes}-processes"

    @property
    def nbytes(self) -> int:
        """Bytes that the dense model's predictions take in this process."""
        return sum(batch.first.nbytes + batch.rest.nbytes for batch in self._batches)

    def _progress(self, shard: list[dict[str, torch.Tensor]]) -> Iterable[dict[str, torch.Tensor]]:
        return tqdm(shard, desc="Dense model", unit="batch", disable=not PartialState().is_main_process)

    def _with_teacher(
        self, model: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> CalibrationBatch:
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        with gathering(model), evaluating(model):
            logits = dense_forward(model, tensors)
            mask = tensors["labels"] != -100
            if not bool(torch.isfinite(logits[mask.to(logits.device)]).all()):
                raise ValueError(
                    "the dense model's logits on the calibration set hold NaN or infinity (a dtype too narrow for it?)"
                )
            first = Teacher.from_logits(logits[:, 0][mask[:, 0].to(logits.device)], dtype)
            rest = Teacher.from_logits(logits[:, 1:][mask[:, 1:].to(logits.device)], dtype)
        return CalibrationBatch(tensors, first, rest)

    def _count(self) -> None:
        """Counts the tokens of all processes, of which some may have no batch."""
        own = [
            sum(int(tensors["prompt_mask"].sum()) for tensors in self.batches),
            sum(int((tensors["labels"] != -100).sum()) for tensors in self.batches),
            max((tensors["prompt_ids"].shape[1] for tensors in self.batches), default=0),
        ]
        shares = torch.tensor([own], device=self.device)
        if PartialState().num_processes > 1:
            shares = gather(shares)
        self.num_prompt_tokens, self.num_completion_tokens, _ = shares.sum(dim=0).tolist()
        self.longest_prompt = int(shares[:, 2].max())


def _lengths(example: dict[str, Any]) -> tuple[int, int]:
    """Length of an example's prompt and of its completion."""
    completion = sum(label != -100 for label in example["labels"])
    return len(example["input_ids"]) - completion, completion


def _group(lengths: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Batches of examples, given the lengths of their prompts and completions: little padding, most telling first."""

    def batches(window: int) -> list[list[int]]:
        # Neighbours by prompt length; within a window of these, by completion length.
        order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
        for begin in range(0, len(order), window):
            order[begin : begin + window] = sorted(order[begin : begin + window], key=lambda index: lengths[index][1])
        return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]

    def padded(groups: list[list[int]]) -> int:
        return sum(len(g) * (max(lengths[i][0] for i in g) + max(lengths[i][1] for i in g)) for g in groups)

    groups = min((batches(factor * batch_size) for factor in _WINDOWS), key=padded)
    # Among batches that tell about as much (within a factor of two) chance decides, so that the first ones stand for
    # all of them.
    random.Random(len(lengths)).shuffle(groups)

    def tells(group: list[int]) -> int:
        prompt, completion = (sum(lengths[index][part] for index in group) for part in (0, 1))
        return -math.floor(math.log2(completion / (prompt + completion)))

    return sorted(groups, key=tells)


def _check_examples(examples: Sequence[dict[str, Any]], model: nn.Module) -> None:
    if not examples:
        raise ValueError("the calibration set has no example")
    context = context_length(model.config)
    longest = max(len(example["input_ids"]) for example in examples)
    if context is not None and longest > context:
        raise ValueError(f"a calibration example has {longest} tokens, the model's context is {context}")


def _digest(
    examples: Sequence[dict], groups: list[list[int]], model: nn.Module, dtype: torch.dtype, first_token: str
) -> str:
    """Tells calibrations apart whose energies may differ."""
    rows = [[examples[index]["input_ids"], examples[index]["labels"]] for group in groups for index in group]
    content = [rows, [len(group) for group in groups], model_fingerprint(model), str(dtype), str(model.dtype)]
    content += [] if first_token == "prefill" else [first_token]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
