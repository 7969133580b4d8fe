import pytest
import torch

from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.search import LatencyGoal


BOTH, DECODE, PREFILL = (True, True), (False, True), (True, False)


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", num_hidden_layers=8)


@pytest.fixture
def plan(model):
    def make(prefill=(), decode=(), projected=(), merged=()):
        return PruningPlan.empty(
            model,
            prefill=StagePlan(prefill, merged_blocks=merged, projected_blocks=projected),
            decode=StagePlan(decode, merged_blocks=merged),
        )

    return make


def test_latency_goes_by_the_parameters_that_run(model, plan):
    goal = LatencyGoal(model, 1.2, 0.25, relaxed=True)
    assert goal.latency(plan()) == 1
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    of_decode = blocks / (blocks + model.lm_head.weight.numel())
    assert goal.latency(plan((2,), (2, 3))) == pytest.approx(1 - 0.25 / 8 - 0.75 * of_decode * 2 / 8)
    assert goal.latency(plan(merged=((4, 5),))) == pytest.approx(1 - 0.25 / 8 - 0.75 * of_decode / 8)
    block = model.model.layers[2]
    still_runs = [block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj]
    part = 8 * sum(p.numel() for module in still_runs for p in module.parameters()) / blocks
    assert goal.latency(plan(projected=(2,))) == pytest.approx(1 - 0.25 * (1 - part) / 8)


def test_what_the_next_block_may_go_out_of(model, plan):
    strict, relaxed = LatencyGoal(model, 1.2, 0.5), LatencyGoal(model, 1.2, 0.5, relaxed=True)
    assert strict.next_stages(plan()) == [BOTH, DECODE] and relaxed.next_stages(plan()) == [PREFILL, DECODE]
    assert strict.next_stages(plan(), {BOTH}) == [DECODE]
    assert strict.num_steps is None and strict.num_prefill_blocks == strict.num_decode_blocks == 7
    # What saves nothing is left alone.
    assert LatencyGoal(model, 1.2, 0.0, relaxed=True).next_stages(plan()) == [DECODE]
    assert LatencyGoal(model, 1.2, 1.0, relaxed=True).next_stages(plan()) == [PREFILL]
    assert LatencyGoal(model, 1.2, 1.0).next_stages(plan()) == [BOTH]
    reached = plan((2, 3), (2, 3))
    assert strict.latency(reached) < 1 / 1.2
    assert strict.next_stages(reached) == [] and strict.shortfall(reached) is None
    assert strict.shortfall(plan((2,), (2,))).startswith("target_latency_speedup 1.2 is not met, 1.1")


def test_the_price_is_kl_for_the_time_saved_of_which_no_more_counts_than_is_left(model, plan):
    goal = LatencyGoal(model, 1.2, 1.0)
    before, after = plan((2,), (2,)), plan((2, 3), (2, 3))
    assert goal.price(plan(), before, 0.3) == pytest.approx(0.3 / (1 / 8))
    assert goal.price(before, after, 0.3) == pytest.approx(0.3 / (7 / 8 - 1 / 1.2))
    assert goal.price(after, plan((2, 3, 4), (2, 3, 4)), 0.3) == pytest.approx(
        0.3 / (1 / 8)
    )  # nothing is left to save


@pytest.mark.parametrize(("share", "blocks"), [(1.0, 2), (0.0, 3)])
def test_as_many_blocks_as_it_takes_out_of_both_have_to_be_removable(model, share, blocks):
    assert LatencyGoal(model, 8 / 6, share).fewest_blocks == blocks  # decode reads the LM head, too
    assert LatencyGoal(model, 1.0, share).fewest_blocks == 0


def test_blocks_that_prefill_alone_loses_are_projected(model, plan):
    projected = LatencyGoal(model, 1.0, 1.0, relaxed=True).latency(plan((), (), (2, 3)))
    assert LatencyGoal(model, 8 / 6, 1.0, relaxed=True).fewest_blocks == 3
    assert LatencyGoal(model, 1 / projected, 1.0, relaxed=True).fewest_blocks == 2
    assert LatencyGoal(model, 8 / 6, 0.9, relaxed=True).fewest_blocks == 3  # these decode can lose, too


def test_a_goal_out_of_reach_says_how_near_the_best_comes(model):
    with pytest.raises(ValueError, match=r"target_latency_speedup 5 cannot be met: without all 6 .* it is 4.00"):
        LatencyGoal(model, 5, 1.0, num_protected_blocks=2)


def test_weights_in_partitions_count_as_whole_ones(model, plan):
    expected = LatencyGoal(model, 1.2, 0.4, relaxed=True).latency(plan((2,), (2,), (3,)))
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert LatencyGoal(model, 1.2, 0.4, relaxed=True).latency(plan((2,), (2,), (3,))) == expected
