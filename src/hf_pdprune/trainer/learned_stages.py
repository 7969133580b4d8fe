"""Writes the stages that a training has made as checkpoints of their own."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..fingerprint import combined_fingerprint
from ..hub import export_stage, export_stages
from ..inference import DecodeStage, PrefillStage
from ..plan import PruningPlan


def export_learned_stages(
    stages: tuple[PrefillStage, DecodeStage],
    plan: PruningPlan,
    output_dir: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Writes `<output_dir>/prefill` and `<output_dir>/decode`.

    Args:
        stages (`tuple[PrefillStage, DecodeStage]`): Views of one model with adapters, or of a model that learned as a
            whole and of the dense one.
        plan ([`PruningPlan`]): What they do without in the end.
        output_dir (`str`): Folder of the pair.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved beside the weights.
    """
    prefill, decode = stages
    if prefill.model is decode.model and (prefill.adapter or decode.adapter):
        adapters = {stage.name: stage.adapter for stage in stages if stage.adapter}
        export_stages(prefill.model, plan, output_dir, adapters=adapters, tokenizer=tokenizer)
        return
    fingerprint = prefill.fingerprint
    for stage in stages:
        learned = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
        fingerprint = combined_fingerprint(fingerprint, learned)
    for stage in stages:
        folder = Path(output_dir) / stage.name
        export_stage(stage.model, plan, stage.name, folder, None, tokenizer, fingerprint)
    plan.save_pretrained(output_dir)
