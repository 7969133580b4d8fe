"""Quality: perplexity, KL to the dense model and top-1 agreement per completion token, as deployed."""

import copy
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from ..inference import DecodeStage, PrefillStage, Stage, dense_forward, disaggregated_forward
from .token_statistics import token_statistics


Pair = tuple[PrefillStage, DecodeStage]


class QualitySums:
    """
    Sums over completion tokens, from which the metrics are made.

    Args:
        name (`str`): Whose logits these are; errors name it.
    """

    def __init__(self, name: str):
        self.name = name
        self.tokens, self.first_tokens = 0, 0
        self.nll, self.kl, self.first_kl, self.agreeing = 0.0, 0.0, 0.0, 0.0
        self.kl_of_examples: list[float] = []

    def update(
        self, logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor, is_first: torch.Tensor
    ) -> None:
        """
        Adds some tokens.

        Args:
            logits (`torch.Tensor`): Shape `(num_tokens, vocab_size)`.
            dense_logits (`torch.Tensor`): The dense model's, of the same shape.
            labels (`torch.LongTensor`): The tokens that came, shape `(num_tokens,)`.
            is_first (`torch.BoolTensor`): Which of them are the first of their completion.

        Raises:
            `ValueError`: If logits are not finite.
        """
        try:
            per_token = token_statistics(logits, labels, dense_logits)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self.tokens += len(labels)
        self.nll += float(per_token.nll.sum())
        self.kl += float(per_token.kl.sum())
        self.agreeing += float(per_token.agrees.sum())
        is_first = is_first.cpu()
        self.first_tokens += int(is_first.sum())
        self.first_kl += float(per_token.kl[is_first].sum())
        # Tokens come example by example, each beginning with its first one.
        examples = per_token.kl.tensor_split(is_first.nonzero()[1:, 0])
        self.kl_of_examples += [float(example.mean()) for example in examples if len(example)]

    def result(self) -> dict[str, float | int]:
        """
        `perplexity`, `kl` (nats per token), `top1_agreement`, `tokens`; `kl_prefill` of the first tokens, which
        prefill predicts unless they are left to decode, and `kl_decode` of the others; and from two examples on
        `kl_stderr`, the standard error of the KL over examples (tokens of one are not independent).
        """
        result = {
            "perplexity": math.exp(min(self.nll / self.tokens, 700)),  # e^709 is the end of floats
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreeing / self.tokens,
            "tokens": self.tokens,
        }
        if len(self.kl_of_examples) > 1:
            result["kl_stderr"] = statistics.stdev(self.kl_of_examples) / math.sqrt(len(self.kl_of_examples))
        if self.first_tokens:
            result["kl_prefill"] = self.first_kl / self.first_tokens
        if self.tokens > self.first_tokens:
            result["kl_decode"] = (self.kl - self.first_kl) / (self.tokens - self.first_tokens)
        return result


def evaluate_quality(
    prefill: PrefillStage,
    decode: DecodeStage,
    dense_model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> dict[str, float | int]:
    """
    Quality of one pair of stages through the disaggregated forward; see [`compare_quality`], which also gives the
    dense model's and runs it once for several pairs.

    Returns:
        `dict`: `perplexity`, `kl` (KL(dense || pair) in nats), `top1_agreement`, all per completion token, and
        `tokens`, their number.
    """
    return compare_quality(dense_model, {"pruned": (prefill, decode)}, batches)["pruned"]


@torch.no_grad()
def compare_quality(
    dense_model: nn.Module,
    pairs: Mapping[str, Pair],
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> dict[str, dict[str, float | int]]:
    """
    Quality of the dense model and of pairs of stages on the same text, one batch at a time.

    Args:
        dense_model (`nn.Module`): The dense model, with adapters or not (they do not apply).
        pairs (`Mapping[str, tuple[PrefillStage, DecodeStage]]`): Pairs by name: checkpoints, or views of a model.
        batches (`Iterable[Mapping]`): As [`PromptCompletionCollator`] makes them; labels of -100 do not count.

    Returns:
        `dict[str, dict]`: For `"dense"` and each pair `perplexity`, `kl` (nats), `top1_agreement`, all per completion
        token, and `tokens`, their number; `kl_prefill` of the first completion tokens, `kl_decode` of the others (see
        [`QualitySums.result`]); `kl_stderr` over examples.

    Raises:
        `ValueError`: If there is no completion token, or if logits are not finite.
    """
    if "dense" in pairs:
        raise ValueError("'dense' is the dense model's name; call the pair otherwise")
    sums = {name: QualitySums(name) for name in ("dense", *pairs)}
    models = {id(m): m for m in (dense_model, *(stage.model for pair in pairs.values() for stage in pair))}
    training = [(model, model.training) for model in models.values()]
    device = dense_model.get_input_embeddings().weight.device
    try:
        for model, _ in training:
            model.eval()
        for batch in tqdm(batches, desc="Quality", unit="batch"):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            mask = batch["labels"] != -100
            labels, dense_logits = batch["labels"][mask], dense_forward(dense_model, batch)[mask]
            is_first = (mask.cumsum(dim=1) == 1)[mask]
            sums["dense"].update(dense_logits, dense_logits, labels, is_first)
            for name, pair in pairs.items():
                logits = disaggregated_forward(*pair, batch)[mask].to(device)
                sums[name].update(logits, dense_logits, labels, is_first)
    finally:
        for model, was_training in training:
            model.train(was_training)
    if not sums["dense"].tokens:
        raise ValueError("there is no completion token to evaluate on")
    return {name: part.result() for name, part in sums.items()}


def compare_hand_overs(
    dense_model: nn.Module, pairs: Mapping[str, Pair], batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[dict[str, dict[str, float | int]], dict[str, dict[str, float | int]]]:
    """
    Quality as [`compare_quality`] gives it, with the KV entries that the plan hands over and with those of all prompt
    tokens; the dense model reads the text once for both.

    Args:
        dense_model (`nn.Module`): The dense model.
        pairs (`Mapping[str, tuple[PrefillStage, DecodeStage]]`): Pairs by name.
        batches (`Iterable[Mapping]`): As for [`compare_quality`].

    Returns:
        `tuple[dict, dict]`: By the plan, and with all tokens; each with `"dense"` and the names of the pairs.
    """
    all_tokens = {f"{name}, all tokens": tuple(map(handing_over_all_tokens, pair)) for name, pair in pairs.items()}
    quality = compare_quality(dense_model, {**pairs, **all_tokens}, batches)
    names = ("dense", *pairs)
    return (
        {name: quality[name] for name in names},
        {name: quality[key] for name, key in zip(names, ("dense", *all_tokens), strict=True)},
    )


def handing_over_all_tokens(stage: Stage) -> Stage:
    """The same stage by a plan without token-aware blocks; the weights are shared."""
    same = copy.copy(stage)  # with what else it was made with: adapter, quantisation
    same.plan = replace(stage.plan, kv=stage.plan.kv.with_windows({}))
    if getattr(stage.model.config, "pdprune", None) is not None:
        # A stage checkpoint says in its config by which plan it was made: a shallow copy says otherwise.
        same.model = copy.copy(stage.model)
        same.model.config = copy.deepcopy(stage.model.config)
        same.model.config.pdprune = same.plan.config_entry(stage.name, stage.fingerprint)
        if stage.module is stage.model:
            same.module = same.model
    return same
