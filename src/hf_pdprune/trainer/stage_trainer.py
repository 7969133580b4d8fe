"""StageTrainer: SFTTrainer on the disaggregated forward, from rows to metrics."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from trl import SFTTrainer

from ..data import PromptCompletionCollator
from ..data.prompt_completion import IGNORED_LABEL
from ..inference import DecodeStage, PrefillStage
from ..shortened_config import context_length
from .dense_config import kept_config
from .distillation_step import DistillationStep, call_inside
from .pdprune_config import PDPruneConfig
from .training_checkpoint import DivergenceError
from .training_data import check_prepared_rows, check_whole_rows
from .training_metrics import TrainingMetrics


class StageTrainer(SFTTrainer):
    """
    Trainer of both stages against the dense model: rows become prompt and completion, the loss is that of a
    [`DistillationStep`], and each stage has metrics of its own. What the stages are is left to its subclass.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What learns.
        args ([`PDPruneConfig`]): The options.
        kwargs: As for `SFTTrainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel, args: PDPruneConfig, **kwargs: Any):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported: the loss is that of the options, see PDPruneConfig")
        if kwargs.pop("data_collator", None) is not None:
            raise ValueError("data_collator is not supported: rows are cut by PromptCompletionCollator")
        context = context_length(model.config)
        if context is not None:  # rows are cut to max_length, which no model can exceed
            args.max_length = min(args.max_length or context, context)
        with kept_config(model):  # without a data_collator, SFTTrainer sees to the padding token
            super().__init__(model=model, args=args, data_collator=None, **kwargs)
        # All processes have to run decode equally often, also one whose completions have a single token.
        least = 2 if args.world_size > 1 else 1
        self.data_collator = PromptCompletionCollator(
            self._tokenizer.pad_token_id, args.seed, least, args.first_token, args.pad_to_multiple_of
        )
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, dataset in {"train_dataset": self.train_dataset, **evaluated}.items():
            check_prepared_rows(dataset, name, context, args.max_length)
        self._loss_shifts_labels = False  # the collator's labels are aligned with the logits
        self._loss_of_step: torch.Tensor | float = 0.0  # of this process
        self._sums = {"train": TrainingMetrics(), "eval": TrainingMetrics()}

    @abstractmethod
    def stages(self, token_aware: bool = True) -> tuple[PrefillStage, DecodeStage]:
        """Both stages as they are at this step."""

    @abstractmethod
    def _distillation_step(self) -> DistillationStep:
        """What runs on a batch at this step."""

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: PDPruneConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        whole = copy.copy(args)  # at first nothing is cut, nor left out: SFTTrainer would not say so
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        check_whole_rows(dataset, f"{dataset_name}_dataset", args.max_length, args.truncation_mode, packing)
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)
        if not packing:
            return dataset
        with args.main_process_first(desc=f"{dataset_name}_dataset"):
            return dataset.filter(_can_be_trained_on)  # joined text is cut anywhere

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, CausalLMOutput]:
        """
        Mean loss per completion token. With `return_outputs`, `logits[:, i]` are those that predict `labels[:, i]`
        (already aligned).
        """
        inside = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():  # accelerate's own is within the forward in whose place the step runs
            output = call_inside(model, inside, self._distillation_step(), inputs, return_logits=return_outputs)
        count = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = output.loss / torch.as_tensor(count, device=output.loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        self._sums["train" if self.model.training else "eval"].add(output, inputs)
        if not return_outputs:
            return loss
        logits = output.student_logits
        if "teacher" in self.args.include_for_metrics:
            logits = (logits, output.teacher_logits)
        return loss, CausalLMOutput(loss=loss, logits=logits)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._loss_of_step = self._loss_of_step + loss
        if self.accelerator.sync_gradients:
            # No process may go on alone, where the others' gradients will never come.
            total, self._loss_of_step = reduce(self._loss_of_step, "sum"), 0.0
            if not torch.isfinite(total):
                step = self.state.global_step + 1
                raise DivergenceError(f"the loss is {total.item()}", step, self.args.output_dir)
        return loss

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        """What both stages have done since this was asked last; all processes have to ask."""
        metrics = self._sums[mode].pop()
        if metrics:
            if not self.args.hidden_matching_weight:
                del metrics["hidden_loss"]
            metrics |= {f"{stage.name}_blocks": len(stage.running_blocks) for stage in self.stages()}
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and (metrics := self._pop_metrics("train")):
            self._total_train_tokens += metrics.pop("read_tokens")
            metrics["num_tokens"] = self._total_train_tokens
            for name, value in metrics.items():  # SFTTrainer adds these to logs
                self._metrics["train"][name] = [value]
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._sums["eval"] = TrainingMetrics()  # an evaluation before may have been cut short
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._pop_metrics("eval")
        metrics.pop("read_tokens", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        if not self._skip_prepare_dataset:
            args = copy.copy(self.args)
            args.shuffle_dataset = False  # predictions are in the order of the rows, and one each
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, args, False, self._formatting_func, "test"
            )
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        return loss, output.logits, inputs["labels"]


def _can_be_trained_on(row: dict[str, Any]) -> bool:
    """Whether a row of joined text has a completion token, and one before it."""
    return len(row["labels"]) > 1 and any(label != IGNORED_LABEL for label in row["labels"])
