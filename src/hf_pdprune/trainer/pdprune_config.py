"""PDPruneConfig: the options of PDPruneTrainer."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from ..pair_layout import STAGES, check_first_token
from ..plan import PruningPlan
from .losses import DISTILLATION_LOSSES
from .stage_adapters import STAGE_ADAPTERS
from .token_losses import TokenLosses


_LESS_IS_BETTER = ("kl", "perplexity", "loss")  # ends of metrics' names


@dataclass
class PDPruneConfig(SFTConfig):
    """
    Options of [`PDPruneTrainer`], beside those of [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Some defaults differ from trl's: `learning_rate` is that of LoRA, `activation_checkpointing` is off (it costs a
    second forward of the stages), and `bf16` is on only where the device is good at it (on CPUs without AMX it is 6
    to 30 times slower than float32). `greater_is_better` is `False` by default where `metric_for_best_model` is a KL
    or a perplexity, too. `hub_strategy` is `"end"`: with `push_to_hub`, stages go to the Hub when `save_model` writes
    them; checkpoints stay in `output_dir`.

    Parameters:
        > Parameters that control what is trained

        stage (`str`, *optional*, defaults to `"disaggregated"`):
            What learns: `"disaggregated"` (an adapter for each stage), `"prefill"` or `"decode"` (that one; the other
            stage stays as it is), or `"unified"` (one adapter for both stages, which miss the same blocks).
        full_finetuning (`bool`, *optional*, defaults to `False`):
            Whether all weights of the stage learn instead of an adapter, in a copy of the model; for one stage or
            `"unified"`.
        lora_rank (`int`, *optional*, defaults to `32`):
            Rank of each stage's adapter, where no `peft_config` is given.
        lora_alpha (`int`, *optional*, defaults to `64`):
            Scaling of each stage's adapter, where no `peft_config` is given.

        > Parameters that control the removal

        removal_rounds (`int`, *optional*, defaults to `1`):
            The plan's blocks are removed in so many rounds, with distillation between them. 1 removes all at the
            start.
        removal_fraction (`float`, *optional*, defaults to `0.5`):
            Part of the training steps by which all rounds have begun; the rest heals the final stages.
        removal_fade_steps (`int`, *optional*, defaults to `0`):
            Steps at the beginning of a round over which what its blocks add to the hidden states is scaled from 1 to
            0, before they are removed; 0 removes them at once. Needs `local_distillation_tokens=0`.
        search_in_rounds (`bool`, *optional*, defaults to `False`):
            Whether every round after the first chooses its blocks anew, with the adapters as they are by then; only
            how many go is then the plan's. `False` takes the plan as it is.
        round_search_examples (`int`, *optional*, defaults to `8`):
            Training examples on which such a round measures.

        > Parameters that control the loss

        distillation_loss (`str`, *optional*, defaults to `"forward_kl"`):
            What the stages minimise per completion token: `"forward_kl"`, `"reverse_kl"`, `"jensen_shannon"`,
            `"skewed_forward_kl"` or `"skewed_reverse_kl"`.
        distillation_temperature (`float`, *optional*, defaults to `1.0`):
            Softens both distributions in the distillation loss.
        distillation_mixture (`float`, *optional*):
            Share of one distribution in the mixture that the last three of these losses compare with, between 0 and 1.
            Default: 0.5 for `"jensen_shannon"`, 0.1 for the skewed ones.
        distillation_top_k (`int`, *optional*, defaults to `0`):
            The dense model's likeliest tokens that the distillation loss tells apart; all others count as one. 0: all.
        distillation_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the distillation loss.
        cross_entropy_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the completion tokens' negative log-likelihood.
        hidden_matching_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the distance between the hidden states of stages and dense model (see [`HiddenMatching`]).
        hidden_matching_blocks (`list[int]`, *optional*):
            Blocks after which hidden states are matched, by their numbers in the dense model. Default: those before a
            gap.
        logits_chunk_tokens (`int`, *optional*, defaults to `256`):
            Tokens whose logits are in memory at a time; they are made again in the backward pass. 0: all, once.
        token_aware_distillation (`bool`, *optional*, defaults to `True`):
            Whether decode is distilled on the KV entries that the plan will send it. `False` hands over all of them.
        first_token (`str`, *optional*, defaults to `"prefill"`):
            Which stage predicts the first completion token. `"decode"` reads the prompt's last token for it, as in
            `prefill(..., first_token="decode")`: better where prefill loses many more blocks than decode.
        local_distillation_tokens (`int`, *optional*, defaults to `8192`):
            Training tokens on which each stage's adapter is fitted in closed form before the first step (see
            [`ResidualFit`]); 0 leaves that out.
        local_distillation_rank (`int`, *optional*):
            Rank of the adapter in the layers that are fitted (the MLPs beside gaps). Default: the hidden size, with
            which an MLP can take over neurons of the missing blocks; with less, its last linear layer is corrected.
        train_fitted_layers (`bool`, *optional*, defaults to `False`):
            Whether layers that were fitted in closed form are trained on. They are of full rank and fitted on more
            tokens than a step sees: at learning rates that the others need, training undoes the fit.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Whether the stages' blocks are computed again in the backward pass, to save memory."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The old name of activation_checkpointing."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "Stages go to the Hub when they are saved; checkpoints stay in output_dir.",
            "choices": ["end"],
        },
    )
    stage: str = field(
        default="disaggregated",
        metadata={"help": "What learns: both stages, one of them, or one for both.", "choices": list(STAGE_ADAPTERS)},
    )
    full_finetuning: bool = field(
        default=False, metadata={"help": "Whether all weights of the stage learn, in a copy, instead of an adapter."}
    )
    lora_rank: int = field(
        default=32, metadata={"help": "Rank of each stage's adapter, where no peft_config is given."}
    )
    lora_alpha: int = field(
        default=64, metadata={"help": "Scaling of each stage's adapter, where no peft_config is given."}
    )
    removal_rounds: int = field(
        default=1,
        metadata={"help": "Number of rounds in which the plan's blocks are removed; 1 removes all at the start."},
    )
    removal_fraction: float = field(
        default=0.5,
        metadata={"help": "Part of the training steps by which all removal rounds have begun, between 0 and 1."},
    )
    removal_fade_steps: int = field(
        default=0,
        metadata={"help": "Steps over which a round's blocks are scaled from 1 to 0 before they are removed."},
    )
    search_in_rounds: bool = field(
        default=False,
        metadata={"help": "Whether rounds after the first choose their blocks anew, with what is healed by then."},
    )
    round_search_examples: int = field(
        default=8, metadata={"help": "Training examples on which a round that chooses its blocks measures."}
    )
    distillation_loss: str = field(
        default="forward_kl",
        metadata={"help": "Loss per completion token against the dense model.", "choices": list(DISTILLATION_LOSSES)},
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature that softens both distributions in the distillation loss."}
    )
    distillation_mixture: float | None = field(
        default=None,
        metadata={"help": "Share of one distribution in the mixture of jensen_shannon and the skewed losses."},
    )
    distillation_top_k: int = field(
        default=0, metadata={"help": "The dense model's likeliest tokens that the loss tells apart; 0: all."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the distillation loss."})
    cross_entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the completion tokens' negative log-likelihood."}
    )
    hidden_matching_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between hidden states of stages and dense model."}
    )
    hidden_matching_blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Dense numbers of blocks after which hidden states are matched; default: before a gap."},
    )
    logits_chunk_tokens: int = field(
        default=256, metadata={"help": "Tokens whose logits are in memory at a time; 0: all, made only once."}
    )
    token_aware_distillation: bool = field(
        default=True,
        metadata={"help": "Whether decode is distilled on the KV entries that the plan will send it, or on all."},
    )
    first_token: str = field(
        default="prefill",
        metadata={
            "help": "Which stage predicts the first completion token; decode reads the prompt's last one for it.",
            "choices": list(STAGES),
        },
    )
    local_distillation_tokens: int = field(
        default=8192,
        metadata={
            "help": "Training tokens on which adapters are fitted in closed form before the first step; 0: none."
        },
    )
    local_distillation_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the adapter in the layers that are fitted in closed form. Default: hidden size."},
    )
    train_fitted_layers: bool = field(
        default=False, metadata={"help": "Whether layers that were fitted in closed form are trained on."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_LESS_IS_BETTER):
            self.greater_is_better = False  # transformers knows of losses alone
        super().__post_init__()
        if self.stage not in STAGE_ADAPTERS:
            raise ValueError(f"stage must be one of {', '.join(STAGE_ADAPTERS)}, got {self.stage!r}")
        if self.distillation_loss not in DISTILLATION_LOSSES:
            known = ", ".join(DISTILLATION_LOSSES)
            raise ValueError(f"distillation_loss must be one of {known}, got {self.distillation_loss!r}")
        check_first_token(self.first_token)
        self._check_ranges()
        self._check_inherited()
        if not (self.distillation_weight or self.cross_entropy_weight or self.hidden_matching_weight):
            raise ValueError(
                "distillation_weight, cross_entropy_weight and hidden_matching_weight are all 0: there is no loss"
            )
        if self.hidden_matching_blocks is not None and not self.hidden_matching_weight:
            raise ValueError("hidden_matching_blocks has no effect without a hidden_matching_weight")
        if self.full_finetuning and self.stage == "disaggregated":
            raise ValueError(
                "full_finetuning trains one copy of the weights: choose stage='prefill', 'decode' or 'unified'"
            )
        if self.search_in_rounds and self.removal_rounds < 2:
            raise ValueError("search_in_rounds has no effect with removal_rounds=1: the first round takes the plan's")
        if self.search_in_rounds and self.full_finetuning:
            raise ValueError(
                "search_in_rounds does not go with full_finetuning: it measures stages against the dense model in one "
                "copy of the weights, with adapters"
            )
        if self.removal_fade_steps and self.local_distillation_tokens and not self.full_finetuning:
            raise ValueError(
                "removal_fade_steps needs local_distillation_tokens=0: the fit in closed form gives the missing "
                "blocks' work to their neighbours before the first step, and fading blocks would do it a second time"
            )
        if self.padding_free or ((self.packing or self.eval_packing) and self.packing_strategy != "wrapped"):
            raise ValueError(
                "padding_free is not supported, nor packing but with packing_strategy='wrapped' (which cuts joined "
                "text into rows of max_length): each row needs a prompt and a completion of its own"
            )

    def token_losses(self) -> TokenLosses:
        """The loss of completion tokens that these options describe."""
        return TokenLosses(
            self.distillation_loss,
            self.distillation_temperature,
            self.distillation_mixture,
            self.distillation_top_k,
            self.distillation_weight,
            self.cross_entropy_weight,
            self.logits_chunk_tokens,
        )

    def _check_ranges(self) -> None:
        least = {
            "removal_rounds": 1,
            "removal_fade_steps": 0,
            "round_search_examples": 1,
            "distillation_top_k": 0,
            "distillation_weight": 0,
            "cross_entropy_weight": 0,
            "hidden_matching_weight": 0,
            "logits_chunk_tokens": 0,
            "local_distillation_tokens": 0,
            "local_distillation_rank": 1,
            "lora_rank": 1,
            "lora_alpha": 1,
        }
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if not 0 <= self.removal_fraction <= 1:
            raise ValueError(f"removal_fraction must be between 0 and 1, got {self.removal_fraction}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be positive, got {self.distillation_temperature}")
        if self.distillation_mixture is not None and not 0 < self.distillation_mixture < 1:
            raise ValueError(f"distillation_mixture must be between 0 and 1, got {self.distillation_mixture}")

    def _check_inherited(self) -> None:
        """Raises a `ValueError` that names an option of trl's or transformers' which would be ignored."""
        loss = "the loss is made of distillation_loss, cross_entropy_weight and hidden_matching_weight"
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is not supported: {loss}")
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r} is not supported: {loss}")
        if self.router_aux_loss_coef:
            raise ValueError(f"router_aux_loss_coef is not supported: {loss}; the experts' load is not balanced anew")
        if self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} is not supported: with push_to_hub, save_model puts the "
                "stages on the Hub, in repositories of their own; checkpoints stay in output_dir"
            )
        if "inputs" in self.include_for_metrics:
            raise ValueError(
                "include_for_metrics=['inputs'] is not supported: a batch has no input_ids, but prompts and "
                "completions; 'teacher' and 'loss' can be included"
            )
        if (self.activation_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise ValueError(
                "activation_checkpointing_kwargs is not supported: the stages' blocks are always computed again as a "
                "whole, with use_reentrant=False"
            )

    def check_plan(self, plan: PruningPlan) -> None:
        """Raises a `ValueError` that names the option which does not go with a plan."""
        prefill, decode = plan.prefill, plan.decode
        for checkpoint in STAGE_ADAPTERS[self.stage].layout:
            plan.stage(checkpoint)  # raises if the plan has none
        if self.search_in_rounds and (prefill.merged_blocks or decode.merged_blocks or prefill.projected_blocks):
            raise ValueError(
                "search_in_rounds chooses blocks to remove; the plan merges or projects some, so it has to be taken "
                "as it is"
            )
        kept = set(range(plan.num_hidden_layers)) - set(prefill.skipped_blocks)
        wrong = [block for block in self.hidden_matching_blocks or () if block not in kept]
        if wrong:
            raise ValueError(f"hidden_matching_blocks: block {wrong[0]} is not one that prefill keeps")
