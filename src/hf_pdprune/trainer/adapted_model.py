"""What learns: the model with the adapters that a training's options ask for, or a copy of it as a whole."""

import copy

from peft import PeftConfig, PeftModel
from torch import nn

from ..adapters import is_quantized
from ..plan import PruningPlan
from .pdprune_config import PDPruneConfig
from .stage_adapters import STAGE_ADAPTERS, default_lora


def add_adapters(model: nn.Module, plan: PruningPlan, args: PDPruneConfig, config: PeftConfig | None) -> PeftModel:
    """
    The model with the adapters that a training needs, and with no others trainable.

    Args:
        model (`nn.Module`): The dense model, or a `PeftModel` of it.
        plan ([`PruningPlan`]): What the stages do without in the end.
        args ([`PDPruneConfig`]): The options.
        config ([`~peft.PeftConfig`], *optional*): Config of every adapter. Default: LoRA on all linear layers of the
            blocks that its stages keep.
    """
    kwargs, fitted_rank = {}, None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        kwargs["autocast_adapter_dtype"] = False  # ZeRO-3 gathers parameters of one dtype only, see SFTTrainer
    skip_missing_blocks = config is None and not args.search_in_rounds
    if config is None:
        config = default_lora(args.lora_rank, args.lora_alpha)
        if args.local_distillation_tokens or plan.prefill.merged_blocks or plan.decode.merged_blocks:
            fitted_rank = args.local_distillation_rank or model.config.get_text_config().hidden_size
    return STAGE_ADAPTERS[args.stage].add_to(model, plan, config, skip_missing_blocks, fitted_rank, **kwargs)


def learning_copy(model: nn.Module) -> nn.Module:
    """
    A copy of the dense model whose weights learn.

    Raises:
        `ValueError`: If they are quantised.
    """
    if any(map(is_quantized, model.modules())):
        raise ValueError("full_finetuning needs weights that can learn: load the model without quantisation")
    return copy.deepcopy(model).requires_grad_(True)
