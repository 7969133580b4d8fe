"""PDPruneTrainer: removes blocks from both stages and distils them through the disaggregated forward."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..adapters import adapter_parameters
from ..hub import push_stages_to_hub
from ..inference import DecodeStage, PrefillStage
from ..plan import PruningPlan
from ..spread_weights import is_partitioned
from .adapted_model import add_adapters, learning_copy
from .callbacks import BlockRemovalCallback
from .dense_model import load_dense_model, load_tokenizer
from .distillation_step import DistillationStep
from .hidden_matching import HiddenMatching
from .learned_stages import export_learned_stages, shared_fingerprint
from .local_distillation import LocalDistillation
from .pdprune_config import PDPruneConfig
from .round_search import RoundSearch, round_examples
from .sharding import check_sharding, is_sharded
from .stage_adapters import STAGE_ADAPTERS
from .stage_trainer import StageTrainer
from .training_checkpoint import DivergenceError, begin_checkpoint, last_complete_checkpoint, load_adapters
from .whole_weights import whole_copy, whole_weights


logger = logging.getLogger(__name__)


class PDPruneTrainer(StageTrainer):
    """
    Trainer that removes a plan's blocks and distils what is left from the dense model (arXiv 2509.04467), through the
    disaggregated forward: what is optimised is what is deployed. There is one copy of the dense weights; each stage
    has a LoRA adapter of its own, and the teacher is the same model without adapters and with all blocks.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The dense model, its id or
            its folder. Adapters of an earlier training that it has go on from where they are, but for layers that were
            fitted in closed form (see `train_fitted_layers`).
        plan ([`PruningPlan`] or `str`): The plan, or the folder or repo where it is.
        args ([`PDPruneConfig`], *optional*): The options.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Any that `SFTTrainer` takes. Plain text
            is cut into prompt and completion (see [`PromptCompletionCollator`]).
        eval_dataset (*optional*): As for `SFTTrainer`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer. Default: the model's.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapter of each stage. Default: LoRA on all linear layers of
            the blocks that the stage keeps.
        kwargs: As for `SFTTrainer` (`callbacks`, `optimizers`, `compute_metrics`, `formatting_func`,
            `quantization_config` for a model's id, ...). `compute_metrics` gets logits of shape `(batch_size,
            completion_tokens, vocab_size)` and labels that are aligned with them, -100 where there is none; with
            `include_for_metrics=["teacher"]`, those of the stages and of the dense model.

    Raises:
        `ValueError`: If the plan is of another model, or the data cannot be trained on.
    """

    _tag_names = ["hf_pdprune", "pruned", "prefill-decode-disaggregation"]
    _name = "PDPrune"

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PeftModel,
        plan: PruningPlan | str | os.PathLike,
        args: PDPruneConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is not None and not isinstance(args, PDPruneConfig):
            raise TypeError(f"args must be a PDPruneConfig, got {type(args).__name__}")
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a PeftConfig, got {type(peft_config).__name__}")
        args = copy.copy(args or PDPruneConfig("pdprune"))  # the caller's stay as they are
        if args.full_finetuning and peft_config is not None:
            raise ValueError("peft_config has no effect with full_finetuning: all weights of the stage learn")
        plan = plan if isinstance(plan, PruningPlan) else PruningPlan.from_pretrained(plan)
        if isinstance(model, (str, os.PathLike)):
            model = os.fspath(model)
            processing_class = processing_class or load_tokenizer(model, args)
            model = load_dense_model(model, args, kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None
        plan.blocks_of(model.config)  # raises if the plan is of another model
        self.stage_adapters = STAGE_ADAPTERS[args.stage]
        self.removal = BlockRemovalCallback(
            plan,
            args.removal_rounds,
            args.removal_fraction,
            args.removal_fade_steps,
            self._search_round if args.search_in_rounds else None,
        )
        new = [name for name in self.stage_adapters.trained if name not in getattr(model, "peft_config", {})]
        self.local_distillation = LocalDistillation(self.removal.plan_of_round(1), self.stage_adapters, new)
        args.check_plan(plan)
        self._fingerprint, is_loaded_in_parts = shared_fingerprint(model)
        self.dense_model = None  # the model itself, where adapters learn
        torch.manual_seed(args.seed)
        if args.full_finetuning:
            self.dense_model, model = model, learning_copy(model)
            self.dense_model.requires_grad_(False).eval()
        else:
            model = add_adapters(model, plan, args, peft_config)
            self.local_distillation.recognise(model)
        # transformers' own would leave out the KV cache, see checkpointed_blocks.
        self._checkpoints_blocks, args.activation_checkpointing = bool(args.activation_checkpointing), False
        args.gradient_checkpointing = False
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._stages: tuple[tuple[str, bool], tuple[PrefillStage, DecodeStage]] | None = None
        if self.dense_model is not None:
            self.dense_model.to(self.args.device)
        self._is_sharded = is_sharded(self.accelerator)
        if self._is_sharded:
            check_sharding(self.accelerator, self.model, args, is_loaded_in_parts)
        self.add_callback(self.removal)

    @property
    def plan(self) -> PruningPlan:
        """What is removed in the end."""
        return self.removal.final_plan

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self.removal.load(resume_from_checkpoint)
            self.local_distillation.load(resume_from_checkpoint)
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
            if state.global_step >= steps:  # Trainer would do one step more
                logger.warning(
                    f"{resume_from_checkpoint} is a checkpoint of step {state.global_step}, and training has {steps} "
                    "steps in all: there is nothing left to do"
                )
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                self.removal.move_to(state.global_step, state.max_steps)
                return TrainOutput(state.global_step, 0.0, {})
            if self.is_deepspeed_enabled and isinstance(self.model, PeftModel) and not is_partitioned(self.model):
                # DeepSpeed's own files, which Trainer resumes from, leave out fitted layers: they do not learn.
                self._load_from_checkpoint(resume_from_checkpoint)
        else:
            self.removal.begin_training()
        if self.args.search_in_rounds:
            count, collator = self.args.round_search_examples, self.data_collator
            self._round_examples = round_examples(self.train_dataset, count, collator)
        self._distil_locally()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.removal.move_to(self.state.global_step, self.state.max_steps)
        return result

    def _distil_locally(self) -> None:
        """Starts new adapters from a fit in closed form; what was fitted is not trained on."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        if args.local_distillation_tokens and not args.full_finetuning:
            if all(isinstance(model.peft_config[name], LoraConfig) for name in self.stage_adapters.trained):
                self.local_distillation.fit(model, self.train_dataset, args.local_distillation_tokens)
        if not args.train_fitted_layers:
            self.local_distillation.freeze(model)

    def _search_round(self, plan: PruningPlan, target: PruningPlan) -> PruningPlan:
        """The plan of the next round, chosen with what the adapters have learned (see [`RoundSearch`])."""
        model, batch_size = self.accelerator.unwrap_model(self.model), self.args.per_device_eval_batch_size
        adapters = self.stage_adapters.of_model(model)
        return RoundSearch(model, adapters, self._round_examples, self.data_collator, batch_size)(plan, target)

    def stages(self, token_aware: bool = True) -> tuple[PrefillStage, DecodeStage]:
        """
        Both stages as they are at this step, as views of the model.

        Args:
            token_aware (`bool`, defaults to `True`): Whether decode gets only what the plan sends.
        """
        plan = self.removal.current_plan
        key = (plan.digest, token_aware)
        if self._stages is None or self._stages[0] != key:
            if not token_aware:
                plan = replace(plan, kv=plan.kv.with_windows({}))
            learning = self.accelerator.unwrap_model(self.model)
            adapters = self.stage_adapters.of_model(learning)
            stages = []
            for stage in (PrefillStage, DecodeStage):
                learns = getattr(self.stage_adapters, stage.name) in self.stage_adapters.trained
                model = learning if learns or self.dense_model is None else self.dense_model
                stages.append(stage(model, plan, adapters.get(stage.name), fingerprint=self._fingerprint))
            self._stages = (key, tuple(stages))
        return self._stages[1]

    def _distillation_step(self) -> DistillationStep:
        args, plan = self.args, self.removal.current_plan
        prefill, decode = self.stages(args.token_aware_distillation)
        return DistillationStep(
            dense=self.dense_model or self.accelerator.unwrap_model(self.model),
            prefill=prefill,
            decode=decode,
            losses=args.token_losses(),
            matching=HiddenMatching(plan, args.hidden_matching_blocks) if args.hidden_matching_weight else None,
            matching_weight=args.hidden_matching_weight,
            scales=self.removal.scales,
            checkpoints_blocks=self._checkpoints_blocks,
            num_chunks=self._most_chunks if self._is_sharded else None,
        )

    def _most_chunks(self, number: int) -> int:
        """The largest number of chunks in any process: a partitioned LM head is gathered by all of them."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        learning = (p for p in self.model.parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in learning):
            what = "weights are no numbers any more"
            raise DivergenceError(what, self.state.global_step + 1, self.args.output_dir)
        if self.args.should_save:
            begin_checkpoint(os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self._is_sharded and self.is_deepspeed_enabled:
            # With ZeRO-3 Trainer leaves out what is frozen: fitted layers, and the adapter of a stage that stays.
            state_dict = dict(state_dict or {})
            for adapter in self.model.peft_config:
                for name, parameter in adapter_parameters(self.model, adapter).items():
                    if not parameter.requires_grad:
                        state_dict[name] = whole_copy(parameter, self.args.should_save)
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next, by which a checkpoint is complete.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):  # Trainer would freeze all adapters but the first
            load_adapters(resume_from_checkpoint, self.model, self.stage_adapters.trained)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or not isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:  # Trainer looks for an adapter without a name
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Writes the stages as checkpoints of their own, `<output_dir>/prefill` and `<output_dir>/decode`, or with
        `stage="unified"` the one that serves both, `<output_dir>/unified`. The checkpoints that training itself writes
        hold the adapters and the plan, not the dense weights (but with `full_finetuning`, the weights that learn).
        With the option `push_to_hub`, the stages go to the Hub, too.
        """
        output_dir = output_dir or self.args.output_dir
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self.plan.save_pretrained(output_dir)
                self.removal.save(output_dir)
                self.local_distillation.save(output_dir)
            return
        self._export(output_dir)
        if self.args.push_to_hub:
            self._push(output_dir, "Model save")

    def _export(self, output_dir: str) -> None:
        if self.state.global_step > 0 and not self.removal.is_complete:
            logger.warning("training ended before all blocks were removed; the saved stages lack all of them")
        with whole_weights(self.accelerator.unwrap_model(self.model), self.args.should_save):
            if self.args.should_save:
                export_learned_stages(
                    self.stages(), self.plan, output_dir, self.stage_adapters.layout, self.processing_class
                )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes none: the stages have repositories of their own, which are made when they are pushed."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> dict[str, str] | None:
        """
        Exports the stages to `output_dir` and puts them on the Hub under `hub_model_id` (default: the folder's name);
        see [`push_stages_to_hub`], which takes `kwargs`, too (`dataset_name`, `subfolders`, `collection`).

        Raises:
            `ValueError`: If `blocking=False`: an export must not change while it is uploaded.
        """
        if not blocking:
            raise ValueError("push_to_hub of PDPruneTrainer has no blocking=False")
        self._export(self.args.output_dir)
        given = {"token": token, "revision": revision, "private": private}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        return self._push(self.args.output_dir, commit_message, tags=tags, **kwargs)

    def _push(self, folder: str, commit_message: str | None, **kwargs: Any) -> dict[str, str] | None:
        """Puts an export on the Hub; `kwargs` come before what the options say."""
        args = self.args
        if not args.should_save:
            return None
        options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
        name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
        return push_stages_to_hub(folder, name, commit_message=commit_message, **options | kwargs)
