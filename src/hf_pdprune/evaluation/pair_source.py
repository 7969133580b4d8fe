"""PairSource: where a pair of stages comes from, in words that a command line has."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..hub import load_stages
from ..hub.adapter_checkpoint import add_adapters_of
from ..hub.load_stages import StageLocation, stage_locations
from ..inference import DecodeStage, PrefillStage
from ..pair_layout import by_stage, served_stages
from ..plan import PruningPlan


@dataclass
class PairSource:
    """
    Where a pair of stages comes from. One of three ways:

    - `pretrained` alone: a pair, folder or repo id (see [`load_stages`]);
    - `prefill` and `decode`: a checkpoint each, folder or repo (twice the same for a unified model);
    - `pretrained` and `plan`: the dense model, seen as both stages of a plan (and `adapters`, where there are any).

    Args:
        pretrained (`str`, *optional*): A pair, or the dense model (repo id or folder).
        prefill (`str`, *optional*): Prefill stage checkpoint.
        decode (`str`, *optional*): Decode stage checkpoint.
        plan (`str` or [`PruningPlan`], *optional*): Plan of the dense model; `"empty"` removes nothing.
        adapters (`str`, *optional*): Folder with the adapters of the dense model (see [`save_adapters`]).

    Raises:
        `ValueError`: If that is not one of the three ways.
    """

    pretrained: str | None = None
    prefill: str | None = None
    decode: str | None = None
    plan: str | PruningPlan | None = None
    adapters: str | None = None

    def __post_init__(self):
        if (self.prefill is None) != (self.decode is None):
            missing = "decode" if self.decode is None else "prefill"
            raise ValueError(f"a pair has two stages: {missing}= is missing")
        if (self.pretrained is None) == (self.prefill is None):
            raise ValueError(
                "give either pretrained= (folder of a pair, or dense model with plan=) or prefill= and decode="
            )
        if self.plan is not None and self.pretrained is None:
            raise ValueError("plan= goes with a dense model (pretrained=); stage checkpoints carry their own")
        if self.adapters is not None and self.plan is None:
            raise ValueError("adapters= go with a dense model and plan=; stage checkpoints have theirs merged")

    @property
    def tokenizer(self) -> StageLocation:
        """Where the tokenizer is."""
        if self.prefill is not None or self.plan is not None:
            return StageLocation(self.prefill or self.pretrained)
        _, locations = stage_locations(self.pretrained)
        return locations[by_stage(locations)["prefill"]]

    def load(self, **model_kwargs: Any) -> tuple[PrefillStage, DecodeStage]:
        """
        Both stages, in eval mode.

        Args:
            model_kwargs: For `AutoModelForCausalLM.from_pretrained` (`dtype`, `attn_implementation`, ...).

        Raises:
            `FileNotFoundError`: If there is no such pair, plan or model.
            `ValueError`: If the stages do not belong together, or to the plan.
        """
        if self.plan is not None:
            return self._load_dense(**model_kwargs)
        if self.prefill is None:
            return load_stages(self.pretrained, **model_kwargs)
        configs = {"prefill": _config(self.prefill), "decode": _config(self.decode)}
        plans, fingerprints = {}, {}
        for stage, config in configs.items():
            entry = None if getattr(config, "pdprune", None) is None else PruningPlan.entry_of(config)
            if entry is None or stage not in served_stages(entry["stage"]):
                what = "no stage checkpoint" if entry is None else f"a {entry['stage']} stage"
                raise ValueError(f"{stage}={getattr(self, stage)} is {what}")
            plans[stage], fingerprints[stage] = PruningPlan.from_config(config), entry["fingerprint"]
        if plans["prefill"].digest != plans["decode"].digest:
            raise ValueError(
                f"prefill={self.prefill} and decode={self.decode} are stages of different plans "
                f"({plans['prefill'].digest[:8]} and {plans['decode'].digest[:8]})"
            )
        if fingerprints["prefill"] != fingerprints["decode"]:
            raise ValueError(
                f"prefill={self.prefill} and decode={self.decode} are not of one pair: they were exported from "
                "different models or adapters"
            )
        models = {name: _model(name, **model_kwargs) for name in dict.fromkeys((self.prefill, self.decode))}
        plan = plans["prefill"]
        return PrefillStage(models[self.prefill], plan), DecodeStage(models[self.decode], plan)

    def _load_dense(self, **model_kwargs: Any) -> tuple[PrefillStage, DecodeStage]:
        model, names = _model(self.pretrained, **model_kwargs), {}
        plan = self.plan
        if plan == "empty":
            plan = PruningPlan.empty(model)
        elif not isinstance(plan, PruningPlan):
            plan = PruningPlan.from_pretrained(plan)
        if self.adapters is not None:
            model, names = add_adapters_of(model, self.adapters)
            model = model.get_base_model()
        return PrefillStage(model, plan, names.get("prefill")), DecodeStage(model, plan, names.get("decode"))


def _config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"no checkpoint {name!r}: {str(error).splitlines()[0]}") from error


def _model(name: str, **model_kwargs: Any) -> AutoModelForCausalLM:
    _config(name)  # its error is shorter than the weights' one
    StageLocation(name).check_index()
    model_kwargs = {"trust_remote_code": False, **model_kwargs}
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **model_kwargs).eval()
