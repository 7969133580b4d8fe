"""Run by test_two_processes.py in every process: searches of a tiny model, whose outcomes each process writes down."""

import json
import random
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_pdprune.search import BlockStatistics, Calibration, SearchConfig, search_plan


def run(folder: Path, options: dict) -> dict:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            initializer_range=0.1,
        )
    ).eval()
    rng, examples = random.Random(0), []
    for _ in range(10):  # five batches of two: the second process has one batch less
        prompt, completion = ([rng.randrange(128) for _ in range(rng.randrange(*r))] for r in ((9, 30), (8, 20)))
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    calibration = Calibration(model, examples, 0, batch_size=2)
    statistics = BlockStatistics.measure(model, calibration.batches)
    text = torch.randint(3, 128, (100, 32), generator=torch.Generator().manual_seed(0)).tolist()
    plan = search_plan(model, calibration, statistics, SearchConfig(**options), folder, merge_text=text)
    return {
        "plan": plan.digest,
        "energy": plan.provenance["objective"]["result"],
        "cost": plan.provenance["cost"],
        "redundancy": statistics.redundancy,
        "batches": len(calibration),
    }


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    state = PartialState(cpu=True)
    outcomes = [run(folder / f"search{number}", one) for number, one in enumerate(options)]
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(outcomes))
    state.wait_for_everyone()
    state.destroy_process_group()
