import json

import pytest
import torch

from hf_pdprune.hub import load_stages
from hf_pdprune.inference import disaggregated_forward
from hf_pdprune.plan import PruningPlan


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_exported_configs_say_what_the_dense_models_says(tiny_model, make_trainer, plan, rows, tmp_path, name):
    model = tiny_model(name, router_aux_loss_coef=0.02) if name != "llama" else tiny_model(name)
    before = model.config.to_dict()
    own = PruningPlan.empty(model, prefill=plan.prefill, decode=plan.decode, kv=plan.kv)
    trainer = make_trainer(model, plan=own, max_steps=1, local_distillation_tokens=0)
    trainer.train()
    trainer.save_model(str(tmp_path / "stages"))
    for stage in ("prefill", "decode"):
        exported = json.loads((tmp_path / "stages" / stage / "config.json").read_text())
        changed = {key for key, value in exported.items() if before.get(key) != value}
        # A config that has never been saved names no class.
        assert changed - {"architectures"} == {"num_hidden_layers", "pdprune"}
        assert exported["architectures"] == [type(model).__name__]
    batch = trainer.data_collator([rows[0], rows[1]])
    with torch.no_grad():  # what evaluation scores with
        expected = disaggregated_forward(*trainer.stages(), batch)
        actual = disaggregated_forward(*load_stages(tmp_path / "stages"), batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
