import pytest
import torch
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import active_adapter, merged_state_dict


pytestmark = pytest.mark.invariant

KINDS = {
    "lora": {},
    "some blocks": {"exclude_modules": r".*\.[0134]\..*"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@torch.no_grad()
def logits_of(model):
    input_ids, mask = random_prompts([12, 5])
    return model(input_ids=input_ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(architecture, kind) for architecture in ("llama", "phi3", "gpt2", "opt") for kind in KINDS if kind != "bias"]
    # peft merges biases into those that the model has, and refuses where it has none.
    + [("gpt2", "bias"), ("opt", "bias")],
)
def test_every_kind_of_lora(tiny_model, architecture, kind):
    dense = tiny_model(architecture, initializer_range=0.1)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    dense_logits = logits_of(dense)
    common = {"target_modules": "all-linear", "lora_alpha": 8, "fan_in_fan_out": architecture == "gpt2"}
    model = get_peft_model(dense, LoraConfig(r=4, **common, **KINDS[kind]), "prefill").eval()
    model.add_adapter("decode", LoraConfig(r=2, **common, **KINDS[kind]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for adapter in ("prefill", "decode", None):
        with active_adapter(model, adapter):
            applied = logits_of(model)
        assert ((applied - dense_logits).abs().max() > 1e-2) == (adapter is not None)
        state_dict = merged_state_dict(model, adapter)
        assert sorted(state_dict) == sorted(before)
        merged = tiny_model(architecture, seed=1)
        merged.load_state_dict(state_dict)
        torch.testing.assert_close(logits_of(merged), applied, atol=2e-5, rtol=0)
    for name, tensor in merged_state_dict(model, None).items():
        assert torch.equal(tensor, before[name])
