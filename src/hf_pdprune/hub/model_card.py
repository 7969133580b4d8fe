"""Model cards: the README.md of a stage checkpoint, from the plan and, where there are any, the results."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..artefact_file import write_artefact
from ..pair_layout import LAYOUTS, STAGES, by_stage, checkpoint_folders
from ..plan import PruningPlan
from ..version import __version__


PICTURE_FILE_NAME = "pruning_plan.png"
RESULTS_FILE_NAME = "results.json"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("hf_pdprune", "pruned", "prefill-decode-disaggregation", "arxiv:2509.04467")
_ROLES = {
    "prefill": "It reads the prompt, generates the first token, and hands its KV cache over to the decode stage.",
    "decode": "It takes over the KV cache that the prefill stage computed, and generates all tokens but the first.",
    "unified": "It is both stages in one: it reads the prompt and generates, here or on another machine.",
}
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DEFAULT_PROMPT_TOKENS = 1024


def model_card(
    plan: PruningPlan,
    stage: str | None,
    name: str,
    results: Mapping[str, Any] | None = None,
    where: Mapping[str, tuple[str, str]] | None = None,
    licence: str | None = None,
    picture: bool = False,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """
    The text of a stage's model card.

    Args:
        plan ([`PruningPlan`]): The plan.
        stage (`str` or `None`): `"prefill"`, `"decode"` or `"unified"`; `None` for the card of a repo that holds all
            checkpoints of a pair.
        name (`str`): Title of the card.
        results (`Mapping`, *optional*): What `results.json` holds; a part that is missing is left out.
        where (`Mapping[str, tuple[str, str]]`, *optional*): Repo and subfolder of each checkpoint, for the usage code.
        licence (`str`, *optional*): Licence of the dense model, by its name on the Hub.
        picture (`bool`, defaults to `False`): Whether `pruning_plan.png` lies beside the card.
        dataset_name (`str`, *optional*): Id on the Hub of what the stages were distilled on.
        tags (`Sequence[str]`): More tags.
    """
    is_repo = is_repo_id(plan.base_model)
    results = results or {}
    if where is None:
        layout = next(layout for layout in LAYOUTS if stage in (None, *layout))
        where = {checkpoint: (f"path/to/folder/{checkpoint}", "") for checkpoint in layout}
    prompt_tokens = results.get("kv", {}).get("prompt_tokens", _DEFAULT_PROMPT_TOKENS)
    card_data = ModelCardData(
        # A local path would say nothing to others, and too much about the machine.
        base_model=plan.base_model if is_repo else None,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=dataset_name and [dataset_name],
        tags=list(dict.fromkeys([*TAGS, *(where if stage is None else (stage,)), *tags])),
        model_name=name,
        eval_results=_eval_results(results) or None,
    )
    token_aware = plan.kv.blocks_to_text(plan.decode.missing_blocks)
    parts = {"prefill_projected": plan.prefill.projected_blocks and _numbers(plan.prefill.projected_blocks)}
    for part in STAGES:
        parts[f"{part}_removed"] = _numbers(plan.stage(part).removed_blocks)
        parts[f"{part}_merged"] = _numbers(plan.stage(part).merged_blocks)
        parts[f"{part}_kept"] = len(plan.kept_blocks(part))
    arguments = {checkpoint: ", ".join(_arguments(*place)) for checkpoint, place in where.items()}
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        stage=stage,
        role=_ROLES.get(stage),
        base_model=f"`{plan.base_model if is_repo else Path(plan.base_model).name}`",
        licence=licence,
        model_type=plan.model_type,
        version=__version__,
        total=plan.num_hidden_layers,
        kept=plan.kept_blocks(stage) if stage else (),
        block_map=_block_map(plan),
        picture=PICTURE_FILE_NAME if picture else None,
        token_aware=token_aware and _numbers(token_aware),
        kept_tokens=plan.kv.to_text(),
        kv_prompt_tokens=prompt_tokens,
        kv_reduction=plan.kv_reduction(prompt_tokens),
        training=_training(plan, results),
        results_table=_results_table(results),
        first_token=results.get("serving", {}).get("first_token"),
        pair=_pair_source(where),
        alone=[checkpoint for checkpoint in where if stage in (None, checkpoint)],
        tokenizer=arguments[by_stage(where)["prefill"]],
        arguments=arguments,
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
    for name, folder in checkpoint_folders(output_dir).items():
        path = folder / "README.md"
        write_artefact(path, model_card(plan, name, name, results, licence=licence_in(path)))


def licence_in(path: str | os.PathLike) -> str | None:
    """The licence that a model card (a file) states, if there is one."""
    path = Path(path)
    if not path.is_file() or not path.read_text(encoding="utf-8", errors="replace").startswith("---"):
        return None
    try:
        return ModelCard.load(str(path)).data.get("license")
    except (ValueError, YAMLError):  # metadata that is no YAML
        return None


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repo on the Hub, and is no path here."""
    return _REPO_ID.fullmatch(name) is not None and not os.path.exists(name)


