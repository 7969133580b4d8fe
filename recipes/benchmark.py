"""
Speed and KV bytes of a pair of stages beside the dense model's, measured in turns in one run.

    accelerate launch recipes/benchmark.py --stages outputs/demo --dense HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompt_tokens 256 1024 --batch_sizes 1 4

Prints a table; the last line on stdout is JSON. Into the folder of the stages go `benchmark.json` (every prompt length
and batch size), and into its `results.json` speed and bytes of the first of them; where there is a report, it is made
anew.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import TrlParser

from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.evaluation import BenchmarkConfig, SpeedBenchmark, write_report, write_results
from hf_pdprune.evaluation.report import REPORT_FILE_NAME
from hf_pdprune.evaluation.result_table import ResultTable, megabytes
from hf_pdprune.hub import load_stages


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class BenchmarkArguments:
    """Which models are measured, and how they are loaded."""

    stages: str = field(metadata={"help": "Folder with the stages prefill/ and decode/."})
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

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def load_dense(args: BenchmarkArguments, name: str, **model_kwargs: Any) -> PreTrainedModel:
    """The dense model in eval mode; a `ValueError` that names it where there is none."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, revision=args.dense_revision, **model_kwargs).eval()
    except OSError as error:
        raise ValueError(f"no dense model {name!r}: {str(error).splitlines()[0]}") from error


def case_table(cases: list[dict[str, Any]]) -> ResultTable:
    """One row per prompt length and batch size."""
    title = ["prompt", "batch", "TTFT dense", "pruned", "ratio", "TPOT dense", "pruned", "ratio", "KV sent", "fewer"]
    rows = [title]
    for case in cases:
        row = [f"{case['prompt_tokens']:,}", str(case["batch_size"])]
        for what in ("ttft", "tpot"):
            row += [f"{1000 * case[what][name]['median']:.1f} ms" for name in ("dense", "pruned")]
            row.append(f"{case[what]['ratio']:.3f}")
        rows.append([*row, megabytes(case["kv"]["bytes_sent"]), f"{case['kv']['ratio']:.2f}x"])
    return ResultTable(rows)


def main(args: BenchmarkArguments, config: BenchmarkConfig) -> None:
    state = PartialState()
    if not state.is_main_process:  # a second process beside it would only disturb the measurement
        return
    dtype = "float32" if args.dtype == "auto" and not torch.accelerator.is_available() else args.dtype
    model_kwargs = {"dtype": dtype}
    if args.attn_implementation is not None:
        model_kwargs["attn_implementation"] = args.attn_implementation
    prefill, decode = load_stages(args.stages, **model_kwargs)
    dense = load_dense(args, args.dense or prefill.plan.base_model, **model_kwargs)
    prefill.plan.blocks_of(dense.config)
    for model in (dense, prefill.model, decode.model):
        model.to(state.device)

    result = SpeedBenchmark(dense, prefill, decode, config).run()
    folder = Path(args.stages)
    write_artefact(folder / "benchmark.json", result)
    write_results(folder, {"speed": result["speed"], "kv": result["kv"], "environment": result["environment"]})
    if (folder / REPORT_FILE_NAME).is_file():
        write_report(folder)

    environment = result["environment"]
    print(f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}\n")
    print(case_table(result["cases"]).to_text(), "\n")
    print(ResultTable.of_speed_and_shares(result["speed"]).to_text(), "\n")
    print(json.dumps({"speed": result["speed"], "kv": result["kv"]}))


if __name__ == "__main__":
    try:
        main(*TrlParser((BenchmarkArguments, BenchmarkConfig)).parse_args_and_config())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
