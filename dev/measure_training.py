# ruff: noqa: T201
"""
What a training step costs in time and memory, against trl, on the same rows: CPU seconds and the process's memory, or
on an accelerator wall seconds and what is allocated there.

    python dev/measure_training.py time   <model folder>     # medians, in turns in one process
    python dev/measure_training.py memory <model folder> ours|checkpointing|one_chunk|gkd     # one process each
"""

import json
import os
import resource
import statistics
import sys
import time

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_pdprune.data import load_text
from hf_pdprune.evaluation.benchmark import synchronize
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer


TOKENS, BATCH = 512, int(os.environ.get("BATCH", "2"))
COMMON = {
    "output_dir": "outputs/measure_training",
    "max_steps": 1,
    "per_device_train_batch_size": BATCH,
    "max_length": TOKENS,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "disable_tqdm": True,
    "activation_checkpointing": False,
}


def rows(tokenizer):
    text = "\n".join(row["text"] for _, row in zip(range(40), load_text("pydoc-topics", "train"), strict=False))
    ids = tokenizer(text)["input_ids"]
    half = TOKENS // 2
    pieces = [tokenizer.decode(ids[begin : begin + half - 20]) for begin in range(0, 16 * half, half)]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [
        {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
        for a, b in pairs
    ]


def plan_of(model):
    kv = KVPlan(tuple(range(3, 24)), 16, 112)
    return PruningPlan.empty(model, prefill=StagePlan((3, 5, 17, 25)), decode=StagePlan((3, 4, 5, 7, 17, 25)), kv=kv)


def ours(model, tokenizer, **options):
    args = PDPruneConfig(**{**COMMON, "local_distillation_tokens": 0, **options})
    data = Dataset.from_list(rows(tokenizer))
    return PDPruneTrainer(model, plan_of(model), args=args, train_dataset=data, processing_class=tokenizer)


def sft(model, tokenizer):
    data = Dataset.from_list(rows(tokenizer))
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(**{**COMMON, "gradient_checkpointing": False})
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def gkd(model, teacher, tokenizer):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    messages = [{"messages": row["prompt"] + row["completion"]} for row in rows(tokenizer)]
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    args = GKDConfig(**{**COMMON, "gradient_checkpointing": False, "lmbda": 0.0})
    data = Dataset.from_list(messages)
    return GKDTrainer(model, teacher, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(PartialState().device)


def clock():
    """CPU seconds, or wall seconds once an accelerator has done its work."""
    device = PartialState().device
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def megabytes():
    """The most memory so far."""
    if PartialState().device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.accelerator.max_memory_allocated() / 1e6


def step_of(trainer):
    """One forward and backward, as `train` does it."""
    batch = next(iter(trainer.get_train_dataloader()))
    items = (batch["labels"] != -100).sum()

    def step():
        trainer.training_step(trainer.model, dict(batch), items)

    return step


def measure_time(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, pruned = sft(load(folder), tokenizer), ours(load(folder), tokenizer)
    for trainer in (plain, pruned):
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
    teacher = load(folder).eval()
    batch = next(iter(plain.get_train_dataloader()))
    batch = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def forward():
        teacher(**batch, use_cache=False)

    cases = {"teacher": forward, "sft": step_of(plain), "ours": step_of(pruned)}
    seconds = {name: [] for name in cases}
    for turn in range(int(os.environ.get("TURNS", "4"))):
        for name, case in cases.items():
            begun = clock()
            case()
            if turn:
                seconds[name].append(clock() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps(medians | {"ratio": medians["ours"] / (medians["teacher"] + medians["sft"])}))


def measure_memory(folder, case):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if case == "gkd":
        trainer = gkd(load(folder), load(folder), tokenizer)
    else:
        options = {"checkpointing": {"activation_checkpointing": True}, "one_chunk": {"logits_chunk_tokens": 0}}
        trainer = ours(load(folder), tokenizer, **options.get(case, {}))
    before = megabytes()
    trainer.train()
    peak = megabytes()
    print(json.dumps({"case": case, "batch": BATCH, "MB before": round(before), "MB peak": round(peak)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "time":
        measure_time(sys.argv[2])
    else:
        measure_memory(sys.argv[2], sys.argv[3])
