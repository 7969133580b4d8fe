"""
Quality of a pair of stages beside the dense model's: perplexity, KL and top-1 agreement on held-out text, and tasks
of lm-eval, all through the hand-over as it is deployed.

    accelerate launch recipes/evaluate.py --config recipes/smollm2-135m/evaluate.yaml --stages outputs/demo

With --data_folder tasks read JSON lines from there (<task>.<data_split>.jsonl) and need no network; a task without
such a file is named and left out. Worked examples (--num_fewshot) are the first rows of <task>.calibration.jsonl.
Without it tasks are lm-eval's own, from the Hub. Several processes share requests.

Interrupt it wherever you like: evaluation.jsonl keeps every finished task, answers/ the answers to single requests,
and the same command goes on from there. Prints a table; the last line on stdout is JSON. Into the folder go
results.json, report.md and its pictures.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from hf_pdprune import DecodeStage, PrefillStage, PruningPlan
from hf_pdprune.artefact_file import read_json
from hf_pdprune.data import PromptCompletionCollator, load_text, source_digest, tokenize_examples
from hf_pdprune.evaluation import compare_hand_overs, handing_over_all_tokens, write_report, write_results
from hf_pdprune.evaluation.benchmark import kv_bytes_of_prompt
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import check_dense_model, load_tokenizer
from hf_pdprune.evaluation.environment import describe_environment
from hf_pdprune.evaluation.overlap_config import OverlapConfig
from hf_pdprune.evaluation.pair_source import PairSource
from hf_pdprune.evaluation.process_group import join_processes
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.result_table import ResultTable
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.evaluation.task_comparison import compare_tasks, mean_accuracy
from hf_pdprune.evaluation.text_overlap import shown_text
from hf_pdprune.integrations.lm_eval import PDPruneLM
from hf_pdprune.integrations.task_evaluation import TaskEvaluation
from hf_pdprune.kv import QUANTIZATIONS
from hf_pdprune.pair_layout import STAGES, check_first_token, stage_folders
from hf_pdprune.shortened_config import context_length


# evaluate.py of this folder has the name of a library that lm-eval needs.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

logger = logging.getLogger(__name__)

ROWS_FILE_NAME = "evaluation.jsonl"
PLACES = ("stages", "dense", "data_folder", "output_dir")
# What a run leaves in results.json, as a whole. The environment stays: kept results come from where they were made.
PARTS = ("tasks", "tasks_skipped", "tasks_mean", "overlap", "quality_of_stages", "quality_of_stages_all_tokens")
PARTS += ("kv_of_stages", "kv_of_stages_all_tokens")


@dataclass
class EvaluateArguments(OverlapConfig):
    """Which models are evaluated, and on what."""

    stages: str = field(metadata={"help": "Folder of the pair, as recipes/prune.py writes it."})
    dense: str | None = field(
        default=None, metadata={"help": "The dense model: repo id or folder. Default: the one that the plan names."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results. Default: stages."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: the checkpoint's."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    batch_size: int = field(default=8, metadata={"help": "Requests per forward."})
    tasks: list[str] = field(
        default_factory=lambda: ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"],
        metadata={"help": "Tasks of lm-eval by their usual names; on local data also wikitext2 and lambada."},
    )
    data_folder: str | None = field(
        default=None, metadata={"help": "Folder with <task>.<data_split>.jsonl. Default: data from the Hub."}
    )
    data_split: str = field(default="validation", metadata={"help": "Part of the local data to evaluate on."})
    limit: int | None = field(default=None, metadata={"help": "Rows per task, from the first on. Default: all."})
    num_fewshot: int | None = field(
        default=None,
        metadata={
            "help": "Worked examples before each question, on local data from <task>.calibration.jsonl. Default: as "
            "each task says."
        },
    )
    text_dataset: str | None = field(
        default="pydoc-topics", metadata={"help": "Held-out text for perplexity and KL. none: leave them out."}
    )
    text_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    text_split: str = field(default="validation", metadata={"help": "Split of that data set."})
    text_examples: int = field(default=24, metadata={"help": "Examples used of it."})
    text_prompt_tokens: int = field(default=320, metadata={"help": "Prompt tokens of an example."})
    text_completion_tokens: int = field(default=64, metadata={"help": "Completion tokens of an example."})
    first_token: str = field(
        default="prefill",
        metadata={
            "help": "Which stage predicts the first token of an answer. decode reads the prompt's last token for it.",
            "choices": list(STAGES),
        },
    )
    quantizations: list[str] = field(
        default_factory=list,
        metadata={"help": "fp8, int8, int4: on text, payloads of so few bits are measured, too."},
    )
    kv_prompt_tokens: int = field(
        default=1024,
        metadata={"help": "Length of the prompt whose KV bytes are counted, at most what the model's context takes."},
    )

    def __post_init__(self):
        names = ("limit", "batch_size", "text_examples", "text_prompt_tokens", "text_completion_tokens")
        for name in (*names, "kv_prompt_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_dataset is not None and self.text_dataset.lower() == "none":
            self.text_dataset = None
        check_first_token(self.first_token)
        for kind in self.quantizations:
            if kind not in QUANTIZATIONS:
                raise ValueError(f"quantizations must be of {', '.join(QUANTIZATIONS)}, got {kind!r}")
        super().__post_init__()


class Models:
    """The dense model and the pair, loaded when a result of theirs is missing."""

    def __init__(self, args: EvaluateArguments):
        self.args = args
        self.plan = PruningPlan.from_pretrained(args.stages)
        self.dense_name = args.dense or self.plan.base_model
        self.kwargs = {"batch_size": args.batch_size, "dtype": self._dtype()}
        if args.attn_implementation is not None:
            self.kwargs["attn_implementation"] = args.attn_implementation

    def _dtype(self) -> str:
        return "float32" if self.args.dtype == "auto" and PartialState().device.type == "cpu" else self.args.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return load_tokenizer(PairSource(self.args.stages).tokenizer.name)
        except (OSError, ValueError):  # exported without one
            return load_tokenizer(self.dense_name)

    @cached_property
    def dense(self) -> PDPruneLM:
        lm = PDPruneLM(self.dense_name, plan="empty", tokenizer=self.tokenizer, **self.kwargs)
        check_dense_model(lm.model, self.dense_name, self.args.stages)
        return lm

    @cached_property
    def pruned(self) -> PDPruneLM:
        first_token = self.args.first_token
        return PDPruneLM(self.args.stages, tokenizer=self.tokenizer, first_token=first_token, **self.kwargs)

    @cached_property
    def identities(self) -> dict[str, dict[str, str]]:
        """What tells models apart whose results may differ."""
        fingerprint = read_json(stage_folders(self.args.stages)["prefill"] / "config.json").get("pdprune", {})
        recorded = fingerprint.get("dense_fingerprint")
        weights = {} if recorded is None else {"weights": recorded}
        if recorded is not None:
            _ = self.dense  # whose weights are checked: those of its name may have changed since the last run
        first_token = {} if self.args.first_token == "prefill" else {"first_token": self.args.first_token}
        return {
            "dense": {"dense": self.dense_name, "dtype": self._dtype(), **weights},
            "pruned": {
                "plan": self.plan.digest,
                "fingerprint": fingerprint.get("fingerprint", ""),
                "dtype": self._dtype(),
                **first_token,
            },
        }


def evaluated_texts(
    args: EvaluateArguments, evaluation: TaskEvaluation, tasks: list[str]
) -> Iterator[tuple[str, Iterable[str]]]:
    """What must not have been seen in search or distillation."""
    for task in tasks:
        yield task, evaluation.texts(task, args.limit)
    if args.text_dataset is not None:
        rows = load_text(args.text_dataset, args.text_split, subset=args.text_subset)
        yield args.text_dataset, map(shown_text, rows)


def text_settings(args: EvaluateArguments) -> dict[str, Any]:
    """What the quality on text depends on beside the models."""
    own = {name: value for name, value in vars(args).items() if name.startswith(("text_", "quantizations", "kv_"))}
    digest = source_digest(args.text_dataset, args.text_split, args.text_subset)
    return own if digest is None else own | {"text_digest": digest}


def quality(args: EvaluateArguments, models: Models) -> dict[str, Any]:
    """Perplexity, KL and top-1 agreement of both models on held-out text, and the KV bytes that are handed over."""
    examples = tokenize_examples(
        load_text(args.text_dataset, args.text_split, subset=args.text_subset),
        models.tokenizer,
        args.text_prompt_tokens,
        args.text_completion_tokens,
        args.text_examples,
    )
    collator = PromptCompletionCollator(models.tokenizer.pad_token_id, first_token=args.first_token)
    size = args.batch_size
    batches = [collator(examples[begin : begin + size]) for begin in range(0, len(examples), size)]
    dense, prefill, decode = models.dense.prefill.model, models.pruned.prefill, models.pruned.decode
    pairs: dict[str, tuple[PrefillStage, DecodeStage]] = {"pruned": (prefill, decode)}
    pairs |= {f"pruned, {kind}": (prefill.quantized(kind), decode) for kind in args.quantizations}
    by_plan, all_tokens = compare_hand_overs(dense, pairs, batches)
    sent, sent_all = {}, {}
    context = context_length(dense.config)
    tokens = args.kv_prompt_tokens if context is None else min(args.kv_prompt_tokens, context - 1)
    for name, (stage, _) in pairs.items():
        for kept, own in ((sent, stage), (sent_all, handing_over_all_tokens(stage))):
            kept[name] = {"prompt_tokens": tokens, **kv_bytes_of_prompt(own, tokens)}
    return {
        "quality_of_stages": by_plan,
        "quality_of_stages_all_tokens": all_tokens,
        "kv_of_stages": sent,
        "kv_of_stages_all_tokens": sent_all,
    }


def file_digest(path: Path | None) -> str:
    """Tells data files apart."""
    return "hub" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def get_or_make(rows: RowFile, settings: dict[str, Any], make: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """A result that is there, or that all processes make and the main one keeps."""
    found = rows.get(settings)
    if found is None:
        rows.add(settings, make() or {})
        found = rows.get(settings)
    return found


def main(args: EvaluateArguments) -> None:
    state = join_processes()
    folder = Path(args.output_dir or args.stages)
    models = Models(args)
    evaluation = TaskEvaluation(args.tasks, args.data_folder, args.data_split, args.num_fewshot)
    skipped = evaluation.missing()
    for task, reason in skipped.items():
        logger.warning("task %s is left out: %s", task, reason)
    tasks = [task for task in evaluation.tasks if task not in skipped]
    overlap = args.check_overlap(evaluated_texts(args, evaluation, tasks), folders=[args.stages])

    rows = RowFile(folder / ROWS_FILE_NAME, write=state.is_main_process)
    state.wait_for_everyone()  # nobody writes before all have read
    known = len(rows)
    results: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {}}
    for name, identity in models.identities.items():
        for task in tasks:
            settings = identity | {
                "task": task,
                "data": file_digest(evaluation.file_of(task)),
                "limit": args.limit,
                "num_fewshot": args.num_fewshot,
                "lm_eval": version("lm_eval"),
            }
            shots = evaluation.shots_file_of(task)
            if shots is not None:
                settings["shots"] = file_digest(shots)
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
            cache = folder / "answers" / f"{key}.{task}"
            results[name][task] = get_or_make(
                rows,
                settings,
                lambda name=name, task=task, cache=cache: evaluation.run(
                    getattr(models, name), task, args.limit, cache
                ),
            )
    measured: dict[str, Any] = {}
    if args.text_dataset is not None and state.is_main_process:
        settings = {**models.identities, **text_settings(args)}
        measured = get_or_make(rows, settings, lambda: quality(args, models))
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    compared = compare_tasks(results["dense"], results["pruned"])
    mean = mean_accuracy(compared)
    parts: dict[str, Any] = {"tasks": compared, "tasks_skipped": skipped, "overlap": overlap, **measured}
    if mean is not None:
        parts["tasks_mean"] = mean
    if len(rows) > known:
        parts["evaluation_environment"] = describe_environment(models.dense.prefill.model)
    if folder != Path(args.stages):
        models.plan.save_pretrained(folder)
    write_results(folder, parts, replaced=PARTS)
    record_command(folder, "evaluate", command_line("recipes/evaluate.py", args, folders=PLACES))
    write_report(folder)
    if compared:
        print(ResultTable.of_tasks(compared, mean).to_text(), "\n")
    if measured:
        print(ResultTable.of_stage_quality(measured).to_text(), "\n")
    for task, reason in skipped.items():
        print(f"left out: {task} ({reason})")
    print(json.dumps({"tasks_mean": mean, "tasks_skipped": list(skipped), **_short(compared, measured)}))


def _short(compared: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The numbers that fit on a line."""
    values = {task: [part["dense"], part["pruned"]] for task, part in compared.items()}
    kl = {name: part["kl"] for name, part in measured.get("quality_of_stages", {}).items()}
    fewer = {name: round(part["ratio"], 2) for name, part in measured.get("kv_of_stages", {}).items()}
    return {"tasks": values, "kl": kl, "kv_times_fewer": fewer}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    run_recipe(main, EvaluateArguments, description=__doc__, goes_on=True)
