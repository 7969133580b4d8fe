import pytest
from transformers import AutoConfig

from hf_pdprune.shortened_config import check_attention_is_left, num_blocks, shortened_config


KEPT = (0, 2, 3, 5)
QWEN4 = {"layer_types": ["linear_attention", "indexed_attention"] * 3, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 3]}, {"mlp_only_layers": [0, 2]}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, {"mlp_only_layers": [0, 1, 2, 3]}),
        ("qwen2_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
        ("qwen2", {"max_window_layers": 3}, {"max_window_layers": 2}),
        ("ernie4_5_moe", {"moe_layer_start_index": 1}, {"moe_layer_start_index": 1, "moe_layer_end_index": 3}),
        ("afmoe", {"num_dense_layers": 3}, {"num_dense_layers": 2}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1, 1]}, {"no_rope_layers": [1, 1, 0, 1]}),
        ("gpt_neo", {"attention_types": [[["a", "b"], 3]]}, {"attention_layers": ["a", "a", "b", "b"]}),
        ("recurrent_gemma", {"block_types": ["a", "b"]}, {"block_types": ["a", "a", "b", "b"]}),
        (
            "qwen4_exp_text",
            QWEN4 | {"ple_layer_ids": [3, 5]},
            {"ple_layer_ids": [2]},
        ),
    ],
)
def test_rules_follow_the_kept_blocks(model_type, values, expected):
    blocks = "num_layers" if model_type == "gpt_neo" else "num_hidden_layers"
    config = AutoConfig.for_model(model_type, **{blocks: 6}, **values)
    before = config.to_dict()
    shorter = shortened_config(config, KEPT)
    assert num_blocks(config) == 6 and num_blocks(shorter) == 4
    assert {name: getattr(shorter, name) for name in expected} == expected
    assert config.to_dict() == before


def test_values_that_differ_from_block_to_block():
    kinds = ["sliding_attention", "full_attention"] * 3
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
    shorter = shortened_config(config, (0, 1, 2, 3, 5))
    assert shorter.num_kv_shared_layers == 1 and sorted(map(int, shorter.to_dict()["per_layer_config"])) == [1, 3, 4]
    with pytest.raises(ValueError, match="cannot express the model with these blocks only: it makes layer_types"):
        shortened_config(config, (0, 1, 2, 3, 4))  # the last one must attend to everything


def test_blocks_of_an_encoder_decoder_are_the_decoders():
    config = AutoConfig.for_model("bart", encoder_layers=2, decoder_layers=6)
    shorter = shortened_config(config, KEPT)
    assert (num_blocks(config), num_blocks(shorter), shorter.encoder_layers) == (6, 4, 2)


def test_a_hybrid_model_keeps_a_block_with_a_cache():
    kinds = ["linear_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=6, layer_types=kinds)
    check_attention_is_left(config, (0, 5))
    with pytest.raises(ValueError, match="block 5 cannot be removed: it is the last one left with a KV cache"):
        check_attention_is_left(config, (0, 1))
