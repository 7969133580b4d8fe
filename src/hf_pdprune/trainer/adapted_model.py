"""What learns: the model with the adapters that a training's options ask for, or a copy of it as a whole."""

import copy
from collections.abc import Sequence

from peft import PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import adapter_layers, is_quantized
from ..plan import PruningPlan
from .pdprune_config import PDPruneConfig
from .stage_adapters import STAGE_ADAPTERS, default_lora


# Initialisations of LoRA that take out of the dense weights what they put into the adapter, or quantise them.
_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")


def add_adapters(model: nn.Module, plan: PruningPlan, args: PDPruneConfig, config: PeftConfig | None) -> PeftModel:
    """
    The model with the adapters that a training needs, and with no others trainable.

    Args:
        model (`nn.Module`): The dense model, or a `PeftModel` of it.
        plan ([`PruningPlan`]): What the stages do without in the end.
        args ([`PDPruneConfig`]): The options.
        config ([`~peft.PeftConfig`], *optional*): Config of every adapter. Default: LoRA on all linear layers of the
            blocks that its stages keep.

    Raises:
        `ValueError`: If an adapter of the config cannot be one: see [`StageAdapters.add_to`]; if it rewrites the dense
            weights, cannot be merged into them, or cannot be fitted in closed form although that is asked for.
    """
    _check_configs([*getattr(model, "peft_config", {}).values(), *([] if config is None else [config])])
    kwargs, fitted_rank = {}, None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        kwargs["autocast_adapter_dtype"] = False  # ZeRO-3 gathers parameters of one dtype only, see SFTTrainer
    skip_missing_blocks = config is None and not args.search_in_rounds
    if config is None:
        config = default_lora(args.lora_rank, args.lora_alpha)
        if args.local_distillation_tokens or plan.prefill.merged_blocks or plan.decode.merged_blocks:
            fitted_rank = args.local_distillation_rank or model.config.get_text_config().hidden_size
    adapters = STAGE_ADAPTERS[args.stage]
    model = adapters.add_to(model, plan, config, skip_missing_blocks, fitted_rank, **kwargs)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embeddings, BaseTunerLayer) and head is not None and head.weight is embeddings.weight:
        raise ValueError(
            "peft_config: the model's embeddings are tied to its LM head, which would have their adapter after an "
            "export but not in training; leave them out of target_modules"
        )
    for layer in adapter_layers(model).values():
        if isinstance(layer, LoraLayer):
            _check_layer(layer, adapters.trained, is_fitted=args.local_distillation_tokens > 0)
    return model


def _check_configs(configs: Sequence[PeftConfig]) -> None:
    for config in configs:
        init = str(getattr(config, "init_lora_weights", None))
        wrong = f"init_lora_weights={init!r}" if init.lower().startswith(_REWRITING) else None
        if getattr(config, "kasa_config", None) is not None:
            wrong = "kasa_config"
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise ValueError(
                "peft_config: alora_invocation_tokens makes an adapter that cannot be merged into the dense weights, "
                "as an export does"
            )
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ValueError(
                f"peft_config: bias={bias!r} trains biases of the dense model, which teaches; leave it at 'none'"
            )
        if wrong is not None:
            raise ValueError(
                f"peft_config: {wrong} rewrites the dense weights, so that the model without adapters, which teaches, "
                "would not be the dense one; choose another initialisation"
            )


def _check_layer(layer: LoraLayer, adapters: Sequence[str], is_fitted: bool) -> None:
    if is_fitted and (isinstance(layer, AdaLoraLayer) or any(name in layer.lora_variant for name in adapters)):
        raise ValueError(
            "adapters that are no plain LoRA (DoRA, AdaLoRA and the like) cannot be fitted in closed form: set "
            "local_distillation_tokens=0, or drop that option of peft_config"
        )
    has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
    if not has_bias and any(layer.lora_bias.get(name) for name in adapters):
        raise ValueError("peft_config: lora_bias=True has no bias to be merged into in this model, as an export does")


def learning_copy(model: nn.Module) -> nn.Module:
    """
    A copy of the dense model whose weights learn.

    Raises:
        `ValueError`: If they are quantised, or adapted by peft.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "full_finetuning needs the dense model itself: unload() the adapters of the PeftModel, or make them part "
            "of it with merge_and_unload()"
        )
    if any(map(is_quantized, model.modules())):
        raise ValueError("full_finetuning needs weights that can learn: load the model without quantisation")
    return copy.deepcopy(model).requires_grad_(True)
