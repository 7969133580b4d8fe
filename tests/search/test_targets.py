import pytest
import torch

from hf_pdprune.search import LatencyGoal, SearchConfig
from hf_pdprune.search.targets import removal_goal


def num_blocks_to_remove(model, config):
    goal = removal_goal(model, config)
    return goal.num_prefill_blocks, goal.num_decode_blocks


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", num_hidden_layers=8)


def test_numbers_are_themselves(model):
    assert num_blocks_to_remove(model, SearchConfig(2, 3)) == (2, 3)
    assert num_blocks_to_remove(model, SearchConfig(max_kl=0.5)) == (6, 6)
    assert num_blocks_to_remove(model, SearchConfig(1, 2, max_kl=0.5)) == (1, 2)
    unprotected = {"num_protected_first_blocks": 0, "num_protected_last_blocks": 0}
    assert num_blocks_to_remove(model, SearchConfig(max_kl=0.5, **unprotected)) == (7, 7)  # one has to stay


def test_a_speedup_takes_as_few_blocks_as_it_needs(model):
    assert num_blocks_to_remove(model, SearchConfig(target_ttft_speedup=1.0)) == (0, 0)
    assert num_blocks_to_remove(model, SearchConfig(target_ttft_speedup=8 / 6)) == (2, 2)
    assert num_blocks_to_remove(model, SearchConfig(target_ttft_speedup=8 / 6 + 0.001)) == (3, 3)
    # A decode step reads the LM head too: the same speedup takes more blocks.
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    speedup = (blocks + head) / (5 / 8 * blocks + head)
    prefill, decode = num_blocks_to_remove(model, SearchConfig(1, target_tpot_speedup=speedup - 0.001))
    assert (prefill, decode) == (1, 3)


def test_weights_in_partitions_count_as_whole_ones(model):
    config = SearchConfig(target_ttft_speedup=1.5, target_tpot_speedup=1.3)
    expected = num_blocks_to_remove(model, config)
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert num_blocks_to_remove(model, config) == expected


def test_what_cannot_be_met_says_how_near_the_best_comes(model):
    with pytest.raises(ValueError, match=r"target_ttft_speedup 5 cannot be met: without all 6 .* it is 4.00"):
        num_blocks_to_remove(model, SearchConfig(target_ttft_speedup=5))
    with pytest.raises(ValueError, match="blocks missing in prefill are missing in decode too"):
        num_blocks_to_remove(model, SearchConfig(4, target_tpot_speedup=1.01))


def test_projected_blocks_still_make_their_keys_and_values(model):
    block = model.model.layers[0]
    attention = block.self_attn
    runs = [block.input_layernorm, attention.k_proj, attention.v_proj]
    left = sum(p.numel() for module in runs for p in module.parameters()) / sum(p.numel() for p in block.parameters())
    for speedup, blocks in ((1.0, 0), (8 / (6 + 2 * left) - 1e-6, 2), (8 / (6 + 2 * left) + 1e-6, 3)):
        config = SearchConfig(target_ttft_speedup=speedup, num_decode_blocks=1, relaxed_subset_rule=True)
        assert num_blocks_to_remove(model, config) == (blocks, 1)


def test_the_latency_of_an_answer_is_a_goal_of_its_own(model):
    options = {"target_latency_speedup": 1.2, "prefill_latency_share": 0.3}
    goal = removal_goal(model, SearchConfig(**options, relaxed_subset_rule=True, num_protected_first_blocks=2))
    assert isinstance(goal, LatencyGoal) and goal.relaxed and goal.num_decode_blocks == 5
    assert (goal.speedup, goal.prefill_share) == (1.2, 0.3)
    assert not removal_goal(model, SearchConfig(**options)).relaxed
