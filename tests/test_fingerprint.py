import pytest
import torch

from hf_pdprune.blocks import bypass_blocks, remove_blocks
from hf_pdprune.fingerprint import combined_fingerprint, model_fingerprint
from hf_pdprune.plan import PruningPlan


def test_same_model_same_fingerprint(tiny_model):
    first, second = tiny_model("llama"), tiny_model("llama")
    fingerprint = model_fingerprint(first)
    assert fingerprint == model_fingerprint(second)
    assert len(fingerprint) == 32
    assert int(fingerprint, 16) >= 0


def test_a_stage_of_a_model_is_recognised(tiny_llama):
    # Whether the blocks are bypassed or gone, prefill and decode know each other.
    fingerprint = model_fingerprint(tiny_llama)
    with bypass_blocks(tiny_llama, (1, 2)):
        assert model_fingerprint(tiny_llama) == fingerprint
    assert model_fingerprint(remove_blocks(tiny_llama, (1, 2))) == fingerprint


@pytest.mark.parametrize(
    "other",
    [
        ("llama", {"seed": 1}),
        ("qwen2", {}),
        ("llama", {"vocab_size": 300}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"head_dim": 8}),
    ],
    ids=str,
)
def test_other_models_have_other_fingerprints(tiny_model, other):
    architecture, values = other
    assert model_fingerprint(tiny_model(architecture, **values)) != model_fingerprint(tiny_model("llama"))


def test_a_checkpoint_carries_its_own(tiny_llama):
    plan = PruningPlan.empty(tiny_llama)
    tiny_llama.config.pdprune = plan.config_entry("decode", "a" * 32)
    assert model_fingerprint(tiny_llama) == "a" * 32
    del tiny_llama.config.pdprune["fingerprint"]
    with pytest.raises(ValueError, match="fingerprint"):
        model_fingerprint(tiny_llama)


def test_small_and_half_precision_models(tiny_model):
    few_tokens = tiny_model("llama", vocab_size=10)
    assert model_fingerprint(few_tokens) == model_fingerprint(few_tokens)
    half = tiny_model("llama").to(torch.bfloat16)
    assert model_fingerprint(half) == model_fingerprint(half)


def test_combined_fingerprint_tells_distillations_apart(tiny_llama):
    weights = {"a": torch.ones(3, 50), "b": torch.zeros(2)}
    fingerprint = combined_fingerprint("f" * 32, weights)
    assert fingerprint == combined_fingerprint("f" * 32, dict(reversed(weights.items())))
    others = [
        ("e" * 32, weights),
        ("f" * 32, {"a": weights["a"]}),
        ("f" * 32, weights | {"b": torch.tensor([0.0, 1e-6])}),
        ("f" * 32, {"a": weights["a"], "c": weights["b"]}),
    ]
    assert fingerprint not in [combined_fingerprint(*other) for other in others]
