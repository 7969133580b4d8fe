"""
From a dense model to two stage checkpoints that generate together: statistics -> plan -> distillation -> checkpoints
-> quality -> hand-over between two processes -> benchmark -> report.

    accelerate launch recipes/prune.py --config recipes/smollm2-135m/demo.yaml

Every key of the YAML file can be given on the command line too (`--num_decode_blocks 5`). Each step writes an artefact
into `output_dir` and is skipped where that is there already: an interrupted run goes on where it stopped.
"""

import json
import shlex
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pdprune import PruningPlan
from hf_pdprune.artefact_file import read_json, write_artefact
from hf_pdprune.blocks import num_blocks
from hf_pdprune.data import (
    PromptCompletionCollator,
    load_text,
    public_name,
    tokenize_examples,
    tokenize_rows,
)
from hf_pdprune.evaluation import (
    BenchmarkConfig,
    SpeedBenchmark,
    compare_hand_overs,
    read_results,
    write_report,
    write_results,
)
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model, load_tokenizer
from hf_pdprune.evaluation.overlap_config import OverlapConfig
from hf_pdprune.evaluation.prune_steps import (
    FILES_OF_STEP,
    TRAINING_SETTINGS,
    check_context,
    check_training_text,
    data_settings,
    needed_files,
)
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.text_overlap import shown_text
from hf_pdprune.hub import load_stages, write_model_cards
from hf_pdprune.hub.dense_fingerprint import dense_fingerprint
from hf_pdprune.inference import DecodeStage, PrefillStage, handover_between_processes
from hf_pdprune.plan import PLAN_FILE_NAME
from hf_pdprune.run_folder import RunFolder
from hf_pdprune.search import BlockStatistics, Calibration, MergedPairs, SearchConfig, search_plan
from hf_pdprune.search.merged_pairs import MERGED_PAIRS_FILE_NAME
from hf_pdprune.shortened_config import context_length
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer, last_complete_checkpoint


PLACES = ("model_name_or_path", "output_dir", "plan")


