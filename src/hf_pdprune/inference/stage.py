"""Stage: a view of a model as one stage of a plan."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..adapters import active_adapter
from ..blocks import bypass_blocks
from ..exclusive_use import exclusive_use
from ..fingerprint import model_fingerprint
from ..pair_layout import served_stages
from ..plan import PruningPlan
from ..projected_blocks import project_blocks


class Stage:
    """
    A model seen as one stage of a plan. The dense model becomes the stage while [`Stage.active`] lasts: its missing
    blocks are bypassed and the stage's adapter is applied. So both stages, and the dense teacher, share one copy of
    the weights. A stage checkpoint is the stage already, a unified one either stage; but of projected blocks, whose
    other weights are zero there, only a `Stage` leaves out the work. Stages that share a model take turns where
    several threads use them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model (with adapters or not), or a checkpoint of this
            stage.
        plan ([`PruningPlan`]): The plan.
        adapter (`str`, *optional*): Name of the adapter that this stage applies.
        module (`nn.Module`, *optional*): What is called in a forward where that is not `model` itself but a wrapper
            around it (`DistributedDataParallel` and the like).
        fingerprint (`str`, *optional*): What both stages of a pair share. Default: that of the model.

    Raises:
        `ValueError`: If the model is neither the plan's dense model nor a checkpoint of this stage.
    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        adapter: str | None = None,
        module: nn.Module | None = None,
        fingerprint: str | None = None,
    ):
        blocks = plan.blocks_of(model.config)
        entry = getattr(model.config, "pdprune", None)
        if entry is not None and self.name not in served_stages(entry["stage"]):
            raise ValueError(f"the model is a {entry['stage']} stage, not a {self.name} stage")
        self.model = model
        self.plan = plan
        self.adapter = adapter
        self.module = model if module is None else module
        self.running_blocks = plan.kept_blocks(self.name)
        self.bypassed = tuple(index for index, block in enumerate(blocks) if block not in self.running_blocks)
        projected = plan.stage(self.name).projected_blocks
        self.projected = tuple(index for index, block in enumerate(blocks) if block in projected)
        self.fingerprint = model_fingerprint(model) if fingerprint is None else fingerprint

    def generation_setting(self, generate_kwargs: Mapping[str, Any], name: str) -> Any:
        """What `model.generate(**generate_kwargs)` will use for `name`; `None` for a default of transformers."""
        if name in generate_kwargs:
            return generate_kwargs[name]
        value = getattr(generate_kwargs.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def check_generation_settings(self, generate_kwargs: Mapping[str, Any], generates_first: bool) -> None:
        """
        Raises a `ValueError` for settings of `model.generate` that a hand-over cannot honour.

        Args:
            generate_kwargs (`Mapping[str, Any]`): As for `model.generate`.
            generates_first (`bool`): Whether prefill generates the first token.
        """
        if self.generation_setting(generate_kwargs, "use_cache") is False:
            raise ValueError("use_cache=False leaves nothing to hand over")
        if generates_first and self.generation_setting(generate_kwargs, "guidance_scale") not in (None, 1):
            raise ValueError(
                "guidance_scale compares with an answer to the prompt's last token alone, which decode does not have: "
                "let it generate the first token, too (first_token='decode')"
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """
        Within this context the model is this stage. Where it is another model otherwise, other threads wait that want
        it to be a stage, too; checkpoints of the stages are used side by side.
        """
        changes = self.bypassed or self.projected or hasattr(self.model, "peft_config")
        with exclusive_use(self.model) if changes else nullcontext():
            bypassed = bypass_blocks(self.model, self.bypassed)
            with bypassed, project_blocks(self.model, self.projected), active_adapter(self.model, self.adapter):
                yield


def position_ids(padding_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among its row's real tokens, shape `(batch_size, tokens)`; padding gets 0."""
    return (padding_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
