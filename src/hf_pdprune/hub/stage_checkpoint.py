"""Writes stage checkpoints: ordinary transformers checkpoints of the prefill and the decode stage."""

import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import MergedWeights, adapter_layers, adapter_parameters, name_without_adapters
from ..blocks import blocks_path, empty_shorter, shortened_names, shortened_tensor
from ..fingerprint import combined_fingerprint, model_fingerprint
from ..pair_layout import CHECKPOINTS, DISAGGREGATED, LAYOUTS, by_stage, served_stages
from ..plan import PLAN_FILE_NAME, PruningPlan
from ..projected_blocks import check_projectable, idle_layers
from .dense_fingerprint import dense_fingerprint
from .folder_swap import FolderSwap, naming_folder
from .model_card import licence_in, model_card
from .shard_writer import DEFAULT_SHARD_SIZE, write_shards


class StageBuilder:
    """
    Makes the model of one stage: without the blocks that it does not run, with what its adapter has learned merged
    into the weights, and with zeros for what of a projected block does not run. The dense model is left as it is.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        stage (`str`): `"prefill"`, `"decode"`, or `"unified"` for both in one.
        adapter (`str`, *optional*): Adapter to merge.
        fingerprint (`str`, *optional*): What both stages of a pair share. Default: that of model and adapter.
        dense (`str`, *optional*): What [`dense_fingerprint`] says of the dense model, for the config.

    Raises:
        `ValueError`: If the model is not the plan's dense model, has no such adapter, or cannot do without the blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        stage: str,
        adapter: str | None = None,
        fingerprint: str | None = None,
        dense: str | None = None,
    ):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(base.config, "pdprune", None) is not None:
            raise ValueError(
                f"the model is a {base.config.pdprune.get('stage')} stage already; export the dense model"
            )
        plan.blocks_of(base.config)
        if fingerprint is None:
            fingerprint = pair_fingerprint(
                model, {} if adapter is None else dict.fromkeys(served_stages(stage), adapter)
            )
        self.merged = MergedWeights(model, adapter)
        _check_tied_weights(base, self.merged)
        # Without weights: they are handed over one by one.
        self.empty, self._kept = empty_shorter(base, plan.stage(stage).missing_blocks)
        # A model loaded from a quantised file (GGUF) has plain weights, but its config would say otherwise.
        if hasattr(self.empty.config, "quantization_config"):
            del self.empty.config.quantization_config
        self.empty.config.pdprune = plan.config_entry(stage, fingerprint, dense)
        self._total = plan.num_hidden_layers
        path, projected = blocks_path(base), plan.stage(stage).projected_blocks
        self._dense_names = shortened_names(self.merged, path, self._kept)
        # With these at zero any tool hands the hidden states of a projected block on as they are.
        check_projectable(base, projected)
        self._zero = tuple(f"{path}.{block}.{layer}." for block in projected for layer in idle_layers(base, block))

    def weights(self) -> dict[str, Callable[[], torch.Tensor]]:
        """By name, a function that computes the weight."""
        return {name: partial(self._weight, name, dense_name) for name, dense_name in self._dense_names.items()}

    def _weight(self, name: str, dense_name: str) -> torch.Tensor:
        weight = shortened_tensor(name, self.merged[dense_name], self._kept, self._total)
        return torch.zeros_like(weight) if dense_name.startswith(self._zero) else weight

    def build(self) -> PreTrainedModel:
        """The stage's model in memory. Weights without an adapter are those of the dense model, not copies."""
        self.empty.load_state_dict({name: make() for name, make in self.weights().items()}, strict=True, assign=True)
        self.empty.tie_weights()
        return self.empty


def build_stage(
    model: nn.Module, plan: PruningPlan, stage: str, adapter: str | None = None, fingerprint: str | None = None
) -> PreTrainedModel:
    """The model of one stage in memory; see [`StageBuilder`]."""
    return StageBuilder(model, plan, stage, adapter, fingerprint).build()


