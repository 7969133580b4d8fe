import json

import pytest
import torch

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
