from dataclasses import fields

import pytest
import torch
from datasets import Dataset

from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer


@pytest.fixture
def plan(tiny_llama):
    return PruningPlan.empty(
        tiny_llama, "tiny", prefill=StagePlan((3,)), decode=StagePlan((2, 3)), kv=KVPlan((1, 4), 2, 4)
    )


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 240, (24,), generator=generator).tolist()} for _ in range(16)]
    )


@pytest.fixture
def make_trainer(plan, rows, tmp_path, tiny_tokenizer):
    """
    Factory: `make_trainer(model, **options)` trains a few steps on random rows. Options are those of `PDPruneConfig`;
    what it does not know goes to `PDPruneTrainer`.
    """
    known = {field.name for field in fields(PDPruneConfig)}

    def make(model, **options):
        defaults = {
            "output_dir": tmp_path,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "lora_rank": 4,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "shuffle_dataset": False,
            "disable_tqdm": True,
        }
        given = {name: value for name, value in options.items() if name not in known}
        train_dataset = given.get("train_dataset", rows)
        arguments = {"plan": plan, "train_dataset": train_dataset, "eval_dataset": train_dataset}
        arguments |= {"processing_class": tiny_tokenizer} | given
        options = defaults | {name: value for name, value in options.items() if name in known}
        args = PDPruneConfig(**options | {"output_dir": str(options["output_dir"])})
        return PDPruneTrainer(model, args=args, **arguments)

    return make


@pytest.fixture
def losses():
    """`losses(trainer)`: the losses that a training has logged."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def adapters_of():
    """`adapters_of(trainer)`: a copy of what learns, by name."""
    return lambda trainer: {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
