import pytest

from hf_pdprune.blocks import remove_blocks
from hf_pdprune.fingerprint import model_fingerprint


@pytest.fixture
def model(tiny_llama):
    """A model that ends no answer by itself."""
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama


@pytest.fixture
def exported():
    """Factory: `exported(model, plan, "decode")` is the stage as a model of its own, as its checkpoint loads."""

    def make(model, plan, stage):
        shorter = remove_blocks(model, plan.stage(stage).missing_blocks)
        shorter.config.pdprune = plan.config_entry(stage, model_fingerprint(model))
        return shorter

    return make
