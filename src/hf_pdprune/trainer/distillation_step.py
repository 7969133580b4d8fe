"""DistillationStep: one forward of teacher and stages, down to the loss."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from ..inference.stage import Stage
from .block_checkpointing import checkpointed_blocks
from .decoder_forward import DecoderForward
from .hidden_matching import HiddenMatching
from .lm_head import LMHead
from .token_losses import TokenLosses


class StepOutput(NamedTuple):
    """
    What a forward gives.

    Args:
        loss (`torch.Tensor`): Sum of the loss over completion tokens with a label, a scalar.
        sums (`torch.Tensor`): Of prefill and of decode: the sums of KL, of the labels' negative log-likelihood and of
            agreement, and the number of tokens, shape `(2, 4)`.
        hidden_loss (`torch.Tensor`): The part of `loss` that hidden-state matching has.
        student_logits (`torch.Tensor`, *optional*): Shape `(batch_size, completion_tokens, vocab_size)`, if asked for.
        teacher_logits (`torch.Tensor`, *optional*): The same of the dense model.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    hidden_loss: torch.Tensor
    student_logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None


@dataclass
class DistillationStep:
    """
    One forward of the dense model and of both stages on a batch, and the loss between them.

    Args:
        dense (`nn.Module`): The dense model, with adapters (which are off) or without.
        prefill ([`PrefillStage`]): The prefill stage as it is now.
        decode ([`DecodeStage`]): The decode stage as it is now.
        losses ([`TokenLosses`]): The loss of completion tokens.
        matching ([`HiddenMatching`], *optional*): Which hidden states are matched.
        matching_weight (`float`): Weight of that loss.
        scales (`Mapping[str, Mapping[int, float]]`): By stage and block, what fading blocks are multiplied with.
        checkpoints_blocks (`bool`): Whether the stages' blocks are computed again in the backward pass.
        num_chunks (`Callable`, *optional*): Makes the number of chunks of this process one that all agree on.
    """

    dense: nn.Module
    prefill: PrefillStage
    decode: DecodeStage
    losses: TokenLosses
    matching: HiddenMatching | None = None
    matching_weight: float = 0.0
    scales: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    checkpoints_blocks: bool = False
    num_chunks: Callable[[int], int] | None = None

    def __call__(self, batch: Mapping[str, torch.Tensor], return_logits: bool = False) -> StepOutput:
        """
        Args:
            batch (`Mapping[str, torch.Tensor]`): As [`PromptCompletionCollator`] makes it.
            return_logits (`bool`, defaults to `False`): Whether the logits of all tokens are made and returned.
        """
        matching = self.matching
        teacher = DecoderForward(self.dense, matching.dense_blocks if matching else ())
        with torch.no_grad(), _eval_mode(self.dense):
            teacher_hidden = dense_forward(self.dense, batch, teacher)
        prefill, decode = self._without_head(self.prefill), self._without_head(self.decode)
        with self._checkpointing():
            student_hidden = disaggregated_forward(prefill, decode, batch)

        labelled = batch["labels"] != -100
        of_decode = torch.ones_like(labelled)
        of_decode[:, 0] = False  # prefill predicts the first completion token
        loss, sums = torch.zeros((), device=student_hidden.device), []
        for stage, mask in ((self.prefill, labelled & ~of_decode), (self.decode, labelled & of_decode)):
            per_token, measures = self.losses(
                LMHead(stage.model),
                LMHead(self.dense),
                student_hidden[mask],
                teacher_hidden[mask],
                batch["labels"][mask],
                self.num_chunks and self.num_chunks(self.losses.num_chunks(int(mask.sum()))),
            )
            loss = loss + per_token.sum()
            sums.append(torch.cat([measures.sum(0), measures.new_full((1,), len(measures))]))
        hidden_loss = torch.zeros_like(loss)
        if matching:
            recorded = (prefill.module.recorded, decode.module.recorded, teacher.recorded)
            hidden_loss = self.matching_weight * matching.loss(*recorded, batch)
            loss = loss + hidden_loss
        logits = (None, None)
        if return_logits:
            first = _logits(self.prefill.model, student_hidden[:, :1])
            rest = _logits(self.decode.model, student_hidden[:, 1:])
            logits = (torch.cat([first, rest], dim=1), _logits(self.dense, teacher_hidden))
        return StepOutput(loss, torch.stack(sums), hidden_loss.detach(), *logits)

    def _without_head(self, stage: Stage) -> Stage:
        """The stage, whose forward ends before the LM head."""
        record = [block for block, _ in getattr(self.matching, stage.name)] if self.matching else ()
        stage = copy.copy(stage)
        stage.module = DecoderForward(stage.model, record, self.scales.get(stage.name))
        return stage

    def _checkpointing(self) -> AbstractContextManager:
        stack = ExitStack()
        if self.checkpoints_blocks:
            for model in {id(stage.model): stage.model for stage in (self.prefill, self.decode)}.values():
                stack.enter_context(checkpointed_blocks(model))
        return stack


@torch.no_grad()
def _logits(model: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return LMHead(model)(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """The teacher predicts without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def call_inside(wrapper: nn.Module, model: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """
    Calls `function` where the forward of `model` would run, inside the forward of what is wrapped around it
    (`DistributedDataParallel`, `DeepSpeedEngine`, hooks of FSDP). To the wrapper all that `function` runs of the model
    is one forward, so that gradients are reduced, and partitioned weights gathered, as for any other training step.

    Args:
        wrapper (`nn.Module`): What is called; `model` itself where nothing is wrapped around it.
        model (`nn.Module`): The model inside.
        function (`Callable`): What runs; it may call `model` and its parts.
        args: For `function`.
        kwargs: For `function`.
    """
    replaced = vars(model).get("forward")

    def restore() -> None:
        if replaced is None:
            vars(model).pop("forward", None)
        else:
            model.forward = replaced

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        return function(*args, **kwargs)

    model.forward = forward
    try:
        return wrapper(*args, **kwargs)
    finally:
        restore()
