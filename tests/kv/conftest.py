from dataclasses import replace

import pytest
from cache_states import KV

from hf_pdprune.plan import PruningPlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


ARCHITECTURES = ["llama", "gemma2", "gpt2"]


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    model = tiny_model(request.param)
    model.generation_config.eos_token_id = None  # random models would end here and there
    return model


@pytest.fixture(params=TOKEN_CHOICES)
def plan(request, model):
    return PruningPlan.empty(model, kv=replace(KV, token_choice=request.param))


@pytest.fixture
def llama(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama
