import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pdprune.plan import KVPlan, StagePlan
from hf_pdprune.search import Objective, SearchConfig, TokenAwareBlocks
from hf_pdprune.search.block_windows import BlockWindows, allocate


def config(**options):
    values = {"first_tokens": 1, "last_tokens": 7, "kv_prompt_tokens": 40, "window_factors": [0.5, 1.0, 2.0]}
    values |= {"token_choice": "first_last"}
    return SearchConfig(**values | options)


@pytest.fixture
def objective(tiny_llama, calibration):
    return Objective(tiny_llama, calibration(tiny_llama, prompt_tokens=(36, 40)))


def tokens_of(plan):
    """Prompt tokens that all blocks hand over of a prompt of forty tokens."""
    return sum(plan.kept_prompt_tokens(block, 40) for block in range(plan.num_hidden_layers))


SIZES = {(1, 1): 2, (2, 2): 4, (4, 4): 8, None: 20}


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(0, 80),
)
def test_allocation_keeps_to_the_budget_and_leaves_no_gain_within_it(drawn, budget):
    costs = {
        block: dict(zip(SIZES, (*sorted(values, reverse=True), 0.0), strict=True))
        for block, values in enumerate(drawn)
    }
    budget = max(budget, 2 * len(costs))
    chosen = allocate(costs, SIZES, budget)
    spent = sum(SIZES[window] for window in chosen.values())
    assert chosen.keys() == costs.keys() and spent <= budget
    for block, window in chosen.items():
        for other in SIZES:
            if 0 < SIZES[other] - SIZES[window] <= budget - spent:
                assert costs[block][other] >= costs[block][window] - 1e-9


def test_allocation_gives_to_those_that_need_it():
    costs = {
        0: {(1, 1): 0.0, (2, 2): 0.0, (4, 4): 0.0, None: 0.0},
        1: {(1, 1): 0.9, (2, 2): 0.5, (4, 4): 0.3, None: 0.0},
    }
    assert allocate(costs, SIZES, 10) == {0: (1, 1), 1: (4, 4)}
    assert allocate(costs, SIZES, 22) == {0: (1, 1), 1: None}
    assert allocate(costs, SIZES, 4) == {0: (1, 1), 1: (1, 1)}


@pytest.mark.parametrize("choice", ["first_last", "attention"])
@pytest.mark.parametrize("options", [{"num_token_aware_blocks": 4}, {"target_kv_reduction": 2.5}], ids=str)
def test_not_above_one_window_for_all_at_the_same_bytes(objective, options, choice):
    plan = replace(objective.dense_plan, decode=StagePlan((2,)))
    varied = TokenAwareBlocks(objective, config(token_choice=choice, **options)).choose(plan)
    plain = TokenAwareBlocks(objective, config(token_choice=choice, window_factors=[1.0], **options)).choose(plan)
    assert set(plain.kv.windows.values()) == {(1, 7)}
    assert set(varied.kv.windows.values()) <= {(1, 4), (1, 7), (2, 14)} and varied.kv.token_choice == choice
    assert 2 not in varied.kv.token_aware_blocks and (varied.prefill, varied.decode) == (plan.prefill, plan.decode)
    if options.get("target_kv_reduction"):
        assert varied.kv_reduction(40)["total"] >= 2.5
    else:
        assert tokens_of(varied) <= tokens_of(plain) == 4 * 8 + 40
    assert objective.energy(varied) <= objective.energy(plain)


def test_near_the_best_of_all(objective):
    plan = replace(objective.dense_plan, decode=StagePlan((0, 2, 4)))
    chosen = TokenAwareBlocks(objective, config(num_token_aware_blocks=2)).choose(plan)
    windows = [(1, 4), (1, 7), (2, 14), None]
    energies = []
    for three in product(windows, repeat=3):
        kv = KVPlan((), 1, 7).with_windows({b: own for b, own in zip((1, 3, 5), three, strict=True) if own})
        if tokens_of(replace(plan, kv=kv)) <= 2 * 8 + 40:
            energies.append(objective.energy(replace(plan, kv=kv)))
    assert objective.energy(chosen) <= sorted(energies)[3]


def test_refining_is_an_option(objective):
    rough = TokenAwareBlocks(objective, config(num_token_aware_blocks=4, refine_token_aware_blocks=False))
    fine = TokenAwareBlocks(objective, config(num_token_aware_blocks=4))
    plan = objective.dense_plan
    spent = objective.cost.total
    rough_energy = objective.energy(rough.choose(plan))
    assert objective.cost.total - spent <= objective.cost.evaluations * objective.dense_block_tokens
    assert objective.energy(fine.choose(plan)) <= rough_energy


def test_moves_keep_to_the_budget_and_reach_every_window(objective):
    windows, rng = BlockWindows(objective, config(), range(6)), random.Random(0)
    plan, seen = windows.least(objective.dense_plan), set()
    assert plan.kv.windows == dict.fromkeys(range(6), (1, 4))
    for _ in range(600):
        plan = windows._move(plan, 90, rng)
        assert tokens_of(plan) <= 90
        seen |= {(block, plan.kv.windows.get(block)) for block in range(6)}
    assert len(seen) == 6 * 4


def test_windows_that_the_prompts_cannot_tell_are_left_out(objective):
    found = BlockWindows(objective, config(window_factors=[0.5, 1.0, 2.0, 3.0, 4.0, 5.0]), range(6))
    assert list(found.sizes) == [(1, 4), (1, 7), (2, 14), None]  # 24 is more than half of the longest prompt, 40
    short = BlockWindows(objective, config(first_tokens=4, last_tokens=28), range(6))
    assert list(short.sizes) == [(2, 14), (4, 28), None]  # the plain window always is one of them
    by_attention = BlockWindows(objective, config(token_choice="attention", last_tokens=8), range(6))
    assert list(by_attention.sizes) == [(1, 8), (2, 16), None]  # what chooses is kept


def test_prompts_too_short_to_tell_are_named(objective, caplog):
    BlockWindows(objective, config(), range(6))
    assert not caplog.records
    BlockWindows(objective, config(kv_prompt_tokens=80), range(6))
    assert "tokens for prompts of 80" in caplog.text


def test_what_cannot_be_met_says_how_near_the_best_comes(objective):
    plan = replace(objective.dense_plan, decode=StagePlan((2,)))
    with pytest.raises(
        ValueError, match=r"cannot be met: .* a window of 1 \+ 4 of 40 .* and 1 blocks removed it is 9.60"
    ):
        TokenAwareBlocks(objective, config(target_kv_reduction=9.7)).check(plan)
    TokenAwareBlocks(objective, config(target_kv_reduction=9.5)).check(plan)
    with pytest.raises(ValueError, match="num_token_aware_blocks is 6, but only 5"):
        TokenAwareBlocks(objective, config(num_token_aware_blocks=6)).check(plan)
    with pytest.raises(ValueError, match=r"window_factors \[2.0\] have no window small enough .*blocks 4"):
        TokenAwareBlocks(objective, config(window_factors=[2.0], num_token_aware_blocks=4)).check(plan)
