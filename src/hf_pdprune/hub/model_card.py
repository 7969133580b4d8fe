"""Model cards: the README.md of a stage checkpoint, from the plan and, where there are any, the results."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..artefact_file import write_artefact
from ..plan import PruningPlan
from ..version import __version__


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("hf_pdprune", "pruned", "prefill-decode-disaggregation", "arxiv:2509.04467")
_ROLES = {
    "prefill": "It reads the prompt, generates the first token, and hands its KV cache over to the decode stage.",
    "decode": "It takes over the KV cache that the prefill stage computed, and generates all tokens but the first.",
}
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DEFAULT_PROMPT_TOKENS = 1024


def model_card(plan: PruningPlan, stage: str, name: str, results: Mapping[str, Any] | None = None) -> str:
    """
    The text of a stage's model card.

    Args:
        plan ([`PruningPlan`]): The plan.
        stage (`str`): `"prefill"` or `"decode"`.
        name (`str`): Title of the card.
        results (`Mapping`, *optional*): What `results.json` holds; a part that is missing is left out.
    """
    is_repo_id = _REPO_ID.fullmatch(plan.base_model) is not None and not os.path.exists(plan.base_model)
    results = results or {}
    prompt_tokens = results.get("kv", {}).get("prompt_tokens", _DEFAULT_PROMPT_TOKENS)
    card_data = ModelCardData(
        # A local path would say nothing to others, and too much about the machine.
        base_model=plan.base_model if is_repo_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, stage],
    )
    token_aware = [block for block in plan.kv.token_aware_blocks if block not in plan.decode.missing_blocks]
    parts = {}
    for part in ("prefill", "decode"):
        parts[f"{part}_removed"] = _numbers(plan.stage(part).removed_blocks)
        parts[f"{part}_merged"] = _numbers(plan.stage(part).merged_blocks)
        parts[f"{part}_kept"] = len(plan.kept_blocks(part))
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        stage=stage,
        role=_ROLES[stage],
        base_model=f"`{plan.base_model if is_repo_id else Path(plan.base_model).name}`",
        model_type=plan.model_type,
        version=__version__,
        total=plan.num_hidden_layers,
        kept=plan.kept_blocks(stage),
        token_aware=token_aware and _numbers(token_aware),
        first_tokens=plan.kv.first_tokens,
        last_tokens=plan.kv.last_tokens,
        kv_prompt_tokens=prompt_tokens,
        kv_reduction=plan.kv_reduction(prompt_tokens),
        results_table=_results_table(results),
        **parts,
    )
    return str(card).rstrip() + "\n"


def write_model_cards(output_dir: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """
    Writes the cards of an exported pair anew, with results.

    Args:
        output_dir (`str`): What [`export_stages`] wrote.
        results (`Mapping`): What `results.json` holds.
    """
    plan = PruningPlan.from_pretrained(output_dir)
    for stage in ("prefill", "decode"):
        write_artefact(Path(output_dir) / stage / "README.md", model_card(plan, stage, stage, results))


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values) or "none"


def _results_table(results: Mapping[str, Any]) -> str:
    """Markdown table of the quality, where there is any, and a line on speed and bytes."""
    lines = []
    if "quality" in results:
        every = results.get("quality_all_tokens", {})
        lines += [
            "Held-out text, per completion token, against the dense model:",
            "",
            "| | perplexity | KL | perplexity, all tokens handed over | KL, all tokens handed over |",
            "|---|---|---|---|---|",
        ]
        for name, row in results["quality"].items():
            cells = [_number(part.get(key)) for part in (row, every.get(name, {})) for key in ("perplexity", "kl")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if "speed" in results:
        speed = results["speed"]
        lines.append(
            f"Time to first token: {speed['ttft_ratio']:.3f} of the dense model's; time per output token: "
            f"{speed['tpot_ratio']:.3f} of it."
        )
    if "kv" in results:
        kv = results["kv"]
        lines.append(
            f"KV bytes handed over for a prompt of {kv['prompt_tokens']} tokens: {kv['bytes_sent']:,} instead of "
            f"{kv['bytes_dense']:,}, {kv['ratio']:.2f} times fewer."
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
