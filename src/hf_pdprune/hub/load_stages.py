"""Loads both stages of a pair, from checkpoints or from adapters on the dense model, after checking what is loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..inference import DecodeStage, PrefillStage
from ..pair_layout import CHECKPOINTS, by_stage, checkpoint_folders, layout_of
from ..plan import PLAN_FILE_NAME, PruningPlan
from ..weight_files import check_weight_index
from .adapter_checkpoint import load_adapters
from .stage_checkpoint import pair_fingerprint


# Arguments of from_pretrained that say where files come from, not how the model is built.
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


@dataclass(frozen=True)
class StageLocation:
    """
    Where a stage checkpoint is.

    Args:
        path (`str`): Folder or repo id.
        subfolder (`str`): Folder inside it.
    """

    path: str
    subfolder: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}/{self.subfolder}".rstrip("/")

    def file(self, name: str, **hub_kwargs: Any) -> str | None:
        """Path of a file of the checkpoint here, after a download if need be; `None` where there is no such file."""
        return cached_file(
            self.path, name, subfolder=self.subfolder, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )

    def check_index(self, **hub_kwargs: Any) -> None:
        """Raises a `ValueError` if the index of the weight files, if any, names files that are not to be read."""
        index = self.file(SAFE_WEIGHTS_INDEX_NAME, **hub_kwargs)
        if index is not None:
            check_weight_index(index, self.name)

    def is_checkpoint(self, **hub_kwargs: Any) -> bool:
        """Whether there is a repo, and in it a config."""
        try:
            return self.file("config.json", **hub_kwargs) is not None
        except OSError:  # there is no such repo
            return False


def stage_locations(source: str | os.PathLike, **hub_kwargs: Any) -> tuple[PruningPlan, dict[str, StageLocation]]:
    """
    Where the checkpoints of a pair are, by their names: in a folder that [`export_stages`] wrote, in one repo with a
    folder for each, or in a repo for each (`<source>-prefill` and `<source>-decode`, or `<source>-unified`).

    Args:
        source (`str`): Folder or repo id.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on.

    Raises:
        `FileNotFoundError`: If there is no pair, or a stage of it is missing.
        `ValueError`: If the plan there is not valid, or there is more than one pair.
    """
    if os.path.isdir(source):
        plan = PruningPlan.from_pretrained(source)
        return plan, {name: StageLocation(str(path)) for name, path in checkpoint_folders(source).items()}
    try:
        plan = PruningPlan.from_pretrained(source, **hub_kwargs)
        locations = {name: StageLocation(str(source), name) for name in CHECKPOINTS}
    except FileNotFoundError as error:
        reason = str(error.__cause__).splitlines()[0]  # the Hub may just not be reached
        plan, locations = None, {name: StageLocation(f"{source}-{name}") for name in CHECKPOINTS}
    there = [name for name, location in locations.items() if location.is_checkpoint(**hub_kwargs)]
    if plan is None and not there:
        raise FileNotFoundError(
            f"{source} is no pair of stages: no folder with a {PLAN_FILE_NAME}, no repo that has one, no repos "
            f"{source}-prefill and {source}-decode, and no repo {source}-unified ({reason})"
        )
    found = {name: locations[name] for name in layout_of(there, str(source))}
    return plan or PruningPlan.from_pretrained(next(iter(found.values())).path, **hub_kwargs), found


def check_pair(plan: PruningPlan, locations: Mapping[str, StageLocation], **hub_kwargs: Any) -> None:
    """
    Checks the configs of a pair, before any weights are read.

    Raises:
        `ValueError`: If the stages and the plan are not of one export, or a config or index is not as it must be.
    """
    fingerprints = set()
    for checkpoint, location in locations.items():
        config = AutoConfig.from_pretrained(
            location.path, subfolder=location.subfolder, trust_remote_code=False, **hub_kwargs
        )
        fingerprints.add(_check_checkpoint(plan, checkpoint, location.name, config))
        location.check_index(**hub_kwargs)
    if len(fingerprints) > 1:
        where = " and ".join(location.name for location in locations.values())
        raise ValueError(
            f"the stages in {where} are not of one pair: they were exported from different models or adapters; an "
            "interrupted export leaves this, exporting again repairs it"
        )


def _check_checkpoint(plan: PruningPlan, checkpoint: str, name: str, config: PreTrainedConfig) -> str:
    """The fingerprint of a checkpoint's config, or a `ValueError`."""
    if getattr(config, "pdprune", None) is None:
        raise ValueError(f"{name} is not a stage checkpoint: its config has no entry pdprune")
    entry = plan.entry_of(config)
    if entry["stage"] != checkpoint:
        raise ValueError(f"{name} holds a {entry['stage']} stage")
    there = PruningPlan.from_config(config)
    if there.digest != plan.digest:
        raise ValueError(
            f"{name} was exported with another plan ({there.digest[:8]}) than the one of the pair "
            f"({plan.digest[:8]}); an interrupted export leaves this, exporting again repairs it"
        )
    plan.blocks_of(config)
    return entry["fingerprint"]


def load_stages(
    source: str | os.PathLike, adapters: str | os.PathLike | None = None, **model_kwargs: Any
) -> tuple[PrefillStage, DecodeStage]:
    """
    Both stages of a pair, after checking that they belong together. Those of a unified model share its weights.

    Args:
        source (`str`): What [`export_stages`] wrote, or the repo id under which [`push_stages_to_hub`] put it. With
            `adapters`: the dense model, folder or repo id.
        adapters (`str`, *optional*): What [`save_adapters`] wrote. Both stages are then views of one copy of the dense
            weights, and switch adapters and blocks when they run.
        model_kwargs: For `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `revision`, ...). Remote code
            is run only with `trust_remote_code=True`, which is for a dense model: stage checkpoints have none.
            Weights are read from safetensors only.

    Raises:
        `FileNotFoundError`: If there is no plan, or a stage is missing.
        `ValueError`: If the stages and the plan are not of one export; if the adapters are of another model.
    """
    if not model_kwargs.get("use_safetensors", True):
        raise ValueError("use_safetensors must be True: weights in other files are not read")
    model_kwargs = {"trust_remote_code": False, **model_kwargs, "use_safetensors": True}
    hub_kwargs = {name: model_kwargs[name] for name in _HUB_ARGUMENTS if name in model_kwargs}
    if adapters is not None:
        StageLocation(str(source)).check_index(**hub_kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, **model_kwargs)
        model, plan, names = load_adapters(model, adapters)
        stages = (PrefillStage(model, plan, names.get("prefill")), DecodeStage(model, plan, names.get("decode")))
        fingerprint = pair_fingerprint(model, names)
        for stage in stages:  # of this training, and the same as in an export of it
            stage.fingerprint = fingerprint
        return stages
    if model_kwargs["trust_remote_code"]:
        raise ValueError("trust_remote_code is for a dense model; stage checkpoints need no code of their own")
    plan, locations = stage_locations(source, **hub_kwargs)
    check_pair(plan, locations, **hub_kwargs)
    models = {
        checkpoint: AutoModelForCausalLM.from_pretrained(location.path, subfolder=location.subfolder, **model_kwargs)
        for checkpoint, location in locations.items()
    }
    models = {stage: models[checkpoint] for stage, checkpoint in by_stage(models).items()}
    return PrefillStage(models["prefill"], plan), DecodeStage(models["decode"], plan)
