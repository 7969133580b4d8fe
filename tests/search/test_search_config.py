import math
from dataclasses import fields

import pytest

from hf_pdprune.search import SearchConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_prefill_blocks": 3, "num_decode_blocks": 2},
            r"num_decode_blocks \(2\) must be at least num_prefill_blocks",
        ),
        ({"num_prefill_blocks": -1}, "num_prefill_blocks must be a whole number"),
        ({"strategy": "magic"}, "strategy must be one of annealing, greedy"),
        ({"distillation_threshold": 2}, "distillation_threshold"),
        ({"annealing_share": -1}, "annealing_share"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"search_confidence": -1}, "search_confidence"),
        ({"search_share": 0}, "search_share"),
        ({"hidden_cache_dtype": "int8"}, "hidden_cache_dtype must be one of float32"),
        ({"merge_rank": 0}, "merge_rank"),
        ({"merge_pairs": True, "strategy": "greedy"}, "merge_pairs needs the strategy annealing"),
        ({"relaxed_subset_rule": True, "strategy": "one_shot"}, "relaxed_subset_rule needs the strategy annealing"),
        ({"max_kl": 0}, "max_kl must be positive"),
        ({"max_kl": 1, "strategy": "random"}, "max_kl needs a strategy that goes block by block"),
        ({"target_ttft_speedup": 0.5}, "target_ttft_speedup must be at least 1"),
        ({"target_tpot_speedup": 1.5, "num_decode_blocks": 2}, "exclude each other"),
        ({"target_latency_speedup": 1.2}, "belong together"),
        ({"prefill_latency_share": 0.2}, "belong together"),
        ({"target_latency_speedup": 0.9, "prefill_latency_share": 0.2}, "target_latency_speedup must be at least 1"),
        ({"target_latency_speedup": 1.2, "prefill_latency_share": 20}, "prefill_latency_share must be between"),
        (
            {"target_latency_speedup": 1.2, "prefill_latency_share": 0.2, "num_decode_blocks": 2},
            "target_latency_speedup and num_decode_blocks exclude each other",
        ),
        (
            {"target_latency_speedup": 1.2, "prefill_latency_share": 0.2, "target_tpot_speedup": 1.2},
            "target_latency_speedup and target_tpot_speedup exclude each other",
        ),
        (
            {"target_latency_speedup": 1.2, "prefill_latency_share": 0.2, "strategy": "one_shot"},
            "target_latency_speedup needs a strategy that goes block by block",
        ),
        ({"initial_temperature": 0.001, "final_temperature": 0.01}, "temperatures"),
        ({"hidden_cache_gb": -1}, "hidden_cache_gb"),
        ({"num_token_aware_blocks": 2, "target_kv_reduction": 5}, "exclude each other"),
        ({"target_kv_reduction": 0.5}, "target_kv_reduction"),
        ({"token_aware_criterion": "magic"}, "token_aware_criterion must be one of kl"),
        ({"last_tokens": 0}, "last_tokens"),
        ({"window_factors": [1.0, 0.0]}, "window_factors must be positive"),
        ({"window_factors": []}, "window_factors must be positive"),
        ({"window_factors": [1.0, 2.0], "token_aware_criterion": "random"}, "window_factors need the token_aware"),
        ({"token_choice": "h2o"}, "token_choice must be one of first_last, attention"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**values)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["max_kl", "target_kv_reduction", "hidden_cache_gb", "annealing_share"])
def test_numbers_are_finite(name, number):
    with pytest.raises(ValueError, match=f"^{name} must be finite, got {number}$"):
        SearchConfig(**{name: number})
    with pytest.raises(ValueError, match="window_factors must be finite"):
        SearchConfig(window_factors=[1.0, number])


def test_a_model_with_too_few_blocks():
    SearchConfig(4, 4).check_model(6)
    with pytest.raises(ValueError, match="num_decode_blocks is 5, but of the model's 6 blocks only 4 may be removed"):
        SearchConfig(4, 5).check_model(6)
    with pytest.raises(ValueError, match="one has to stay"):
        SearchConfig(4, 6, num_protected_first_blocks=0, num_protected_last_blocks=0).check_model(6)


def test_every_option_is_documented():
    for option in fields(SearchConfig):
        assert option.metadata["help"].endswith(".")
        assert f"        {option.name} (" in SearchConfig.__doc__


@pytest.mark.parametrize(
    "options",
    [
        {"num_prefill_blocks": 1, "num_decode_blocks": 1},
        {"num_decode_blocks": 1},
        {"target_ttft_speedup": 1.1},
        {"target_tpot_speedup": 1.1},
        {"target_latency_speedup": 1.1, "prefill_latency_share": 0.0},
        {"max_kl": 1.0},
    ],
)
def test_what_takes_blocks_away(options):
    assert SearchConfig(num_token_aware_blocks=3).keeps_all_blocks and not SearchConfig(**options).keeps_all_blocks
    assert SearchConfig(**options).token_choice == "first_last"
    assert SearchConfig(**options, token_choice="attention").token_choice == "attention"


def test_windows_differ_from_block_to_block_where_bytes_are_asked_for():
    assert SearchConfig(target_kv_reduction=5).window_factors == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert SearchConfig(num_token_aware_blocks=5).window_factors == [1.0]
    assert SearchConfig(target_kv_reduction=5, token_aware_criterion="random").window_factors == [1.0]
    assert SearchConfig(target_kv_reduction=5, window_factors=[1.0, 3.0]).window_factors == [1.0, 3.0]


def test_prefill_may_lose_more_under_the_relaxed_subset_rule():
    config = SearchConfig(num_prefill_blocks=3, num_decode_blocks=2, relaxed_subset_rule=True)
    assert (config.num_prefill_blocks, config.num_decode_blocks) == (3, 2)
