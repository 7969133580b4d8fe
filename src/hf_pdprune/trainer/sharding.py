"""Weights that are partitioned over processes (ZeRO-3, FSDP2): whether they are, and what does not go with it."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..adapters import is_quantized
from .pdprune_config import PDPruneConfig


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


def check_sharding(accelerator: Accelerator, model: nn.Module, args: PDPruneConfig, is_loaded_in_parts: bool) -> None:
    """
    Raises a `ValueError` if something needs whole weights where they are partitioned.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        model (`nn.Module`): The model.
        args ([`PDPruneConfig`]): The options.
        is_loaded_in_parts (`bool`): Whether no process had all weights from the beginning (ZeRO-3).
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        check_fsdp(accelerator.state.fsdp_plugin, model)
    for name in ("full_finetuning", "search_in_rounds"):
        if getattr(args, name):
            raise ValueError(f"{name} needs whole weights: it does not run with ZeRO-3 or FSDP")
    if args.local_distillation_tokens and is_loaded_in_parts:
        raise ValueError("local_distillation_tokens must be 0 where the model is loaded in partitions (ZeRO-3)")


def check_fsdp(plugin: Any, model: nn.Module) -> None:
    """
    Raises a `ValueError` where FSDP is not used as this library knows it.

    Args:
        plugin ([`~accelerate.FullyShardedDataParallelPlugin`]): accelerate's.
        model (`nn.Module`): The model.
    """
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2 (recipes/accelerate_configs/fsdp2.yaml)")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError("adapters are saved whole: set fsdp_state_dict_type to FULL_STATE_DICT")
    if any(map(is_quantized, model.modules())):
        raise ValueError("quantised dense weights are not sharded by FSDP: use DDP, or load the model in 16 bits")
