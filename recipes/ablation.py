"""
What each part of a plan costs and brings, and how it compares with the field's ways to choose blocks.

    accelerate launch recipes/ablation.py --config recipes/smollm2-135m/ablation.yaml --plan outputs/demo

Sections: `parts` (blocks only, cache only, both), `healing` (pairs given by --healed), `strategies` (ShortGPT, SLEB,
the end group, contiguous, random, and as many blocks in all in another split: the same ones out of both stages, and
more out of prefill than out of decode), `windows`, `caches` (which prompt tokens cross, at equal bytes),
`quantization`, `draft` (the pruned decode stage as draft of the dense model). Every result is a line of ablation.jsonl
as soon as it is known: the same command goes on with what is missing. Writes ablation.md; the last line on stdout is
JSON.

Several processes share searches and the requests of tasks; quality on text and drafts are measured by the main one
alone, and the others wait. A task whose data are not in --data_folder is named and left out.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_pdprune import DecodeStage, PrefillStage, PruningPlan
from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.data import PromptCompletionCollator, load_text, public_name, tokenize_examples
from hf_pdprune.evaluation import evaluate_quality
from hf_pdprune.evaluation.ablation_report import PLAN, SECTIONS, ablation_tables
from hf_pdprune.evaluation.ablation_variants import SPLITS, AblationVariants
from hf_pdprune.evaluation.benchmark import kv_bytes_of_prompt
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model, load_tokenizer
from hf_pdprune.evaluation.draft_acceptance import draft_acceptance
from hf_pdprune.evaluation.overlap_config import OverlapConfig
from hf_pdprune.evaluation.process_group import join_processes
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.evaluation.task_comparison import accuracies_and_others
from hf_pdprune.evaluation.text_overlap import shown_text
from hf_pdprune.hub import build_stage, load_stages
from hf_pdprune.integrations.lm_eval import PDPruneLM
from hf_pdprune.integrations.task_evaluation import TaskEvaluation
from hf_pdprune.kv import QUANTIZATIONS
from hf_pdprune.search import BlockStatistics, Calibration, SearchConfig, search_plan
from hf_pdprune.search.search_config import STRATEGIES


# evaluate.py of this folder has the name of a library that lm-eval needs.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

logger = logging.getLogger(__name__)

PLACES = ("plan", "dense", "data_folder", "output_dir")
ROWS_FILE_NAME = "ablation.jsonl"
REPORT_FILE_NAME = "ablation.md"
Pair = tuple[PrefillStage, DecodeStage]


@dataclass
class AblationArguments(OverlapConfig):
    """What is compared, and on what."""

    plan: str = field(metadata={"help": "Folder with the stage-wise plan."})
    output_dir: str = field(metadata={"help": "Folder for the rows and the tables."})
    dense: str | None = field(
        default=None, metadata={"help": "The dense model. Default: the one that the plan names."}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: the checkpoint's."})
    sections: list[str] = field(
        default_factory=lambda: ["parts", "strategies", "windows", "draft"],
        metadata={"help": f"Of {', '.join(SECTIONS)}."},
    )
    healed: list[str] = field(
        default_factory=list, metadata={"help": "Pairs for the section healing, each as name=folder."}
    )
    strategies: list[str] = field(
        default_factory=lambda: ["one_shot", "end_group", "contiguous", "random", "greedy", "unified", "mirrored"],
        metadata={
            "help": "Strategies of the search. unified: greedy, the same blocks out of both stages; mirrored: "
            "annealing under the relaxed subset rule, prefill losing as many as the plan's decode, and decode as its "
            "prefill."
        },
    )
    random_seeds: int = field(default=3, metadata={"help": "Draws of the strategy random."})
    windows: list[str] = field(
        default_factory=lambda: ["0+128", "4+124", "16+112", "64+64", "16+48"],
        metadata={"help": "Windows, each as first+last tokens."},
    )
    calibration_dataset: str = field(default="pydoc-topics", metadata={"help": "Text for the searches."})
    calibration_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    calibration_split: str = field(default="calibration", metadata={"help": "Split of that data set."})
    calibration_examples: int = field(default=8, metadata={"help": "Examples used of it."})
    calibration_prompt_tokens: int = field(default=128, metadata={"help": "Prompt tokens of an example."})
    calibration_completion_tokens: int = field(default=32, metadata={"help": "Completion tokens of an example."})
    text_dataset: str = field(default="pydoc-topics", metadata={"help": "Held-out text for KL and perplexity."})
    text_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    text_split: str = field(default="validation", metadata={"help": "Split of that data set."})
    text_examples: int = field(default=16, metadata={"help": "Examples used of it."})
    text_prompt_tokens: int = field(default=320, metadata={"help": "Prompt tokens of an example."})
    text_completion_tokens: int = field(default=64, metadata={"help": "Completion tokens of an example."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of lm-eval for the mean accuracy."})
    data_folder: str | None = field(default=None, metadata={"help": "Folder with their data. Default: the Hub."})
    limit: int | None = field(default=None, metadata={"help": "Rows per task."})
    batch_size: int = field(default=4, metadata={"help": "Examples per forward."})
    draft_prompts: int = field(default=8, metadata={"help": "Prompts that assisted decoding continues."})
    draft_tokens: int = field(default=64, metadata={"help": "Tokens by which it continues them."})

    def __post_init__(self):
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown:
            raise ValueError(f"sections: unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
        if "healing" in self.sections and not self.healed:
            raise ValueError("sections: healing needs healed (name=folder)")
        for entry in self.healed:
            if "=" not in entry:
                raise ValueError(f"healed: {entry!r} is not name=folder")
        for entry in self.windows:
            parts = entry.split("+")
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise ValueError(f"windows: {entry!r} is not first+last")
        for name in self.strategies:
            if name not in (*SPLITS, *STRATEGIES):
                raise ValueError(f"strategies: unknown strategy {name!r}")
        super().__post_init__()

    def part(self, prefix: str) -> dict[str, Any]:
        """Options that begin with a prefix: what a result depends on."""
        return {name: value for name, value in vars(self).items() if name.startswith(prefix)}


class Study:
    """The dense model, what is measured on it, and the rows that are known."""

    def __init__(self, args: AblationArguments):
        self.args = args
        self.state = PartialState()
        self.plan = PruningPlan.from_pretrained(args.plan)
        self.dense_name = args.dense or self.plan.base_model
        self.rows = RowFile(Path(args.output_dir) / ROWS_FILE_NAME, write=self.state.is_main_process)
        self.state.wait_for_everyone()  # nobody writes before all have read
        self.variants = AblationVariants(self.plan)
        self.evaluation = TaskEvaluation(args.tasks, args.data_folder) if args.tasks else None
        self.tasks, self.skipped = [], {}
        if self.evaluation is not None:
            self.skipped = self.evaluation.missing()
            self.tasks = [task for task in self.evaluation.tasks if task not in self.skipped]
        for task, reason in self.skipped.items():
            logger.warning("task %s is left out: %s", task, reason)

        self.measured_by = {
            "plan_of_study": self.plan.digest,
            "dense": self.dense_name,
            **args.part("text_"),
            "tasks": self.tasks,
            "limit": args.limit,
        }
        self._check_rows()
        self._check_overlap()

    def _check_rows(self) -> None:
        """A table must not mix what was measured on different text."""
        for row in self.rows:
            there = row["settings"]
            if "section" not in there:
                continue
            for key, value in self.measured_by.items():
                if there.get(key) != value:
                    raise ValueError(
                        f"{self.rows.path} holds a study with {key}={there.get(key)!r}, not {value!r}: choose another "
                        "output_dir"
                    )

    def _check_overlap(self) -> None:
        """What is measured on must not be what the plan and the pairs, or the searches of the study, have seen."""
        args = self.args
        folders = [args.plan, *(entry.partition("=")[2] for entry in args.healed)]
        own = (args.calibration_dataset, args.calibration_split, args.calibration_subset)
        args.check_overlap(self._evaluated_texts(), folders, [own] if "strategies" in args.sections else [])

    def _evaluated_texts(self) -> Iterator[tuple[str, Iterable[str]]]:
        args = self.args
        rows = load_text(args.text_dataset, args.text_split, subset=args.text_subset)
        yield args.text_dataset, map(shown_text, rows)
        for task in self.tasks:
            yield task, self.evaluation.texts(task, args.limit)

    @cached_property
    def dense(self) -> PreTrainedModel:
        pairs = [self.args.plan, *(entry.partition("=")[2] for entry in self.args.healed)]
        return load_dense_model(self.dense_name, pairs, self.args.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.dense_name)

    @cached_property
    def examples(self) -> list[dict[str, list[int]]]:
        args = self.args
        rows = load_text(args.text_dataset, args.text_split, subset=args.text_subset)
        lengths = (args.text_prompt_tokens, args.text_completion_tokens)
        return tokenize_examples(rows, self.tokenizer, *lengths, args.text_examples)

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        collator, size = PromptCompletionCollator(self.tokenizer.pad_token_id), self.args.batch_size
        return [collator(self.examples[begin : begin + size]) for begin in range(0, len(self.examples), size)]

    @cached_property
    def calibration(self) -> Calibration:
        args = self.args
        rows = load_text(args.calibration_dataset, args.calibration_split, subset=args.calibration_subset)
        lengths = (args.calibration_prompt_tokens, args.calibration_completion_tokens, args.calibration_examples)
        name = public_name(args.calibration_dataset)
        return Calibration.from_rows(self.dense, self.tokenizer, rows, *lengths, batch_size=args.batch_size, name=name)

    @cached_property
    def statistics(self) -> BlockStatistics:
        return BlockStatistics.measure(self.dense, self.calibration.batches, base_model=self.plan.base_model)

    def searched(self, strategy: str, seed: int = 0) -> tuple[PruningPlan, float]:
        """The plan that a strategy finds, and its cost in dense forwards; kept as a row of its own."""
        strategy, prefill, decode = self.variants.split(strategy)
        config = SearchConfig(
            num_prefill_blocks=prefill,
            num_decode_blocks=decode,
            strategy=strategy,
            search_seed=seed,
            relaxed_subset_rule=prefill > decode,
        )
        settings = {
            "search": strategy,
            "blocks": [prefill, decode],
            "seed": seed,
            "dense": self.dense_name,
            **self.args.part("calibration_"),
        }

        def search() -> dict[str, Any]:
            plan = search_plan(self.dense, self.calibration, self.statistics, config)
            cost = plan.provenance["cost"]["blocks"]
            spent = cost["block_tokens"] + cost["reference_block_tokens"]
            return {"plan": plan.to_dict(), "cost": spent / cost["dense_forward_block_tokens"]}

        found = self.rows.get_or_make(settings, search)
        return PruningPlan.from_dict(found["plan"]), found["cost"]

    def measure(self, section: str, name: str, plan: PruningPlan, pair: Callable[[], Pair], **more: Any) -> None:
        """
        One row: quality on text, results of tasks, and what the plan saves. Only the main process, which writes it,
        has all of it.
        """
        settings = {"section": section, "variant": name, "plan": plan.digest, **self.measured_by}

        def make() -> dict[str, Any]:
            prefill, decode = pair()
            result = {
                "prefill": list(plan.prefill.skipped_blocks),
                "decode": list(plan.decode.missing_blocks),
                "kv_reduction": plan.kv_reduction(self.args.text_prompt_tokens)["total"],
                **more,
            }
            if prefill.quantization is not None:  # fewer bytes, and not only entries
                sent = kv_bytes_of_prompt(prefill, self.args.text_prompt_tokens)
                result["kv_reduction"] = sent["bytes_dense"] / sent["bytes_kv"]
            if self.state.is_main_process:
                result["quality"] = evaluate_quality(prefill, decode, self.dense, self.batches)
            return result | self.task_results(prefill, decode)

        self.rows.get_or_make(settings, make)

    def task_results(self, prefill: PrefillStage, decode: DecodeStage) -> dict[str, Any]:
        """What the tasks come to. Nothing in processes but the main one, which has the answers of all."""
        if not self.tasks:
            return {}
        lm = PDPruneLM(prefill=prefill, decode=decode, tokenizer=self.tokenizer, batch_size=self.args.batch_size)
        results = {task: self.evaluation.run(lm, task, self.args.limit) for task in self.tasks}
        return accuracies_and_others({task: result for task, result in results.items() if result is not None})

    def view(self, plan: PruningPlan) -> Pair:
        """The dense model, seen as both stages of a plan."""
        return PrefillStage(self.dense, plan), DecodeStage(self.dense, plan)

    def healed_pair(self, folder: str) -> Pair:
        """A pair's checkpoints, beside the dense model."""
        pair = load_stages(folder, dtype=self.dense.dtype)
        for stage in pair:
            stage.model.to(self.dense.device)
        return pair

    # Sections

    def parts(self) -> None:
        for name, plan in self.variants.parts():
            self.measure("parts", name, plan, lambda plan=plan: self.view(plan))

    def healing(self) -> None:
        self.measure("healing", "unhealed", self.plan, lambda: self.view(self.plan))
        for entry in self.args.healed:
            name, _, folder = entry.partition("=")
            plan = PruningPlan.from_pretrained(folder)
            self.measure("healing", name, plan, lambda folder=folder: self.healed_pair(folder))

    def strategies(self) -> None:
        self.measure("strategies", PLAN, self.plan, lambda: self.view(self.plan))
        for strategy in self.args.strategies:
            seeds = range(self.args.random_seeds if strategy == "random" else 1)
            for seed in seeds:
                plan, cost = self.searched(strategy, seed)
                plan = self.variants.with_blocks(plan)
                name = f"{strategy}, seed {seed}" if strategy == "random" else strategy
                self.measure("strategies", name, plan, lambda plan=plan: self.view(plan), search_cost=cost)

    def windows(self) -> None:
        sizes = [tuple(map(int, entry.split("+"))) for entry in self.args.windows]
        for name, plan in self.variants.windows(sizes):
            self.measure("windows", name, plan, lambda plan=plan: self.view(plan))

    def caches(self) -> None:
        for name, plan in self.variants.caches(self.args.text_prompt_tokens):
            self.measure("caches", name, plan, lambda plan=plan: self.view(plan))

    def quantization(self) -> None:
        prefill, decode = self.view(self.plan)
        self.measure("quantization", PLAN, self.plan, lambda: (prefill, decode))
        for kind in QUANTIZATIONS:
            pair = prefill.quantized(kind), decode
            self.measure("quantization", f"{PLAN}, {kind}", self.plan, lambda pair=pair: pair)

    def draft(self) -> None:
        if not self.state.is_main_process:
            return
        args = self.args
        prompts = [example["input_ids"][: args.text_prompt_tokens] for example in self.examples[: args.draft_prompts]]
        settings = {"section": "draft", **args.part("draft_"), **self.measured_by}
        drafts: dict[str, Callable[[], PreTrainedModel]] = {
            "decode stage, unhealed": lambda: build_stage(self.dense, self.plan, "decode")
        }
        for entry in args.healed:
            name, _, folder = entry.partition("=")
            drafts[f"decode stage, {name}"] = lambda folder=folder: self.healed_pair(folder)[1].model

        def make(build: Callable[[], PreTrainedModel]) -> dict[str, Any]:
            device = self.dense.device
            ids = [torch.tensor([prompt], device=device) for prompt in prompts]
            return draft_acceptance(self.dense, build(), ids, args.draft_tokens)

        for name, build in drafts.items():
            key = settings | {"variant": name, "plan": self.plan.digest}
            self.rows.get_or_make(key, lambda build=build: make(build))


def main(args: AblationArguments) -> None:
    join_processes()
    study = Study(args)
    left_out = "".join(f"\nleft out: {task} ({reason})\n" for task, reason in study.skipped.items())
    for section in args.sections:
        getattr(study, section)()
        if study.state.is_main_process:
            write_artefact(Path(args.output_dir) / REPORT_FILE_NAME, ablation_tables(study.rows) + left_out)
    study.state.wait_for_everyone()
    if not study.state.is_main_process:
        return
    record_command(args.output_dir, "ablation", command_line("recipes/ablation.py", args, folders=PLACES))
    print(ablation_tables(study.rows) + left_out)
    kl = {
        row["settings"]["variant"]: round(row["result"]["quality"]["kl"], 4)
        for row in study.rows
        if "quality" in row["result"]
    }
    print(json.dumps({"kl": kl, "tasks_skipped": list(study.skipped)}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    run_recipe(main, AblationArguments, description=__doc__, goes_on=True)