def _check_tied_weights(model: PreTrainedModel, merged: MergedWeights) -> None:
    """Raises a `ValueError` where an adapter has changed one of two tied weights: a checkpoint holds only one."""
    groups: dict[int, list[str]] = {}
    layers = adapter_layers(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (name := name_without_adapters(name, layers)) is not None:
            groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        adapted = [name for name in names if merged.is_adapted(name)]
        if adapted and len(names) > 1:
            raise ValueError(f"an adapter changes one of the tied weights {' and '.join(names)}; untie them first")


def pair_fingerprint(model: nn.Module, adapters: Mapping[str, str]) -> str:
    """
    The fingerprint that both stages of a pair carry: of a sample of every weight of the dense model, and of what its
    adapters have learned, whatever they are called.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        adapters (`Mapping[str, str]`): Name of the adapter of each stage that has one.
    """
    learned: dict[str, torch.Tensor] = {}
    for stage, adapter in adapters.items():
        parameters = adapter_parameters(model, adapter)
        if not parameters:
            raise ValueError(f"the model has no adapter {adapter!r}")
        learned |= {f"{name}.".replace(f".{adapter}.", f".{stage}."): p for name, p in parameters.items()}
    return combined_fingerprint(model_fingerprint(model), ChainMap(learned, MergedWeights(model, None)))


def export_stage(
    model: nn.Module,
    plan: PruningPlan,
    stage: str,
    output_dir: str | os.PathLike,
    adapter: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fingerprint: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Path:
    """
    Writes one stage into `output_dir` as an ordinary checkpoint: config, safetensors, generation config, tokenizer,
    `pruning_plan.json` and a model card. As a whole or not at all: a kill leaves the old folder or the new one.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        stage (`str`): `"prefill"`, `"decode"`, or `"unified"` for both in one.
        output_dir (`str`): Folder of the checkpoint. What it holds is replaced.
        adapter (`str`, *optional*): Adapter to merge.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
        fingerprint (`str`, *optional*): What both stages of a pair share. Default: that of model and adapter.
        overwrite (`bool`, defaults to `False`): Whether a checkpoint of another plan may be replaced.
        max_shard_size (`int` or `str`, defaults to `"2GB"`): Size of a weight file. Beside the dense model, one shard
            and its serialised copy are in memory.

    Raises:
        `ValueError`: If the folder holds another plan, or what is no stage checkpoint.
        `OSError`: If it cannot be written; what was there before is still there.
    """
    folder = Path(output_dir)
    with FolderSwap(folder) as swap:
        _check_replaceable(folder, plan, overwrite)
        builder = StageBuilder(model, plan, stage, adapter, fingerprint, dense_fingerprint(model))
        _write_stage(swap, folder, builder, plan, tokenizer, max_shard_size)
    return folder


def export_stages(
    model: nn.Module,
    plan: PruningPlan,
    output_dir: str | os.PathLike,
    adapters: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    layout: tuple[str, ...] = DISAGGREGATED,
) -> Path:
    """
    Writes `<output_dir>/prefill`, `<output_dir>/decode` and `<output_dir>/pruning_plan.json`. Both stages are written
    to folders beside their own before either is replaced.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
        plan ([`PruningPlan`]): The plan.
        output_dir (`str`): Folder of the pair.
        adapters (`Mapping[str, str]`, *optional*): Name of the adapter of each checkpoint of the layout.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
        overwrite (`bool`, defaults to `False`): Whether a pair of another plan may be replaced.
        max_shard_size (`int` or `str`, defaults to `"2GB"`): Size of a weight file. Beside the dense model, one shard
            and its serialised copy are in memory.
        layout (`tuple[str, ...]`, defaults to `("prefill", "decode")`): The checkpoints; `("unified",)` writes one
            that serves both stages, for a plan in which they miss the same blocks.

    Raises:
        `ValueError`: If the folder holds another plan, or where a stage belongs there is what is no stage checkpoint.
        `OSError`: If a stage cannot be written; what was there before is still there.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(str, LAYOUTS))}, got {layout!r}")
    adapters = dict(adapters or {})
    unknown = [checkpoint for checkpoint in adapters if checkpoint not in layout]
    if unknown:
        raise ValueError(f"adapters: unknown stage {unknown[0]!r}; this pair has {' and '.join(layout)}")
    fingerprint = pair_fingerprint(
        model, {stage: adapters[name] for stage, name in by_stage(layout).items() if name in adapters}
    )
    dense = dense_fingerprint(model)
    builders = {name: StageBuilder(model, plan, name, adapters.get(name), fingerprint, dense) for name in layout}
    return export_pair(builders, plan, output_dir, tokenizer, overwrite, max_shard_size)


def export_pair(
    builders: Mapping[str, StageBuilder],
    plan: PruningPlan,
    output_dir: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Path:
    """
    What [`export_stages`] does, from models that need not be one.

    Args:
        builders (`Mapping[str, StageBuilder]`): By the name of the checkpoint.
        plan, output_dir, tokenizer, overwrite, max_shard_size: As for [`export_stages`].
    """
    output_dir = Path(output_dir)
    # A pair of the other layout would be another pair in the same folder.
    others = [output_dir / name for name in CHECKPOINTS if name not in builders]
    folders = {name: output_dir / name for name in builders}
    with FolderSwap(*folders.values(), removed=others) as swap:
        _check_replaceable(output_dir, plan, overwrite, is_pair=True)
        for folder in (*folders.values(), *others):
            _check_replaceable(folder, plan, overwrite)
        for name, builder in builders.items():
            _write_stage(swap, folders[name], builder, plan, tokenizer, max_shard_size)
        with naming_folder(output_dir):
            plan.save_pretrained(output_dir)
    return output_dir


def _write_stage(
    swap: FolderSwap,
    folder: Path,
    builder: StageBuilder,
    plan: PruningPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
) -> None:
    with swap.writing(folder) as new:
        write_shards(builder.empty, builder.weights(), new, max_shard_size)
        plan.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        stage = builder.empty.config.pdprune["stage"]
        dense_folder = builder.empty.config._name_or_path  # or a repo id, or nothing
        licence = licence_in(Path(dense_folder) / "README.md") if dense_folder else None
        (new / "README.md").write_text(model_card(plan, stage, folder.name, licence=licence), encoding="utf-8")


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
