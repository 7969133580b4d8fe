"""PDPruneConfig: the options of PDPruneTrainer."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .losses import DISTILLATION_LOSSES


@dataclass
class PDPruneConfig(SFTConfig):
    """
    Options of [`PDPruneTrainer`], beside those of [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Some defaults differ from trl's: `learning_rate` is that of LoRA, `activation_checkpointing` is off (recomputing a
    block would append to its KV cache twice), and `bf16` is on only where the device is good at it (on CPUs without
    AMX it is 6 to 30 times slower than float32).

    Parameters:
        removal_rounds (`int`, *optional*, defaults to `1`):
            The plan's blocks are removed in so many rounds, with distillation between them. 1 removes all at the
            start.
        removal_fraction (`float`, *optional*, defaults to `0.5`):
            Part of the training steps by which all rounds have begun; the rest heals the final stages.
        distillation_loss (`str`, *optional*, defaults to `"forward_kl"`):
            What the stages minimise per completion token: `"forward_kl"` or `"reverse_kl"`.
        distillation_temperature (`float`, *optional*, defaults to `1.0`):
            Softens both distributions in the distillation loss.
        token_aware_distillation (`bool`, *optional*, defaults to `True`):
            Whether decode is distilled on the KV entries that the plan will send it. `False` hands over all of them.
        local_distillation_tokens (`int`, *optional*, defaults to `8192`):
            Training tokens on which each stage's adapter is fitted in closed form before the first step (see
            [`ResidualFit`]); 0 leaves that out.
        local_distillation_rank (`int`, *optional*):
            Rank of the adapter in the layers that are fitted (the MLPs before gaps). Default: the hidden size, with
            which an MLP can take over neurons of the missing blocks; with less, its last linear layer is corrected.
        lora_rank (`int`, *optional*, defaults to `32`):
            Rank of each stage's adapter, where no `peft_config` is given.
        lora_alpha (`int`, *optional*, defaults to `64`):
            Scaling of each stage's adapter, where no `peft_config` is given.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    activation_checkpointing: bool | None = field(
        default=False,
        metadata={"help": "Must stay off: recomputing a block would append to its KV cache twice."},
    )
    removal_rounds: int = field(
        default=1,
        metadata={"help": "Number of rounds in which the plan's blocks are removed; 1 removes all at the start."},
    )
    removal_fraction: float = field(
        default=0.5,
        metadata={"help": "Part of the training steps by which all removal rounds have begun, between 0 and 1."},
    )
    distillation_loss: str = field(
        default="forward_kl",
        metadata={"help": "Loss per completion token against the dense model.", "choices": list(DISTILLATION_LOSSES)},
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature that softens both distributions in the distillation loss."}
    )
    token_aware_distillation: bool = field(
        default=True,
        metadata={"help": "Whether decode is distilled on the KV entries that the plan will send it, or on all."},
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
    lora_rank: int = field(
        default=32, metadata={"help": "Rank of each stage's adapter, where no peft_config is given."}
    )
    lora_alpha: int = field(
        default=64, metadata={"help": "Scaling of each stage's adapter, where no peft_config is given."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.removal_rounds < 1:
            raise ValueError(f"removal_rounds must be at least 1, got {self.removal_rounds}")
        if not 0 <= self.removal_fraction <= 1:
            raise ValueError(f"removal_fraction must be between 0 and 1, got {self.removal_fraction}")
        if self.distillation_loss not in DISTILLATION_LOSSES:
            known = ", ".join(DISTILLATION_LOSSES)
            raise ValueError(f"distillation_loss must be one of {known}, got {self.distillation_loss!r}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be positive, got {self.distillation_temperature}")
        if self.local_distillation_tokens < 0:
            raise ValueError(f"local_distillation_tokens must not be negative, got {self.local_distillation_tokens}")
        for name in ("local_distillation_rank", "lora_rank", "lora_alpha"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing is not supported: recomputing a block would append to its KV cache twice"
            )
        if self.padding_free or (self.packing and self.packing_strategy != "wrapped"):
            raise ValueError(
                "padding_free is not supported, nor packing but with packing_strategy='wrapped' (which cuts joined "
                "text into rows of max_length): each row needs a prompt and a completion of its own"
            )
