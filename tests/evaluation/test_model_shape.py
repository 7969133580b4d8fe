import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pdprune.blocks import num_blocks
from hf_pdprune.evaluation import model_shape
from hf_pdprune.evaluation.model_shape import SHAPES, ModelShape


# Parameters as the models' cards state them, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62), ("qwen2.5-14b", 14.77), ("smollm2-135m", 0.135)],
)
def test_sizes_are_those_of_the_real_models(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)


def test_model_and_plan(monkeypatch):
    small = {**SHAPES["qwen2.5-7b"], "hidden_size": 56, "intermediate_size": 32, "vocab_size": 128}
    monkeypatch.setitem(model_shape.SHAPES, "qwen2.5-7b", small)
    shape = ModelShape("qwen2.5-7b", 3, 5, 20, first_tokens=2, last_tokens=6)
    model = shape.build(dtype=torch.bfloat16)
    assert num_blocks(model.config) == 28 and model.dtype == torch.bfloat16 and not model.training
    plan = shape.plan(model)
    assert len(plan.prefill.removed_blocks) == 3 and plan.decode.removed_blocks == (2, 8, 14, 19, 25)
    assert len(plan.kv.token_aware_blocks) == 20 and (plan.kv.first_tokens, plan.kv.last_tokens) == (2, 6)
    assert ModelShape("qwen2.5-7b").plan(model).decode.removed_blocks == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "gpt-5"}, "unknown shape 'gpt-5'; there are llama"),
        ({"num_prefill_blocks": 3, "num_decode_blocks": 2}, "num_decode_blocks must be at least"),
        ({"num_decode_blocks": 28}, "num_decode_blocks must be from 0 to 27"),
        (
            {"num_decode_blocks": 8, "num_token_aware_blocks": 21},
            "num_token_aware_blocks is 21, decode keeps 20 blocks",
        ),
    ],
)
def test_bad_shapes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(**{"name": "qwen2.5-7b"} | values)