def _pair_source(where: Mapping[str, tuple[str, str]]) -> str:
    """What [`load_stages`] takes for the pair."""
    checkpoint, (path, subfolder) = next(iter(where.items()))
    return path if subfolder else path[: -len(f"-{checkpoint}")]  # or "/prefill"


def _arguments(path: str, subfolder: str) -> list[str]:
    return [f'"{path}"'] + ([f'subfolder="{subfolder}"'] if subfolder else [])


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values) or "none"


def _block_map(plan: PruningPlan) -> str:
    """The plan as a picture of characters, one column per block of the dense model."""
    blocks = range(plan.num_hidden_layers)
    prefill, decode = set(plan.prefill.missing_blocks), set(plan.decode.missing_blocks)
    projected, handed = plan.prefill.projected_blocks, {True: "w", False: "a"}
    rows = {
        "": "".join(str(block // 10) if block % 10 == 0 else " " for block in blocks),
        "block": "".join(str(block % 10) for block in blocks),
        "prefill": "".join("." if block in prefill else "k" if block in projected else "#" for block in blocks),
        "decode": "".join("." if block in decode else "#" for block in blocks),
        "handed over": "".join(
            "." if block in decode else handed[block in plan.kv.token_aware_blocks] for block in blocks
        ),
    }
    return "\n".join(f"{title:12}{row}".rstrip() for title, row in rows.items())


def _training(plan: PruningPlan, results: Mapping[str, Any]) -> list[str]:
    """What is known of how plan and weights were found, a sentence each."""
    lines = []
    calibration = plan.provenance.get("calibration")
    if isinstance(calibration, Mapping):
        name = Path(str(calibration.get("name"))).name  # of a local file only the last part
        name = str(calibration.get("name")) if is_repo_id(str(calibration.get("name"))) else name
        lines.append(
            f"The blocks were chosen on `{name}`: {calibration.get('examples')} examples of "
            f"{calibration.get('prompt_tokens')} prompt and {calibration.get('completion_tokens')} completion tokens."
        )
    distillation = results.get("distillation")
    if isinstance(distillation, Mapping) and "steps" in distillation:
        line = f"The stages were distilled from the base model for {distillation['steps']} steps"
        losses = distillation.get("losses") or []
        lines.append(line + (f"; the loss went from {losses[0][1]:.3g} to {losses[-1][1]:.3g}." if losses else "."))
    return lines


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The results as the model-index of the card's metadata takes them."""
    quality = results.get("quality", {})
    row = next((quality[name] for name in ("healed", "unhealed") if name in quality), {})
    values = {
        "perplexity": ("Perplexity, token-aware cache", row.get("perplexity")),
        "kl": ("KL to the base model, token-aware cache", row.get("kl")),
        "ttft_ratio": ("Time to first token / base model's", results.get("speed", {}).get("ttft_ratio")),
        "tpot_ratio": ("Time per output token / base model's", results.get("speed", {}).get("tpot_ratio")),
        "kv_reduction": ("KV bytes of the base model / handed over", results.get("kv", {}).get("ratio")),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name="held-out text",
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for kind, (title, value) in values.items()
        if value is not None
    ]


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
