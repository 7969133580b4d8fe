"""Trains a tiny model and writes what came out: run by the tests, in one process or in several."""

import faulthandler
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer import DivergenceError, PDPruneConfig, PDPruneTrainer


def main(folder: Path, options: dict) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a process that waits for the other one says where
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**json.loads((folder / "model.json").read_text()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kv = KVPlan((1, 4), 2, 4)
    plan = PruningPlan.empty(model, "tiny", prefill=StagePlan((3,), (), (1,)), decode=StagePlan((2, 3)), kv=kv)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 240, (24,), generator=generator).tolist()} for _ in range(16)]
    for row in rows[:8]:  # completions of one token, of two, ...: processes get different numbers of tokens
        row["labels"] = [-100] * 23 + row["input_ids"][23:]
    for row in rows[8:]:
        row["labels"] = [-100] * 6 + row["input_ids"][6:]
    resume, poisoned = options.pop("resume", None), options.pop("poisoned_process", None)
    if "deepspeed" in options:
        import deepspeed

        # It would be compiled, for minutes and behind a lock, on every fresh machine; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    args = PDPruneConfig(**options)
    if args.fsdp:
        # accelerate shards on accelerators alone. FSDP2 itself runs on CPUs too, which is all that it needs to know.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = PDPruneTrainer(
        model,
        plan,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[4:12]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    if trainer.args.process_index == poisoned:
        poison(trainer)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DivergenceError as error:
        (folder / f"diverged-{trainer.args.process_index}").write_text(str(error))
        raise
    metrics = trainer.evaluate()
    trainer.save_model(str(Path(options["output_dir"]) / "stages"))
    if trainer.accelerator.is_main_process:
        result = {"log": trainer.state.log_history, "eval": metrics}
        (folder / "result.json").write_text(json.dumps(result))


def poison(trainer: PDPruneTrainer) -> None:
    """Lets the loss of the second step be no number in this process."""
    compute_loss = trainer.compute_loss

    def poisoned(*args, **kwargs):
        return compute_loss(*args, **kwargs) * (float("nan") if trainer.state.global_step == 1 else 1.0)

    trainer.compute_loss = poisoned


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
