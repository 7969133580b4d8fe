"""Run by test_two_processes.py in every process: searches of a tiny model, whose outcomes each process writes down."""

import faulthandler
import json
import random
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pdprune.plan import PLAN_FILE_NAME, PruningPlan
from hf_pdprune.search import BlockStatistics, Calibration, SearchConfig, search_plan


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "initializer_range": 0.1,
}


# Nothing stays whole: every parameter is partitioned, and gathered only for those who use it.
ZERO_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def partitioned(model, by_engine):
    """The model in partitions, as DeepSpeed's engine has it or as it is when it was loaded so."""
    import deepspeed

    # It would be compiled, for minutes and behind a lock, on every fresh machine; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if by_engine:
        return deepspeed.initialize(model=model, config=ZERO_3)[0].module
    deepspeed.init_distributed("gloo")
    deepspeed.zero.Init(module=model, config_dict_or_path=ZERO_3)
    return model


def examples_of(prompts, completions=(8, 20), count=10):
    """Random examples; the first half has prompts of the first lengths, the second half of the last ones."""
    rng, examples = random.Random(0), []
    for number in range(count):
        lengths = (prompts[2 * number // count], completions)
        prompt, completion = ([rng.randrange(128) for _ in range(rng.randrange(*r))] for r in lengths)
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return examples


def run(folder: Path, job: dict) -> dict:
    """What a search comes to, or the error with which it ends."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(job.get("model", "llama"), **SIZES)).eval()
    if "zero3" in job:
        model = partitioned(model, job["zero3"] == "engine")
    examples = examples_of(job.get("prompts", [[9, 30]] * 2), *job.get("examples", []))
    text = torch.randint(3, 128, (100, 32), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        calibration = Calibration(model, examples, 0, batch_size=2)
        statistics = BlockStatistics.measure(model, calibration.batches)
        plan = search_plan(model, calibration, statistics, SearchConfig(**job["config"]), folder, merge_text=text)
    except ValueError as error:
        return {"error": str(error)}
    return {
        "plan": plan.digest,
        "energy": plan.provenance["objective"]["result"],
        "cost": plan.provenance["cost"],
        "redundancy": statistics.redundancy,
        "batches": sum(1 for _ in calibration.batches),
        "is_written": (folder / PLAN_FILE_NAME).is_file(),
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)  # a process that waits for the other one says where
    torch.set_num_threads(1)
    save = PruningPlan.save_pretrained
    PruningPlan.save_pretrained = lambda *args: time.sleep(1) or save(*args)  # as long as a slow disk takes
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    state = PartialState(cpu=True)
    outcomes = {name: run(folder / name, job) for name, job in jobs.items()}
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(outcomes))
    state.wait_for_everyone()
    state.destroy_process_group()
