import json

import pytest
import torch
from transformers import TrainerCallback

from hf_pdprune.trainer.local_distillation import FITTED_LAYERS_FILE_NAME


def lora_of(trainer):
    return {name[name.index("layers.") :]: p for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_what_was_fitted_is_frozen_and_stays_so_when_resumed(tiny_model, make_trainer, tmp_path, dtype):
    """Whether a block can be fitted is found by trying it out, which rounding in bfloat16 decides."""
    options = {"max_steps": 2, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tiny_model("llama").to(dtype), **options)
    before = {name: p.detach().clone() for name, p in lora_of(whole).items()}
    whole.train()
    fitted = {name for name, p in lora_of(whole).items() if not torch.equal(p, before[name])}
    frozen = {name for name, p in lora_of(whole).items() if not p.requires_grad}
    assert fitted == frozen and len(fitted) == 24  # two factors in three layers of two blocks in two stages
    written = json.loads((tmp_path / "checkpoint-1" / FITTED_LAYERS_FILE_NAME).read_text())
    names = [f"layers.{layer}.lora_{part}.{a}.weight" for a in written for layer in written[a] for part in "AB"]
    assert set(names) == fitted and len(names) == 24
    resumed = make_trainer(tiny_model("llama").to(dtype), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {name for name, p in lora_of(resumed).items() if not p.requires_grad} == fitted


class AtStart(TrainerCallback):
    """Keeps what the adapters are when training starts."""

    def __init__(self):
        self.adapters = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.adapters.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})


def assert_goes_on_from(before, after):
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


def test_a_second_training_goes_on_from_the_first(tiny_llama, make_trainer):
    start = AtStart()
    trainer = make_trainer(tiny_llama, max_steps=2, callbacks=[start], train_fitted_layers=True)
    trainer.train()
    learned = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    frozen = trainer.local_distillation.fitted
    trainer.train()
    assert_goes_on_from(learned, start.adapters[1])
    assert trainer.local_distillation.fitted == frozen


def test_layers_stay_frozen_in_a_second_training(tiny_llama, make_trainer):
    trainer = make_trainer(tiny_llama, max_steps=1)
    trainer.train()
    frozen = {name: p.detach().clone() for name, p in lora_of(trainer).items() if not p.requires_grad}
    trainer.train()
    assert len(frozen) == 24
    for name, parameter in lora_of(trainer).items():
        assert (name in frozen) != parameter.requires_grad
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])


def test_adapters_that_come_with_the_model_are_not_fitted_anew(tiny_llama, make_trainer, rows):
    first = make_trainer(tiny_llama, stage="prefill", max_steps=2)
    first.train()
    learned = {name: p.detach().clone() for name, p in first.model.named_parameters() if "lora_" in name}
    fitted = {name for name, p in lora_of(first).items() if not p.requires_grad}
    start = AtStart()
    # Other text, on which a fit would be another one; decode's adapter is new.
    second = make_trainer(first.model, max_steps=1, train_dataset=rows.select(range(6)), callbacks=[start])
    second.train()
    there = {name: tensor for name, tensor in start.adapters[0].items() if ".prefill." in name}
    assert_goes_on_from(learned, there)
    # What was fitted then is not trained on now either.
    frozen = {name for name, p in lora_of(second).items() if not p.requires_grad}
    assert len(fitted) == 12 and len(frozen) == 24
    assert {name for name in frozen if ".prefill." in name} == fitted
    third = make_trainer(second.model, max_steps=1, train_fitted_layers=True)
    third.train()
    assert all(p.requires_grad for p in lora_of(third).values())
