"""
Speed, memory and KV bytes of a pair of stages beside the dense model's, measured in turns in one run.

    accelerate launch recipes/benchmark.py --stages outputs/demo --dense HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompt_tokens 256 1024 --batch_sizes 1 4

Without any checkpoint, at the size of a real model, with random weights (speed does not depend on them):

    accelerate launch recipes/benchmark.py --shape llama-3.1-8b --output_dir outputs/speed-8b --dtype bfloat16 \\
        --num_prefill_blocks 4 --num_decode_blocks 6 --num_token_aware_blocks 21 \\
        --prompt_tokens 1024 4096 16384 --batch_sizes 1 8

Prints a table; the last line on stdout is JSON. Into the folder go `benchmark.json` (every prompt length and batch
size), speed and bytes of the first of them into `results.json`, and report and pictures.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_pdprune import DecodeStage, PrefillStage
from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.evaluation import BenchmarkConfig, SpeedBenchmark, write_report, write_results
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model
from hf_pdprune.evaluation.model_shape import SHAPES, ModelShape
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.report import BENCHMARK_FILE_NAME
from hf_pdprune.evaluation.result_table import ResultTable
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.hub import build_stage, load_stages
from hf_pdprune.plan import PLAN_FILE_NAME


PLACES = ("stages", "dense", "output_dir")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class BenchmarkArguments:
    """Which models are measured, and how they are loaded."""

    stages: str | None = field(default=None, metadata={"help": "Folder of the pair, as recipes/prune.py writes it."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results. Default: stages."})
    dense: str | None = field(
        default=None, metadata={"help": "The dense model: repo id or folder. Default: the one that the plan names."}
    )
    dense_revision: str | None = field(default=None, metadata={"help": "Revision of the dense model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16 or float16. auto: the checkpoint's; on a CPU float32."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ... Default: what transformers chooses."}
    )

    shape: str | None = field(
        default=None, metadata={"help": f"Instead of stages, random weights of a size: {', '.join(SHAPES)}."}
    )
    num_prefill_blocks: int = field(default=0, metadata={"help": "With shape: blocks that prefill loses."})
    num_decode_blocks: int = field(default=0, metadata={"help": "With shape: blocks that decode loses."})
    num_token_aware_blocks: int = field(default=0, metadata={"help": "With shape: blocks that hand over the window."})

    def __post_init__(self):
        if (self.stages is None) == (self.shape is None):
            raise ValueError("give either stages (a folder) or shape (random weights)")
        if self.shape is not None and self.output_dir is None:
            raise ValueError("output_dir: with shape, say where the results go")
        if self.shape is None and (self.num_prefill_blocks or self.num_decode_blocks or self.num_token_aware_blocks):
            raise ValueError("num_..._blocks go with shape; stages have their own plan")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def load_all(args: BenchmarkArguments) -> tuple[PreTrainedModel, PrefillStage, DecodeStage]:
    """The dense model and the stages, on this process's device."""
    device = PartialState().device
    dtype = "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    if args.shape is not None:
        shape = ModelShape(args.shape, args.num_prefill_blocks, args.num_decode_blocks, args.num_token_aware_blocks)
        dense = shape.build(device, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        if args.attn_implementation is not None:
            dense.set_attn_implementation(args.attn_implementation)
        plan = shape.plan(dense)
        # Stages share the dense model's weights, so that what fits once fits.
        stages = [build_stage(dense, plan, kind.name) for kind in (PrefillStage, DecodeStage)]
        return dense, PrefillStage(stages[0], plan), DecodeStage(stages[1], plan)
    model_kwargs = {"dtype": dtype}
    if args.attn_implementation is not None:
        model_kwargs["attn_implementation"] = args.attn_implementation
    prefill, decode = load_stages(args.stages, **model_kwargs)
    name = args.dense or prefill.plan.base_model
    dense = load_dense_model(name, [args.stages], revision=args.dense_revision, **model_kwargs)
    prefill.plan.blocks_of(dense.config)
    for stage in (prefill, decode):
        stage.model.to(device)
    return dense, prefill, decode


def main(args: BenchmarkArguments, config: BenchmarkConfig) -> None:
    if not PartialState().is_main_process:  # a second process beside it would only disturb the measurement
        return
    folder = Path(args.output_dir or args.stages)
    if args.output_dir is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: results cannot be written there")
    dense, prefill, decode = load_all(args)
    result = SpeedBenchmark(dense, prefill, decode, config).run()
    environment = result["environment"]
    print(f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}\n")
    print(ResultTable.of_speed_cases(result["cases"]).to_text(), "\n")
    print(ResultTable.of_roofline(result["cases"]).to_text(), "\n")
    print(ResultTable.of_speed_and_shares(result["speed"]).to_text(), "\n")
    # Before they are written: what was measured is not lost with a full disk.
    print(json.dumps({"speed": result["speed"], "kv": result["kv"]}), flush=True)

    if not (folder / PLAN_FILE_NAME).is_file():
        prefill.plan.save_pretrained(folder)
    write_artefact(folder / BENCHMARK_FILE_NAME, result)
    write_results(folder, {"speed": result["speed"], "kv": result["kv"], "environment": result["environment"]})
    record_command(folder, "benchmark", command_line("recipes/benchmark.py", args, config, folders=PLACES))
    write_report(folder)


if __name__ == "__main__":
    run_recipe(main, BenchmarkArguments, BenchmarkConfig, description=__doc__)
