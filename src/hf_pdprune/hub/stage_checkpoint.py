"""Stage checkpoints: ordinary transformers checkpoints of the prefill and the decode stage."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import adapter_parameters, merged_state_dict
from ..blocks import remove_blocks
from ..fingerprint import combined_fingerprint, model_fingerprint
from ..inference import DecodeStage, PrefillStage
from ..plan import PLAN_FILE_NAME, PruningPlan
from .folder_swap import FolderSwap, naming_folder
from .model_card import model_card


STAGES = ("prefill", "decode")


def build_stage(
    model: nn.Module, plan: PruningPlan, stage: str, adapter: str | None = None, fingerprint: str | None = None
) -> PreTrainedModel:
    """
    The model of one stage: without the blocks that it does not run, with what its adapter has learned merged into the
    weights. Weights without an adapter are those of `model`, not copies; `model` itself is left as it was.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        stage (`str`): `"prefill"` or `"decode"`.
        adapter (`str`, *optional*): Adapter to merge.
        fingerprint (`str`, *optional*): What both stages of a pair share. Default: that of model and adapter.

    Raises:
        `ValueError`: If the model is not the plan's dense model, has no such adapter, or cannot do without the blocks.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base.config, "pdprune", None) is not None:
        raise ValueError(f"the model is a {base.config.pdprune.get('stage')} stage already; export the dense model")
    plan.blocks_of(base.config)
    if fingerprint is None:
        fingerprint = pair_fingerprint(model, [] if adapter is None else [adapter])
    state_dict = merged_state_dict(model, adapter)
    _check_tied_weights(base, state_dict)
    shorter = remove_blocks(base, plan.stage(stage).missing_blocks, state_dict)
    # A model loaded from a quantised file (GGUF) has plain weights, but its config would say otherwise.
    if hasattr(shorter.config, "quantization_config"):
        del shorter.config.quantization_config
    shorter.config.pdprune = plan.config_entry(stage, fingerprint)
    return shorter


def _check_tied_weights(model: PreTrainedModel, state_dict: Mapping[str, Any]) -> None:
    """Raises a `ValueError` where an adapter has changed one of two tied weights: a checkpoint holds only one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer.", ".")
        if name in state_dict:  # else it belongs to an adapter
            groups.setdefault(id(parameter), []).append(name)
    for first, *others in groups.values():
        for name in others:
            if state_dict[name].data_ptr() != state_dict[first].data_ptr():
                raise ValueError(f"an adapter changes one of the tied weights {first} and {name}; untie them first")


def pair_fingerprint(model: nn.Module, adapters: list[str]) -> str:
    """The fingerprint that both stages of a pair carry: of the dense model and of what its adapters have learned."""
    fingerprint = model_fingerprint(model)
    for adapter in adapters:
        parameters = adapter_parameters(model, adapter)
        if not parameters:
            raise ValueError(f"the model has no adapter {adapter!r}")
        fingerprint = combined_fingerprint(fingerprint, parameters)
    return fingerprint


def export_stage(
    model: nn.Module,
    plan: PruningPlan,
    stage: str,
    output_dir: str | os.PathLike,
    adapter: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fingerprint: str | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes one stage into `output_dir` as an ordinary checkpoint: config, safetensors, generation config, tokenizer,
    `pruning_plan.json` and a model card. As a whole or not at all: a kill leaves the old folder or the new one.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        stage (`str`): `"prefill"` or `"decode"`.
        output_dir (`str`): Folder of the checkpoint. What it holds is replaced.
        adapter (`str`, *optional*): Adapter to merge.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
        fingerprint (`str`, *optional*): What both stages of a pair share. Default: that of model and adapter.
        overwrite (`bool`, defaults to `False`): Whether a checkpoint of another plan may be replaced.

    Raises:
        `ValueError`: If the folder holds another plan, or what is no stage checkpoint.
        `OSError`: If it cannot be written; what was there before is still there.
    """
    folder = Path(output_dir)
    with FolderSwap(folder) as swap:
        _check_replaceable(folder, plan, overwrite)
        stage_model = build_stage(model, plan, stage, adapter, fingerprint)
        _write_stage(swap, folder, stage_model, plan, tokenizer)
    return folder


