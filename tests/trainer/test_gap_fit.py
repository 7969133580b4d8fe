import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.blocks import get_blocks
from hf_pdprune.trainer.gap_fit import GapFit


@pytest.fixture
def block(tiny_llama):
    config = LoraConfig(r=80, lora_alpha=40, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_blocks(get_peft_model(tiny_llama, config, adapter_name="stage"))[1]


def added(layer):
    return layer.get_delta_weight("stage")


def test_changes_are_what_the_adapter_adds(block):
    generator = torch.Generator().manual_seed(0)
    layers = {name: getattr(block.mlp, name) for name in ("gate_proj", "down_proj")}
    deltas = {f"mlp.{name}": torch.randn(layer.weight.shape, generator=generator) for name, layer in layers.items()}
    GapFit(0.5, deltas, {}).apply(block, "stage")
    for name, layer in layers.items():  # one is wider, the other is taller
        torch.testing.assert_close(added(layer), deltas[f"mlp.{name}"], atol=1e-5, rtol=1e-4)
        down, up = layer.lora_A["stage"].weight.data, layer.lora_B["stage"].weight.data[:, : min(layer.weight.shape)]
        assert float(down[: min(layer.weight.shape)].norm() / up.norm()) == pytest.approx(1 / 0.5, rel=1e-3)


def test_factors_replace_what_the_adapter_had(block):
    layer = block.mlp.down_proj
    torch.nn.init.normal_(layer.lora_B["stage"].weight)
    down, up = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
    GapFit(0.5, {}, {"mlp.down_proj": (down, up)}).apply(block, "stage")
    torch.testing.assert_close(added(layer), up @ down)


def test_no_change_adds_nothing(block):
    shape = block.mlp.down_proj.weight.shape
    GapFit(0.0, {"mlp.down_proj": torch.zeros(shape)}, {}).apply(block, "stage")
    assert not added(block.mlp.down_proj).any()
