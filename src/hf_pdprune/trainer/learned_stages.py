"""Writes the stages that a training has made as checkpoints of their own."""

import os

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..fingerprint import combined_fingerprint, model_fingerprint
from ..hub.dense_fingerprint import dense_fingerprint
from ..hub.stage_checkpoint import StageBuilder, export_pair, pair_fingerprint
from ..inference import DecodeStage, PrefillStage
from ..pair_layout import DISAGGREGATED, served_stages
from ..plan import PruningPlan
from ..spread_weights import is_partitioned, whole_embeddings


def export_learned_stages(
    stages: tuple[PrefillStage, DecodeStage],
    plan: PruningPlan,
    output_dir: str | os.PathLike,
    layout: tuple[str, ...] = DISAGGREGATED,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Writes `<output_dir>/prefill` and `<output_dir>/decode`, or what else the layout says.

    Args:
        stages (`tuple[PrefillStage, DecodeStage]`): Views of one model with adapters, or of a model that learned as a
            whole and of the dense one.
        plan ([`PruningPlan`]): What they do without in the end.
        output_dir (`str`): Folder of the pair.
        layout (`tuple[str, ...]`, defaults to `("prefill", "decode")`): The checkpoints.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
    """
    by_name = {stage.name: stage for stage in stages}
    # Those of one checkpoint are one model with one adapter.
    sources = {checkpoint: by_name[served_stages(checkpoint)[0]] for checkpoint in layout}
    prefill, decode = stages
    if prefill.model is decode.model and (prefill.adapter or decode.adapter):
        fingerprint = pair_fingerprint(prefill.model, {stage.name: stage.adapter for stage in stages if stage.adapter})
        dense = prefill.model
    else:
        fingerprint = prefill.fingerprint
        still = (s.model for s in stages if not any(p.requires_grad for p in s.model.parameters()))
        dense = next(still, None)  # a model that learned as a whole is the dense one no more
        for stage in stages:
            learned = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
            fingerprint = combined_fingerprint(fingerprint, learned)
    of_dense = None if dense is None else dense_fingerprint(dense)
    builders = {
        checkpoint: StageBuilder(stage.model, plan, checkpoint, stage.adapter, fingerprint, of_dense)
        for checkpoint, stage in sources.items()
    }
    export_pair(builders, plan, output_dir, tokenizer)


def shared_fingerprint(model: nn.Module) -> tuple[str, bool]:
    """What both stages of a dense model share; and whether ZeRO-3 has partitioned it while it was loaded."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with whole_embeddings(base):
        return model_fingerprint(base), is_partitioned(base.get_input_embeddings())
