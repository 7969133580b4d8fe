"""The steps of the main job, recipes/prune.py: what each one leaves, needs and depends on."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..data import source_digest
from ..pair_layout import CHECKPOINTS, DISAGGREGATED
from ..plan import PLAN_FILE_NAME
from ..search.merged_pairs import MERGED_PAIRS_FILE_NAME
from ..search.pareto_front import FRONT_FILE_NAMES
from ..search.search_plan import JOURNAL_FILE_NAME, KV_JOURNAL_FILE_NAME
from ..shortened_config import context_length
from ..trainer import PDPruneConfig
from .benchmark_config import BenchmarkConfig
from .results import RESULTS_FILE_NAME


# What each step leaves in output_dir, in the order of the steps.
FILES_OF_STEP = {
    "plan": (
        "block_statistics.json",
        PLAN_FILE_NAME,
        JOURNAL_FILE_NAME,
        KV_JOURNAL_FILE_NAME,
        MERGED_PAIRS_FILE_NAME,
        *FRONT_FILE_NAMES,
    ),
    "stages": ("checkpoints", *CHECKPOINTS, "distillation.json"),
    "results": (RESULTS_FILE_NAME, "report.md", "pruning_plan.png", "benchmark.json"),
}
# What a distillation depends on; with other values of these an output_dir is another run.
TRAINING_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "seed", "removal_rounds", "removal_fraction",
    "bf16", "fp16",
    "distillation_loss", "distillation_temperature", "token_aware_distillation", "local_distillation_tokens",
    "local_distillation_rank", "packing_strategy", "warmup_steps", "weight_decay", "lora_rank", "lora_alpha",
    "train_fitted_layers", "stage", "full_finetuning", "removal_fade_steps", "search_in_rounds",
    "round_search_examples", "distillation_mixture", "distillation_top_k", "distillation_weight",
    "cross_entropy_weight", "hidden_matching_weight", "hidden_matching_blocks", "first_token",
)  # fmt: skip


def needed_files(stage: str) -> dict[str, tuple[str, ...]]:
    """
    Without which files a step is not done, as patterns.

    Args:
        stage (`str`): Of the training's options; `"unified"` leaves another checkpoint.
    """
    names = ("unified",) if stage == "unified" else DISAGGREGATED
    weights = (f"{name}/*.safetensors" for name in names)
    return {
        "plan": (PLAN_FILE_NAME,),
        "stages": (*(f"{name}/config.json" for name in names), *weights, "distillation.json"),
        "results": (RESULTS_FILE_NAME,),
    }


def data_settings(args: Any, part: str) -> dict[str, Any]:
    """
    The options of a text, and what tells apart local data of one name.

    Args:
        args (dataclass instance): The recipe's arguments.
        part (`str`): `calibration`, `train` or `validation`.
    """
    own = {key: value for key, value in asdict(args).items() if key.startswith(f"{part}_")}
    digest = source_digest(own[f"{part}_dataset"], own[f"{part}_split"], own[f"{part}_subset"])
    return own if digest is None else own | {f"{part}_dataset_digest": digest}


def check_context(args: Any, benchmark: BenchmarkConfig, model: PreTrainedModel) -> None:
    """
    Raises a `ValueError` that names the option whose prompts the model cannot read, before any long work.

    Args:
        args (dataclass instance): The recipe's arguments.
        benchmark ([`BenchmarkConfig`]): What will be timed.
        model ([`~transformers.PreTrainedModel`]): The dense model.
    """
    context = context_length(model.config)
    lengths = {
        "calibration_prompt_tokens": args.calibration_prompt_tokens + args.calibration_completion_tokens,
        "kv_calibration_prompt_tokens": args.kv_calibration_prompt_tokens + args.calibration_completion_tokens,
        "validation_prompt_tokens": args.validation_prompt_tokens + args.validation_completion_tokens,
        "benchmark_prompt_tokens": args.benchmark_prompt_tokens + 2 * benchmark.decode_tokens,
    }
    for name, length in lengths.items():
        if context is not None and length > context:
            raise ValueError(
                f"{name} is too long: {getattr(args, name)} tokens and those after it are {length}, the model's "
                f"context is {context}"
            )


def check_training_text(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: PDPruneConfig, context: int | None
) -> None:
    """
    Raises the `ValueError` that the training would end with after the search: where no row has a completion token
    within `max_length`, or the chat template does not fit. No more rows are read than needed.

    Args:
        rows (`Iterable[dict]`): What [`load_text`] gives.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        options ([`PDPruneConfig`]): The training's options.
        context (`int`, *optional*): Most tokens that the model can read.
    """
    first = next(iter(rows))
    if "messages" in first:
        tokenizer.apply_chat_template(first["messages"], tokenize=False)
        if options.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
            get_training_chat_template(tokenizer)
    limits = [limit for limit in (options.max_length, context) if limit is not None]
    if "prompt" not in first or options.packing or options.truncation_mode != "keep_start" or not limits:
        return
    if all(len(tokenizer(row["prompt"])["input_ids"]) >= min(limits) for row in rows):
        raise ValueError(
            f"train_dataset has no row with a completion token: every prompt fills max_length={min(limits)} "
            "(truncation_mode='keep_end' cuts the prompt instead)"
        )
