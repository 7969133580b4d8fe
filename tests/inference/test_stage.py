from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masked_reference import random_prompts
from transformers import GenerationConfig

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import BypassedBlock, get_blocks
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.plan import PruningPlan, StagePlan


@pytest.fixture
def plan(tiny_llama):
    return PruningPlan.empty(tiny_llama, prefill=StagePlan((1,)), decode=StagePlan((1, 4), ((2, 3),)))


def bypassed(model):
    return [index for index, block in enumerate(get_blocks(model)) if isinstance(block, BypassedBlock)]


@pytest.mark.parametrize(
    ("kind", "missing"), [(PrefillStage, [1]), (DecodeStage, [1, 3, 4])], ids=["prefill", "decode"]
)
class TestStage:
    def test_dense_model_becomes_the_stage_while_active(self, tiny_llama, plan, kind, missing):
        stage = kind(tiny_llama, plan)
        assert bypassed(tiny_llama) == []
        with stage.active():
            assert bypassed(tiny_llama) == missing
        with pytest.raises(KeyError), stage.active():
            raise KeyError
        assert bypassed(tiny_llama) == []

    def test_adapter_is_applied_while_active(self, tiny_llama, plan, kind, missing, adapted):
        model = adapted(tiny_llama)
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        with active_adapter(model, None), kind(model, plan, kind.name).active():
            assert layer.active_adapters == [kind.name]
            assert not layer.disable_adapters
        with kind(model, plan).active():
            assert layer.disable_adapters
        assert not layer.disable_adapters

    def test_checkpoint_is_the_stage_already(self, tiny_llama, plan, kind, missing, exported):
        model = exported(tiny_llama, plan, kind.name)
        stage = kind(model, plan)
        assert stage.running_blocks == tuple(block for block in range(6) if block not in missing)
        with stage.active():
            assert bypassed(model) == []

    def test_checkpoint_of_the_other_stage_is_refused(self, tiny_llama, plan, kind, missing, exported):
        other = {"prefill": "decode", "decode": "prefill"}[kind.name]
        with pytest.raises(ValueError, match=f"the model is a {other} stage, not a {kind.name} stage"):
            kind(exported(tiny_llama, plan, other), plan)

    def test_other_models_are_refused(self, tiny_model, plan, kind, missing):
        with pytest.raises(ValueError, match="the plan is for llama"):
            kind(tiny_model("qwen2"), plan)
        with pytest.raises(ValueError, match="5 blocks"):
            kind(tiny_model("llama", num_hidden_layers=5), plan)


def test_unified_checkpoint_is_either_stage(tiny_llama, exported):
    plan = PruningPlan.empty(tiny_llama, prefill=StagePlan((1,)), decode=StagePlan((1,)))
    model = exported(tiny_llama, plan, "unified")
    stages = PrefillStage(model, plan), DecodeStage(model, plan)
    assert [stage.running_blocks for stage in stages] == [(0, 2, 3, 4, 5)] * 2
    with stages[1].active():
        assert bypassed(model) == []


def test_stages_of_one_model_share_a_fingerprint(tiny_llama, plan, exported):
    fingerprints = {
        stage(model, plan).fingerprint
        for stage in (PrefillStage, DecodeStage)
        for model in (tiny_llama, exported(tiny_llama, plan, stage.name))
    }
    assert len(fingerprints) == 1


def test_generation_settings_as_generate_looks_them_up(tiny_llama, plan):
    stage = DecodeStage(tiny_llama, plan)
    tiny_llama.generation_config.update(top_k=3, num_beams=2)
    assert stage.generation_setting({}, "top_k") == 3
    assert stage.generation_setting({"top_k": 5}, "top_k") == 5
    given = GenerationConfig(top_k=7)
    assert stage.generation_setting({"generation_config": given}, "top_k") == 7
    assert stage.generation_setting({"generation_config": given}, "num_beams") == 2
    assert stage.generation_setting({"generation_config": given, "top_k": 9}, "top_k") == 9
    assert stage.generation_setting({"top_k": None}, "top_k") is None
    assert stage.generation_setting({}, "max_new_tokens") is None


def test_position_ids_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1]])
    expected = [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert position_ids(mask).tolist() == expected


def test_stages_of_one_model_take_turns_in_threads(tiny_llama, plan):
    prefill, decode = PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan)
    prompts = [random_prompts([20, 11], seed=1), random_prompts([16, 16], seed=2)]

    def answer(prompt):
        return decode.generate(prefill(*prompt, do_sample=False), max_new_tokens=5, do_sample=False)

    expected, before = [answer(prompt) for prompt in prompts], list(get_blocks(tiny_llama))
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(answer, prompts), expected, strict=True):
                assert torch.equal(actual, wanted)
    assert list(get_blocks(tiny_llama)) == before
