import pytest
import torch

from hf_pdprune.blocks import remove_blocks
from hf_pdprune.fingerprint import model_fingerprint


@pytest.fixture
def exported():
    """Factory: `exported(model, plan, "decode")` is the stage as a model of its own, as its checkpoint loads."""

    def make(model, plan, stage):
        shorter = remove_blocks(model, plan.stage(stage).missing_blocks)
        shorter.config.pdprune = plan.config_entry(stage, model_fingerprint(model))
        return shorter

    return make


@pytest.fixture
def adapted():
    """Factory: the model with an adapter of each stage, both of which do something and learn."""
    from peft import LoraConfig, get_peft_model

    def make(model):
        generator = torch.Generator().manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), "prefill").eval()
        model.add_adapter("decode", LoraConfig(r=2, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.requires_grad_(True)
        return model

    return make
