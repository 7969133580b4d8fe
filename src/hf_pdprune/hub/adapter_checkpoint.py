"""Adapters alone: what distillation learned, without the dense weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..artefact_file import read_json
from ..pair_layout import CHECKPOINTS, DISAGGREGATED, by_stage
from ..plan import PruningPlan
from ..weight_files import share_as
from .dense_fingerprint import dense_fingerprint
from .folder_swap import FolderSwap, naming_folder


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FINGERPRINT = "dense_fingerprint"  # in the metadata of the weights, which no other tool minds


def save_adapters(
    model: PeftModel, plan: PruningPlan, output_dir: str | os.PathLike, adapters: Mapping[str, str] | None = None
) -> Path:
    """
    Writes `<output_dir>/prefill`, `<output_dir>/decode` (ordinary peft adapters) and `<output_dir>/pruning_plan.json`:
    some hundredths of what the stages would take. What [`PDPruneTrainer`] leaves in its checkpoints is the same.

    Args:
        model (`PeftModel`): The dense model with its adapters.
        plan ([`PruningPlan`]): The plan.
        output_dir (`str`): The folder.
        adapters (`Mapping[str, str]`, *optional*): Name of the adapter of each stage; `{"unified": ...}` for one that
            both apply. Default: the stage's own name.

    Raises:
        `ValueError`: If the model has no such adapter, or a folder of its name holds something else.
        `OSError`: If it cannot be written; what was there before is still there.
    """
    adapters = dict(adapters or {stage: stage for stage in DISAGGREGATED})
    there = getattr(model, "peft_config", {})
    for stage, adapter in adapters.items():
        plan.stage(stage)
        if adapter not in there:
            raise ValueError(f"the model has no adapter {adapter!r}")
    by_stage(adapters)  # raises if two are for one stage
    folder = Path(output_dir)
    others = [folder / name for name in CHECKPOINTS if name not in adapters and (folder / name / _CONFIG).is_file()]
    dense = dense_fingerprint(model)
    with FolderSwap(*(folder / stage for stage in adapters), removed=others) as swap:
        for path in swap.folders:
            if path.exists() and any(path.iterdir()) and not (path / _CONFIG).is_file():
                raise ValueError(f"{path} holds files but no {_CONFIG}: it is not an adapter to replace")
        for stage, adapter in adapters.items():
            with swap.writing(folder / stage) as new:
                model.save_pretrained(new, selected_adapters=[adapter], safe_serialization=True)
                if adapter != "default":  # peft puts it into a folder of its own
                    for path in (new / adapter).iterdir():
                        path.replace(new / path.name)
                    (new / adapter).rmdir()
                metadata = {"format": "pt"} | ({} if dense is None else {_FINGERPRINT: dense})
                save_file(load_file(new / _WEIGHTS), new / _WEIGHTS, metadata)
                share_as(new / _WEIGHTS, new / _CONFIG)
        with naming_folder(folder):
            plan.save_pretrained(folder)
    return folder


def load_adapters(model: nn.Module, folder: str | os.PathLike) -> tuple[nn.Module, PruningPlan, dict[str, str]]:
    """
    Puts the adapters of a folder on the dense model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model; it is changed.
        folder (`str`): What [`save_adapters`] wrote, or a checkpoint of [`PDPruneTrainer`].

    Returns:
        `tuple`: The model with the adapters, the plan, and the name of each stage's adapter (a stage without one is
        missing).

    Raises:
        `FileNotFoundError`: If the folder holds no plan or no adapters.
        `ValueError`: If the plan or the adapters are of another model, or a file is not what it must be.
    """
    plan = PruningPlan.from_pretrained(folder)
    plan.blocks_of(model.config)  # raises if the plan is of another model
    model, names = add_adapters_of(model, folder)
    return model, plan, names


def add_adapters_of(model: nn.Module, folder: str | os.PathLike) -> tuple[nn.Module, dict[str, str]]:
    """What [`load_adapters`] does, without a plan: the model with the adapters, and the name of each stage's."""
    folder = Path(folder)
    names = [name for name in CHECKPOINTS if (folder / name / _CONFIG).is_file()]
    if not names:
        wanted = " or ".join(f"{name}/{_CONFIG}" for name in CHECKPOINTS)
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {wanted}")
    serving = by_stage(names)
    configs = {name: _checked_config(folder / name) for name in names}
    _check_dense(model, folder, names)
    for number, (name, config) in enumerate(configs.items()):
        if number == 0:
            model = PeftModel.from_pretrained(model, folder / name, adapter_name=name, config=config)
        else:
            model.load_adapter(folder / name, adapter_name=name)
    return model.eval(), serving


def _check_dense(model: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """
    Raises a `ValueError` where adapters were trained on another dense model, which may well have the same shape. What
    does not say on which one (a checkpoint of [`PDPruneTrainer`], quantised weights, an older version) is accepted.
    """
    recorded = set()
    for name in names:
        with safe_open(folder / name / _WEIGHTS, "pt") as file:
            recorded.add((file.metadata() or {}).get(_FINGERPRINT))
    recorded.discard(None)
    own = dense_fingerprint(model) if recorded else None
    if own is not None and recorded != {own}:
        raise ValueError(
            f"{folder} holds adapters of another dense model: its weights differ from those that they were trained on"
        )


def _checked_config(folder: Path) -> PeftConfig:
    """The config of an adapter; a `ValueError` where it is no LoRA of layers, or its weights would be unpickled."""
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {_WEIGHTS}; adapters in other formats are not read")
    data = read_json(folder / _CONFIG)
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind != "LORA":
        raise ValueError(f"{folder / _CONFIG}: peft_type must be LORA, got {kind!r}")
    for key in ("modules_to_save", "trainable_token_indices"):
        if data.get(key):
            raise ValueError(f"{folder / _CONFIG}: {key} is not supported")
    mapping = data.get("auto_mapping")  # peft may import the module that it names
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if mapping and not str(library).startswith("transformers."):
        raise ValueError(f"{folder / _CONFIG}: auto_mapping is not supported but for classes of transformers")
    return LoraConfig.from_pretrained(folder)