@dataclass
class PruneArguments(OverlapConfig):
    """
    What is pruned, and on which text. A data set is `pydoc-topics` (built in), a file or folder of JSON lines, or a
    Hub id.
    """

    model_name_or_path: str = field(metadata={"help": "The dense model: repo id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the dense model."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Name of the dense model in plan and model cards. Default: model_name_or_path."},
    )
    plan: str | None = field(
        default=None, metadata={"help": "Folder or repo of a plan that is taken as it is, instead of a search."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "float32, bfloat16 or float16. auto: the checkpoint's on an accelerator, float32 on a CPU (where "
            "bfloat16 can be 30 times slower)."
        },
    )
    calibration_dataset: str = field(default="pydoc-topics", metadata={"help": "Text for statistics and search."})
    calibration_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    calibration_split: str = field(default="calibration", metadata={"help": "Split of that data set."})
    calibration_examples: int = field(default=16, metadata={"help": "Examples used of it."})
    calibration_prompt_tokens: int = field(default=192, metadata={"help": "Prompt tokens of an example."})
    calibration_completion_tokens: int = field(default=32, metadata={"help": "Completion tokens of an example."})
    kv_calibration_examples: int = field(
        default=6, metadata={"help": "Examples with long prompts on which token-aware blocks are chosen."}
    )
    kv_calibration_prompt_tokens: int = field(default=960, metadata={"help": "Prompt tokens of such an example."})
    train_dataset: str = field(default="pydoc-topics", metadata={"help": "Text for distillation."})
    train_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_split: str = field(default="train", metadata={"help": "Split of that data set."})
    validation_dataset: str = field(default="pydoc-topics", metadata={"help": "Held-out text for the quality table."})
    validation_subset: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    validation_split: str = field(default="validation", metadata={"help": "Split of that data set."})
    validation_examples: int = field(default=24, metadata={"help": "Examples used of it."})
    validation_prompt_tokens: int = field(default=320, metadata={"help": "Prompt tokens of an example."})
    validation_completion_tokens: int = field(default=64, metadata={"help": "Completion tokens of an example."})
    batch_size: int = field(default=4, metadata={"help": "Examples per forward in statistics, search and quality."})
    benchmark_prompt_tokens: int = field(default=1024, metadata={"help": "Prompt length in the benchmark."})
    sample_prompt: str = field(
        default="The capital of France is", metadata={"help": "Prompt that dense model and pruned pair continue."}
    )
    sample_tokens: int = field(default=32, metadata={"help": "Tokens by which they continue it."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew where output_dir holds another run."})


def load_model(args: PruneArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model in eval mode, and its tokenizer (with a padding token)."""
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    return load_dense_model(args.model_name_or_path, dtype=args.dtype, revision=args.model_revision), tokenizer


def batches(
    args: PruneArguments, tokenizer: PreTrainedTokenizerBase, first_token: str
) -> list[dict[str, torch.Tensor]]:
    """The held-out examples."""
    try:
        examples = tokenize_examples(
            load_text(args.validation_dataset, args.validation_split, subset=args.validation_subset),
            tokenizer,
            args.validation_prompt_tokens,
            args.validation_completion_tokens,
            args.validation_examples,
        )
    except ValueError as error:
        raise ValueError(f"validation_dataset {args.validation_dataset!r}: {error}") from error
    collator = PromptCompletionCollator(tokenizer.pad_token_id, first_token=first_token)
    groups = (examples[begin : begin + args.batch_size] for begin in range(0, len(examples), args.batch_size))
    device = PartialState().device
    return [{key: tensor.to(device) for key, tensor in collator(group).items()} for group in groups]


def check_overlap(args: PruneArguments) -> dict[str, Any]:
    """Held-out text must not be what is calibrated or trained on, nor what a plan that is given was found on."""
    validation = load_text(args.validation_dataset, args.validation_split, subset=args.validation_subset)
    sources = [
        (args.calibration_dataset, args.calibration_split, args.calibration_subset),
        (args.train_dataset, args.train_split, args.train_subset),
    ]
    folders = [] if args.plan is None else [args.plan]
    return args.check_overlap([(args.validation_dataset, map(shown_text, validation))], folders, sources)


def train(
    args: PruneArguments,
    training_args: PDPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """
    Distils the stages and writes prefill/ and decode/ (with `stage: unified`, unified/); goes on from the last
    complete checkpoint of `settings`.
    """
    folder = Path(training_args.output_dir)
    checkpoints = folder / "checkpoints" / f"{zlib.crc32(json.dumps([plan.digest, settings]).encode()):08x}"
    merged_pairs = None
    # Local distillation fits merged blocks together with those beside other gaps.
    if not training_args.local_distillation_tokens and (folder / MERGED_PAIRS_FILE_NAME).is_file():
        merged_pairs = MergedPairs.from_pretrained(folder, model)
    trainer = PDPruneTrainer(
        model,
        plan,
        args=replace(training_args, output_dir=str(checkpoints)),
        train_dataset=load_text(args.train_dataset, args.train_split, subset=args.train_subset),
        processing_class=tokenizer,
    )
    if merged_pairs is not None:  # a resumed training loads what it had made of them
        for name in trainer.stage_adapters.layout:
            merged_pairs.start_adapter(trainer.model, name, plan.stage(name).merged_blocks)
    begun = time.perf_counter()
    checkpoint = last_complete_checkpoint(checkpoints)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begun
    trainer.save_model(str(folder))
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    distilled = {"steps": result.global_step, "seconds": round(seconds, 1), "losses": losses}
    if checkpoint is not None:  # the seconds are those from there on
        distilled["resumed_at_step"] = int(checkpoint.rpartition("-")[2])
    return distilled


def continue_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """What the dense model makes of a prompt, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check_plan_there(folder: Path, args: PruneArguments, config: SearchConfig) -> None:
    """Raises a `ValueError` unless the plan in the folder, if any, is of this run (stopped before it was recorded)."""
    if not (folder / PLAN_FILE_NAME).exists():
        return
    there = PruningPlan.from_pretrained(folder)
    recorded = there.provenance.get("config")
    own = recorded is not None and asdict(SearchConfig()) | recorded == asdict(config)
    if args.plan is not None:
        own = there.digest == PruningPlan.from_pretrained(args.plan).digest
    if not own:
        raise ValueError(f"{folder} holds another plan ({there.digest[:8]}): choose another --output_dir")


def search(
    args: PruneArguments,
    config: SearchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    first_token: str,
) -> PruningPlan:
    """block_statistics.json and pruning_plan.json."""
    name = args.base_model or args.model_name_or_path

    def calibration(prefix: str) -> Calibration:
        examples = f"{prefix}calibration_examples"
        rows = load_text(args.calibration_dataset, args.calibration_split, subset=args.calibration_subset)
        try:
            return Calibration.from_rows(
                model,
                tokenizer,
                rows,
                getattr(args, f"{prefix}calibration_prompt_tokens"),
                args.calibration_completion_tokens,
                getattr(args, examples),
                batch_size=args.batch_size,
                name=public_name(args.calibration_dataset),
                first_token=first_token,
            )
        except ValueError as error:
            raise ValueError(
                f"calibration_dataset {args.calibration_dataset!r}, {examples}={getattr(args, examples)}: {error}"
            ) from error

    short = calibration("")
    statistics = BlockStatistics.measure(model, short.batches, base_model=name)
    if PartialState().is_main_process:
        statistics.save_pretrained(folder)
    if args.plan is not None:
        plan = PruningPlan.from_pretrained(args.plan)
        plan.blocks_of(model.config)
        if PartialState().is_main_process:
            plan.save_pretrained(folder)
        PartialState().wait_for_everyone()  # before anyone reads it
        return plan
    long = None
    if config.num_token_aware_blocks or config.target_kv_reduction:
        long = calibration("kv_")
    merge_text = None
    if config.merge_pairs:
        merge_text = tokenize_rows(
            load_text(args.train_dataset, args.train_split, subset=args.train_subset), tokenizer
        )
    return search_plan(model, short, statistics, config, output_dir=folder, kv_calibration=long, merge_text=merge_text)


def main(args: PruneArguments, config: SearchConfig, training_args: PDPruneConfig) -> None:
    folder = Path(training_args.output_dir)
    options = (PruneArguments, SearchConfig, PDPruneConfig)
    run = RunFolder(folder, FILES_OF_STEP, args.overwrite, options, needed_files(training_args.stage))
    first_token = training_args.first_token  # holds for search, distillation and measurement alike
    benchmark = BenchmarkConfig(prompt_tokens=[args.benchmark_prompt_tokens], first_token=first_token)
    model, tokenizer = load_model(args)
    check_context(args, benchmark, model)
    config.check_model(num_blocks(model.config))
    # Unknown data, empty text and text that cannot be trained on fail before the long work, not after it.
    train_rows = load_text(args.train_dataset, args.train_split, subset=args.train_subset)
    check_training_text(train_rows, tokenizer, training_args, context_length(model.config))
    held_out = batches(args, tokenizer, first_token)
    overlap = check_overlap(args)

    own = asdict(args)
    searched = {key: own[key] for key in own if key.startswith(("model_", "base_", "dtype", "plan", "kv_"))}
    searched |= data_settings(args, "calibration") | asdict(config) | {"first_token": first_token}
    searched["dense_fingerprint"] = dense_fingerprint(model)
    if config.merge_pairs:
        searched |= data_settings(args, "train")
    if not run.is_done("plan", searched):
        check_plan_there(folder, args, config)
        search(args, config, model, tokenizer, folder, first_token)
        run.done("plan", searched)
    plan = PruningPlan.from_pretrained(folder)

    trained = data_settings(args, "train")
    trained |= {key: getattr(training_args, key) for key in TRAINING_SETTINGS}
    if not run.is_done("stages", trained):
        distilled = train(args, training_args, model, tokenizer, plan, run.changed(trained))
        if PartialState().is_main_process:
            write_artefact(folder / "distillation.json", distilled)
        run.done("stages", trained)
        del model  # it carries adapters now
        model, _ = load_model(args)
    measured = {key: own[key] for key in own if key.startswith(("benchmark_", "sample_"))}
    measured |= data_settings(args, "validation") | {"first_token": first_token}
    is_measured = run.is_done("results", measured)  # asked by all processes, which may have to wait for each other
    if not PartialState().is_main_process:
        return

    if not is_measured:
        healed = load_stages(folder, dtype=model.dtype)
        for stage in healed:
            stage.model.to(model.device)
        pairs = {"unhealed": (PrefillStage(model, plan), DecodeStage(model, plan)), "healed": healed}
        quality, quality_all_tokens = compare_hand_overs(model, pairs, held_out)
        results = {
            "quality": quality,
            "quality_all_tokens": quality_all_tokens,
            **SpeedBenchmark(model, *healed, benchmark).run(),
            "distillation": read_json(folder / "distillation.json"),
            "validation_overlap": overlap,
            "serving": {"first_token": first_token},
        }
        dense_text = continue_prompt(model, tokenizer, args.sample_prompt, args.sample_tokens)
        del model, healed, pairs
        prompts, tokens = [args.sample_prompt], args.sample_tokens
        handed_over = handover_between_processes(folder, prompts, tokens, first_token=first_token)
        results["sample"] = {"prompt": args.sample_prompt, "dense": dense_text, "pruned": handed_over["text"][0]}
        results["handover"] = {key: handed_over[key] for key in ("prompt_tokens", "nbytes", "nbytes_dense", "seconds")}
        write_results(folder, results)
        record_command(folder, "prune", command_line("recipes/prune.py", args, config, training_args, folders=PLACES))
        write_model_cards(folder, results)
        run.done("results", measured)
    print(write_report(folder))
    sample = read_results(folder)["sample"]
    print(f"""
{sample["prompt"]} ...
  dense:  {sample["dense"]!r}
  pruned: {sample["pruned"]!r}""")
    print(next_steps(folder))


def next_steps(folder: Path) -> str:
    """What to do with a finished run, as commands to be copied."""
    quoted = shlex.quote(str(folder))
    stages = "" if folder == Path("outputs/demo") else f"STAGES={quoted} "  # the example's own default
    return f"""
Next:
  cat {shlex.quote(str(folder / "report.md"))}
  {stages}python examples/01_handover_two_processes.py      # the pair generates in two processes
  accelerate launch recipes/benchmark.py --help     # other prompt lengths and batch sizes"""


if __name__ == "__main__":
    # trl and peft still use the old name of activation_checkpointing.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    run_recipe(main, PruneArguments, SearchConfig, PDPruneConfig, description=__doc__, goes_on=True)
