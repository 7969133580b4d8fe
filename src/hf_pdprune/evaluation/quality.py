"""Quality: perplexity, KL to the dense model and top-1 agreement per completion token, as deployed."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from ..inference import DecodeStage, PrefillStage, Stage, dense_forward, disaggregated_forward


# Rows of logits that are turned into float32 log-probabilities at once: 256 x 150k tokens of vocabulary are 150 MB.
_ROWS = 256
Pair = tuple[PrefillStage, DecodeStage]


class QualitySums:
    """
    Sums over completion tokens, from which the metrics are made.

    Args:
        name (`str`): Whose logits these are; errors name it.
    """

    def __init__(self, name: str):
        self.name = name
        self.tokens, self.agreeing = 0, 0
        self.nll, self.kl = 0.0, 0.0

    def update(self, logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Adds some tokens.

        Args:
            logits (`torch.Tensor`): Shape `(num_tokens, vocab_size)`.
            dense_logits (`torch.Tensor`): The dense model's, of the same shape.
            labels (`torch.LongTensor`): The tokens that came, shape `(num_tokens,)`.

        Raises:
            `ValueError`: If logits are not finite.
        """
        for begin in range(0, len(labels), _ROWS):
            rows = slice(begin, begin + _ROWS)
            log_probs = logits[rows].float().log_softmax(dim=-1)
            dense_log_probs = dense_logits[rows].float().log_softmax(dim=-1)
            nll = -log_probs.gather(-1, labels[rows, None]).double().sum().item()
            kl = torch.nn.functional.kl_div(log_probs, dense_log_probs, reduction="none", log_target=True)
            kl = kl.sum(dim=-1).clamp(min=0).double().sum().item()  # below 0 by rounding only
            if not math.isfinite(nll + kl):
                raise ValueError(f"{self.name}: logits hold NaN or infinity (a dtype too narrow for the model?)")
            self.nll, self.kl, self.tokens = self.nll + nll, self.kl + kl, self.tokens + len(log_probs)
            self.agreeing += int((log_probs.argmax(dim=-1) == dense_log_probs.argmax(dim=-1)).sum())

    def result(self) -> dict[str, float | int]:
        """`perplexity`, `kl` (nats per token), `top1_agreement` and `tokens`."""
        return {
            "perplexity": math.exp(min(self.nll / self.tokens, 700)),  # e^709 is the end of floats
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreeing / self.tokens,
            "tokens": self.tokens,
        }


def evaluate_quality(
    prefill: PrefillStage,
    decode: DecodeStage,
    dense_model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    token_aware: bool = True,
) -> dict[str, float | int]:
    """
    Quality of one pair of stages through the disaggregated forward; see [`compare_quality`], which also gives the
    dense model's and runs it once for several pairs.

    Returns:
        `dict`: `perplexity`, `kl` (KL(dense || pair) in nats), `top1_agreement`, all per completion token, and
        `tokens`, their number.
    """
    return compare_quality(dense_model, {"pruned": (prefill, decode)}, batches, token_aware)["pruned"]


@torch.no_grad()
def compare_quality(
    dense_model: nn.Module,
    pairs: Mapping[str, Pair],
    batches: Iterable[Mapping[str, torch.Tensor]],
    token_aware: bool = True,
) -> dict[str, dict[str, float | int]]:
    """
    Quality of the dense model and of pairs of stages on the same text, one batch at a time.

    Args:
        dense_model (`nn.Module`): The dense model, with adapters or not (they do not apply).
        pairs (`Mapping[str, tuple[PrefillStage, DecodeStage]]`): Pairs by name: checkpoints, or views of a model.
        batches (`Iterable[Mapping]`): As [`PromptCompletionCollator`] makes them; labels of -100 do not count.
        token_aware (`bool`, defaults to `True`): Whether decode gets only the KV entries that the plan sends it;
            `False` hands over those of every prompt token.

    Returns:
        `dict[str, dict]`: For `"dense"` and each pair `perplexity`, `kl` (nats), `top1_agreement`, all per completion
        token, and `tokens`, their number.

    Raises:
        `ValueError`: If there is no completion token, or if logits are not finite.
    """
    if "dense" in pairs:
        raise ValueError("'dense' is the dense model's name; call the pair otherwise")
    if not token_aware:
        pairs = {name: tuple(map(handing_over_all_tokens, pair)) for name, pair in pairs.items()}
    sums = {name: QualitySums(name) for name in ("dense", *pairs)}
    models = {id(m): m for m in (dense_model, *(stage.model for pair in pairs.values() for stage in pair))}
    training = [(model, model.training) for model in models.values()]
    device = dense_model.get_input_embeddings().weight.device
    try:
        for model, _ in training:
            model.eval()
        for batch in tqdm(batches, desc="Quality" if token_aware else "Quality, all tokens", unit="batch"):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            mask = batch["labels"] != -100
            labels, dense_logits = batch["labels"][mask], dense_forward(dense_model, batch)[mask]
            sums["dense"].update(dense_logits, dense_logits, labels)
            for name, pair in pairs.items():
                sums[name].update(disaggregated_forward(*pair, batch)[mask].to(device), dense_logits, labels)
    finally:
        for model, was_training in training:
            model.train(was_training)
    if not sums["dense"].tokens:
        raise ValueError("there is no completion token to evaluate on")
    return {name: part.result() for name, part in sums.items()}


def handing_over_all_tokens(stage: Stage) -> Stage:
    """The same stage by a plan without token-aware blocks; the weights are shared."""
    plan = replace(stage.plan, kv=replace(stage.plan.kv, token_aware_blocks=()))
    model = stage.model
    module = None if stage.module is model else stage.module
    if getattr(model.config, "pdprune", None) is not None:
        # A stage checkpoint says in its config by which plan it was made: a shallow copy says otherwise.
        model = copy.copy(model)
        model.config = copy.deepcopy(model.config)
        model.config.pdprune = plan.config_entry(stage.name, stage.fingerprint)
    return type(stage)(model, plan, stage.adapter, module)
