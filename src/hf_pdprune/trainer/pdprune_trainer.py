"""PDPruneTrainer: removes blocks from both stages and distils them through the disaggregated forward."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ..adapters import adapter_parameters
from ..blocks import blocks_path
from ..data import PromptCompletionCollator
from ..hub import export_stages, push_stages_to_hub
from ..inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from ..plan import PruningPlan
from .callbacks import BlockRemovalCallback
from .losses import DISTILLATION_LOSSES, mean_over_labels
from .pdprune_config import PDPruneConfig
from .residual_fit import ResidualFit, fitted_layers


STAGES = ("prefill", "decode")


class PDPruneTrainer(SFTTrainer):
    """
    Trainer that removes a plan's blocks and distils what is left from the dense model (arXiv 2509.04467), through the
    disaggregated forward: what is optimised is what is deployed. There is one copy of the dense weights; each stage
    has a LoRA adapter of its own, and the teacher is the same model without adapters and with all blocks.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The dense model, or its id.
        plan ([`PruningPlan`] or `str`): The plan, or the folder or repo where it is.
        args ([`PDPruneConfig`], *optional*): The options.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Any that `SFTTrainer` takes. Plain text
            is cut into prompt and completion (see [`PromptCompletionCollator`]).
        eval_dataset (*optional*): As for `SFTTrainer`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapter of each stage. Default: LoRA on all linear layers of
            the blocks that the stage keeps.
        kwargs: As for `SFTTrainer` (`callbacks`, `optimizers`, `compute_metrics`, ...).

    Raises:
        `ValueError`: If the plan is of another model.
    """

    _tag_names = ["hf_pdprune", "pruned", "prefill-decode-disaggregation"]
    _name = "PDPrune"
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        plan: PruningPlan | str | os.PathLike,
        args: PDPruneConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args or PDPruneConfig("pdprune")
        self.plan = plan if isinstance(plan, PruningPlan) else PruningPlan.from_pretrained(plan)
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = create_model_from_path(model, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        self.plan.blocks_of(model.config)  # raises if the plan is of another model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:  # rows are cut to max_length, which no model can exceed
            args.max_length = min(args.max_length or context, context)
        self.removal = BlockRemovalCallback(self.plan, args.removal_rounds, args.removal_fraction)
        model = self._with_adapters(model, args, peft_config)
        pad_token_id = processing_class.pad_token_id if processing_class is not None else None
        if pad_token_id is None:
            pad_token_id = model.config.get_text_config().eos_token_id or 0
        super().__init__(
            model=model,
            args=args,
            data_collator=PromptCompletionCollator(pad_token_id, seed=args.seed),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._loss_shifts_labels = False  # the collator's labels are aligned with the logits
        self.add_callback(self.removal)

    def _with_adapters(self, model: PreTrainedModel, args: PDPruneConfig, peft_config: PeftConfig | None) -> nn.Module:
        """The model with one adapter per stage, both of which learn."""
        torch.manual_seed(args.seed)
        path = blocks_path(model)
        for stage in STAGES:
            config = copy.deepcopy(peft_config) or LoraConfig(
                r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            missing = self.plan.stage(stage).missing_blocks
            if peft_config is None and args.local_distillation_tokens:
                rank = args.local_distillation_rank or model.config.get_text_config().hidden_size
                fitted = [re.escape(f"{path}.{name}") for name in fitted_layers(model, missing)]
                config.rank_pattern = dict.fromkeys(fitted, rank)
                config.alpha_pattern = dict.fromkeys(fitted, rank * args.lora_alpha / args.lora_rank)  # same scaling
            if peft_config is None and missing:
                numbers = "|".join(map(str, missing))
                config.exclude_modules = rf"{re.escape(path)}\.({numbers})\..*"
            if stage == STAGES[0]:
                model = get_peft_model(model, config, adapter_name=stage)
            else:
                model.add_adapter(stage, config)
        self._train_both_adapters(model)
        return model

    @staticmethod
    def _train_both_adapters(model: nn.Module) -> None:
        for stage in STAGES:
            for parameter in adapter_parameters(model, stage).values():
                parameter.requires_grad_(True)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            steps = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
            if state.global_step >= steps:  # Trainer would do one step more
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        is_lora = all(isinstance(config, LoraConfig) for config in self.model.peft_config.values())
        if is_lora and not resume_from_checkpoint and self.args.local_distillation_tokens:
            self.fit_residuals(self.args.local_distillation_tokens)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def fit_residuals(self, num_tokens: int) -> None:
        """
        Starts both adapters from a fit in closed form (see [`ResidualFit`]).

        Args:
            num_tokens (`int`): Tokens of the training set that are used, in rows of equal length.
        """
        length = min(512, self.args.max_length or 512)
        tokens: list[int] = []
        for row in self.train_dataset:
            tokens += row["input_ids"]
            if len(tokens) >= num_tokens:
                break
        length = min(length, len(tokens))
        rows = torch.tensor(tokens[: min(num_tokens, len(tokens)) // length * length]).view(-1, length)
        model = self.accelerator.unwrap_model(self.model)
        rows = rows.to(model.get_input_embeddings().weight.device)
        fit = ResidualFit(model, rows.split(max(1, 4096 // length)))
        for stage in STAGES:
            fit.fit(self.removal.current_plan.stage(stage).missing_blocks, stage)

    def stages(self, module: nn.Module | None = None, token_aware: bool = True) -> tuple[PrefillStage, DecodeStage]:
        """
        Both stages as they are at this step, as views of the one model.

        Args:
            module (`nn.Module`, *optional*): What is called in a forward, where that wraps the model (DDP).
            token_aware (`bool`, defaults to `True`): Whether decode gets only what the plan sends.
        """
        plan = self.removal.current_plan
        if not token_aware:
            plan = replace(plan, kv=replace(plan.kv, token_aware_blocks=()))
        model = self.accelerator.unwrap_model(self.model)
        return PrefillStage(model, plan, "prefill", module), DecodeStage(model, plan, "decode", module)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, CausalLMOutput]:
        """
        Distillation loss per completion token. With `return_outputs`, `logits[:, i]` are those that predict
        `labels[:, i]` (already aligned).
        """
        mode = "train" if self.model.training else "eval"
        with torch.no_grad(), _eval_mode(self.model):
            teacher = dense_forward(self.accelerator.unwrap_model(self.model), inputs, model)
        prefill, decode = self.stages(model, self.args.token_aware_distillation)
        student = disaggregated_forward(prefill, decode, inputs)
        per_token = DISTILLATION_LOSSES[self.args.distillation_loss](
            student, teacher, self.args.distillation_temperature
        )
        loss = mean_over_labels(per_token, inputs["labels"], num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        self._record_metrics(mode, student, teacher, per_token, inputs)
        return (loss, CausalLMOutput(loss=loss, logits=student)) if return_outputs else loss

    @torch.no_grad()
    def _record_metrics(
        self, mode: str, student: torch.Tensor, teacher: torch.Tensor, per_token: torch.Tensor, inputs: dict
    ) -> None:
        mask = inputs["labels"] != -100
        agreement = (student.argmax(-1) == teacher.argmax(-1))[mask].float()
        sums = torch.stack([per_token.detach()[mask].sum(), agreement.sum(), mask.sum().float()])
        loss, agreeing, tokens = self.accelerator.gather_for_metrics(sums.unsqueeze(0)).sum(0).tolist()
        self._metrics[mode]["distillation_loss"].append(loss / max(tokens, 1))
        self._metrics[mode]["top1_agreement"].append(agreeing / max(tokens, 1))
        for stage in STAGES:
            self._metrics[mode][f"{stage}_blocks"] = [len(self.removal.current_plan.kept_blocks(stage))]
        if mode == "train":
            tokens = (inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()).unsqueeze(0)
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(tokens).sum())
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, output.logits, inputs["labels"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Trainer freezes every adapter but the first when it has loaded several.
        self._train_both_adapters(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Writes the stages as checkpoints of their own, `<output_dir>/prefill` and `<output_dir>/decode`. The
        checkpoints that training itself writes hold the adapters and the plan, not the dense weights.
        """
        output_dir = output_dir or self.args.output_dir
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self.plan.save_pretrained(output_dir)
            return
        if self.args.should_save:
            export_stages(
                self.accelerator.unwrap_model(self.model),
                self.plan,
                output_dir,
                adapters={stage: stage for stage in STAGES},
                tokenizer=self.processing_class,
            )

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> dict[str, str] | None:
        """
        Exports the stages to `output_dir` and puts them on the Hub under `hub_model_id` (default: the folder's name);
        see [`push_stages_to_hub`], which takes `kwargs` (`subfolders`, `collection`).

        Raises:
            `ValueError`: If `blocking=False`: an export must not change while it is uploaded.
        """
        if not blocking:
            raise ValueError("push_to_hub of PDPruneTrainer has no blocking=False")
        self.save_model(self.args.output_dir)
        if not self.args.should_save:
            return None
        return push_stages_to_hub(
            self.args.output_dir,
            self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir)),
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            **kwargs,
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """The teacher predicts without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