def export_stages(
    model: nn.Module,
    plan: PruningPlan,
    output_dir: str | os.PathLike,
    adapters: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes `<output_dir>/prefill`, `<output_dir>/decode` and `<output_dir>/pruning_plan.json`. Both stages are written
    to folders beside their own before either is replaced.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        output_dir (`str`): Folder of the pair.
        adapters (`Mapping[str, str]`, *optional*): Name of the adapter of each stage.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
        overwrite (`bool`, defaults to `False`): Whether a pair of another plan may be replaced.

    Raises:
        `ValueError`: If the folder holds another plan, or where a stage belongs there is what is no stage checkpoint.
        `OSError`: If a stage cannot be written; what was there before is still there.
    """
    output_dir = Path(output_dir)
    adapters = dict(adapters or {})
    unknown = [stage for stage in adapters if stage not in STAGES]
    if unknown:
        raise ValueError(f"adapters: unknown stage {unknown[0]!r}; a plan has the stages prefill and decode")
    folders = {stage: output_dir / stage for stage in STAGES}
    with FolderSwap(*folders.values()) as swap:
        for folder in (output_dir, *folders.values()):
            _check_replaceable(folder, plan, overwrite, is_pair=folder == output_dir)
        fingerprint = pair_fingerprint(model, [adapters[stage] for stage in STAGES if stage in adapters])
        for stage, folder in folders.items():
            stage_model = build_stage(model, plan, stage, adapters.get(stage), fingerprint)
            _write_stage(swap, folder, stage_model, plan, tokenizer)
            del stage_model  # before the merged weights of the next one are made
        with naming_folder(output_dir):
            plan.save_pretrained(output_dir)
    return output_dir


def _write_stage(
    swap: FolderSwap,
    folder: Path,
    stage_model: PreTrainedModel,
    plan: PruningPlan,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    with swap.writing(folder) as new:
        stage_model.save_pretrained(new)
        plan.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        stage = stage_model.config.pdprune["stage"]
        (new / "README.md").write_text(model_card(plan, stage, folder.name), encoding="utf-8")


def _check_replaceable(folder: Path, plan: PruningPlan, overwrite: bool, is_pair: bool = False) -> None:
    """Raises a `ValueError` if the folder holds another plan, or (a stage's folder) files of something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a stage checkpoint is a folder")
    if (folder / PLAN_FILE_NAME).is_file():
        if overwrite:
            return
        there = PruningPlan.from_pretrained(folder)
        if there.digest != plan.digest:
            raise ValueError(
                f"{folder} holds another plan ({there.digest[:8]} of {there.base_model}) than the one to export "
                f"({plan.digest[:8]} of {plan.base_model}): choose another folder, or overwrite=True"
            )
    elif not is_pair and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {PLAN_FILE_NAME}: it is not a stage checkpoint to replace")


def load_stages(folder: str | os.PathLike, **model_kwargs: Any) -> tuple[PrefillStage, DecodeStage]:
    """
    Both stages of a pair, after checking that they belong together.

    Args:
        folder (`str`): What [`export_stages`] wrote.
        model_kwargs: For `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        `FileNotFoundError`: If the folder has no plan or lacks a stage.
        `ValueError`: If the stages and the plan are not of one export.
    """
    folder = Path(folder)
    plan = PruningPlan.from_pretrained(folder)
    fingerprints = []
    for stage in STAGES:  # before any weights are read
        if not (folder / stage / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no {stage} stage: there is no {stage}/config.json")
        config = AutoConfig.from_pretrained(folder / stage)
        if getattr(config, "pdprune", None) is None:
            raise ValueError(f"{folder / stage} is not a stage checkpoint: its config has no entry pdprune")
        entry = plan.entry_of(config)
        if entry["stage"] != stage:
            raise ValueError(f"{folder / stage} holds a {entry['stage']} stage")
        there = PruningPlan.from_config(config)
        if there.digest != plan.digest:
            raise ValueError(
                f"{folder / stage} was exported with another plan ({there.digest[:8]}) than the one in {folder} "
                f"({plan.digest[:8]}); an interrupted export leaves this, exporting again repairs it"
            )
        fingerprints.append(entry["fingerprint"])
    if fingerprints[0] != fingerprints[1]:
        raise ValueError(
            f"the stages in {folder} are not of one pair: they were exported from different models or adapters; an "
            "interrupted export leaves this, exporting again repairs it"
        )
    models = [AutoModelForCausalLM.from_pretrained(folder / stage, **model_kwargs).eval() for stage in STAGES]
    return PrefillStage(models[0], plan), DecodeStage(models[1], plan)
