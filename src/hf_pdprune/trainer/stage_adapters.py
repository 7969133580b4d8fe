"""StageAdapters: which adapter each stage applies, and which of them learn."""

import copy
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..adapters import adapter_layers, adapter_parameters
from ..blocks import blocks_path, get_blocks
from ..pair_layout import DISAGGREGATED, STAGES, UNIFIED
from ..plan import PruningPlan
from ..projected_blocks import idle_layers
from .residual_fit import fitted_layers


_PROBE = "what_a_config_means"


@dataclass(frozen=True)
class StageAdapters:
    """
    Which adapter each stage applies, and which of them learn.

    Args:
        prefill (`str`): Adapter of the prefill stage.
        decode (`str`): Adapter of the decode stage.
        trained (`tuple[str, ...]`): Those that learn; others are applied as they are, if the model has them.
        layout (`tuple[str, ...]`): Checkpoints that the stages are exported to, each named like the adapter that it
            has merged.
    """

    prefill: str
    decode: str
    trained: tuple[str, ...]
    layout: tuple[str, ...] = DISAGGREGATED

    def stages_of(self, adapter: str) -> tuple[str, ...]:
        """The stages that apply an adapter."""
        return tuple(stage for stage in STAGES if getattr(self, stage) == adapter)

    def of_model(self, model: nn.Module) -> dict[str, str]:
        """Adapter of each stage, without those that the model does not have."""
        there = getattr(model, "peft_config", {})
        names = {stage: getattr(self, stage) for stage in STAGES}
        return {stage: name for stage, name in names.items() if name in there}

    def add_to(
        self,
        model: nn.Module,
        plan: PruningPlan,
        config: PeftConfig,
        skip_missing_blocks: bool,
        fitted_rank: int | None = None,
        **peft_kwargs: bool,
    ) -> PeftModel:
        """
        Gives the model the adapters that learn, and makes them alone trainable. One that is there already goes on.

        Args:
            model (`nn.Module`): The dense model, or a `PeftModel` of it.
            plan ([`PruningPlan`]): What the stages do without in the end.
            config ([`~peft.PeftConfig`]): Config of every adapter.
            skip_missing_blocks (`bool`): Whether blocks that the adapter's stages do not have, and what of a projected
                block does not run, get no adapter.
            fitted_rank (`int`, *optional*): Rank in the layers that [`ResidualFit`] may set, where they have another.
            peft_kwargs: For `get_peft_model`.

        Raises:
            `ValueError`: If an adapter touches no block that its stage runs, or if one that is there already is of
                another kind than `config`, or leaves out layers of such blocks that `config` asks for.
        """
        path = blocks_path(model.get_base_model() if isinstance(model, PeftModel) else model)
        for name in self.trained:
            own = copy.deepcopy(config)
            parts = [plan.stage(stage) for stage in self.stages_of(name)]
            missing = set.intersection(*(set(part.missing_blocks) for part in parts))
            skipped = set.intersection(*(set(part.skipped_blocks) for part in parts))
            if skip_missing_blocks and skipped:
                idle = [rf"{block}\..*" for block in sorted(missing)]
                for block in sorted(skipped - missing):
                    idle += [rf"{block}\.{re.escape(layer)}" for layer in idle_layers(model, block)]
                own.exclude_modules = rf"{re.escape(path)}\.({'|'.join(idle)})"
            if fitted_rank is not None:
                _set_fitted_rank(own, [f"{path}.{layer}" for layer in fitted_layers(model, skipped)], fitted_rank)
            if name in getattr(model, "peft_config", {}):
                running = {block for stage in self.stages_of(name) for block in plan.kept_blocks(stage)}
                _check_existing(model, name, own, running)
            elif isinstance(model, PeftModel):
                model.add_adapter(name, own)
            else:
                model = get_peft_model(model, own, adapter_name=name, **peft_kwargs)
        self.let_learn(model)
        for name in self.trained:
            for stage in self.stages_of(name):
                blocks = get_blocks(model)
                if not any(adapter_parameters(blocks[block], name) for block in plan.kept_blocks(stage)):
                    raise ValueError(
                        f"peft_config: the adapter {name!r} touches no block that {stage} runs; its target_modules, "
                        "layers_to_transform or exclude_modules leave nothing to learn there"
                    )
        return model

    def let_learn(self, model: nn.Module) -> None:
        """Makes the parameters of the adapters that learn trainable, and no others."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in self.trained:
            for parameter in adapter_parameters(model, name).values():
                parameter.requires_grad_(True)


# By the value of PDPruneConfig.stage.
STAGE_ADAPTERS = {
    "disaggregated": StageAdapters("prefill", "decode", ("prefill", "decode")),
    "prefill": StageAdapters("prefill", "decode", ("prefill",)),
    "decode": StageAdapters("prefill", "decode", ("decode",)),
    "unified": StageAdapters("unified", "unified", ("unified",), UNIFIED),
}


def default_lora(rank: int, alpha: int) -> LoraConfig:
    """
    LoRA on all linear layers of the blocks.

    Args:
        rank (`int`): Rank of the adapter.
        alpha (`int`): Its scaling, times the rank.
    """
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _set_fitted_rank(config: LoraConfig, layers: Sequence[str], rank: int) -> None:
    """Gives `layers` another rank, with the same scaling."""
    names = [re.escape(layer) for layer in layers]
    config.rank_pattern = dict.fromkeys(names, rank)
    config.alpha_pattern = dict.fromkeys(names, rank * config.lora_alpha / config.r)


def _check_existing(model: PeftModel, name: str, config: PeftConfig, running_blocks: Collection[int]) -> None:
    """Raises a `ValueError` unless an adapter has what `config` asks for in `running_blocks`."""
    there = model.peft_config[name]
    if type(there) is not type(config):
        raise ValueError(
            f"the model's adapter {name!r} is made by {type(there).__name__}, not by {type(config).__name__}: pass "
            "its own peft_config"
        )
    # peft alone knows which layers a config means. Without memory: its weights are never made.
    model.add_adapter(_PROBE, copy.deepcopy(config), low_cpu_mem_usage=True)
    try:
        missing = [
            f"{layer} of block {number}"
            for number in sorted(running_blocks)
            for layer, module in adapter_layers(get_blocks(model)[number]).items()
            if _PROBE in (names := module._all_available_adapter_names()) and name not in names
        ]
    finally:
        model.delete_adapter(_PROBE)
    if missing:
        raise ValueError(
            f"the model's adapter {name!r} leaves out {len(missing)} of the layers that are to learn, the first is "
            f"{missing[0]}: it was made with another peft_config, which can be passed, or for another plan"
        )
