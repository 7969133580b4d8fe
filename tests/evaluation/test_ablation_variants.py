from dataclasses import replace

import pytest

from hf_pdprune.evaluation.ablation_variants import AblationVariants
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


PLAN = PruningPlan(
    "tiny", "llama", 10, prefill=StagePlan((3, 5)), decode=StagePlan((3, 4, 5, 7, 8)), kv=KVPlan((0, 1, 2, 6), 4, 12)
)


def test_parts_differ_from_the_plan_in_one_thing():
    parts = dict(AblationVariants(PLAN).parts())
    assert parts["blocks and cache"] == PLAN
    seen = {
        name: (plan.prefill.removed_blocks, plan.decode.removed_blocks, plan.kv.token_aware_blocks)
        for name, plan in parts.items()
    }
    both, window = ((3, 5), (3, 4, 5, 7, 8)), (0, 1, 2, 6)
    assert seen == {
        "nothing removed": ((), (), ()),
        "cache only": ((), (), window),
        "blocks only, decode alone": ((), both[1], ()),
        "blocks only, those of prefill": (both[0], both[0], ()),
        "blocks only": (*both, ()),
        "blocks and cache": (*both, window),
    }


def test_what_prefill_projects_decode_runs():
    relaxed = replace(PLAN, prefill=StagePlan((3, 5), (), (1, 9)))
    alone = dict(AblationVariants(relaxed).parts())["blocks only, those of prefill"]
    assert alone.prefill == alone.decode == StagePlan((3, 5))


def test_windows_keep_the_blocks():
    windows = dict(AblationVariants(PLAN).windows([(0, 16), (8, 8)]))
    assert [(plan.kv.first_tokens, plan.kv.last_tokens) for plan in windows.values()] == [(0, 16), (8, 8)]
    assert {plan.kv.token_aware_blocks for plan in windows.values()} == {(0, 1, 2, 6)}


def test_caches_hand_over_equal_bytes():
    caches = dict(AblationVariants(PLAN).caches(100, seed=1))
    assert {(plan.prefill, plan.decode) for plan in caches.values()} == {(PLAN.prefill, PLAN.decode)}
    assert caches["first + last, our blocks"] == PLAN
    tokens = {
        name: sum(plan.kept_prompt_tokens(block, 100) for block in plan.kept_blocks("decode"))
        for name, plan in caches.items()
    }
    assert tokens.pop("all tokens") == 5 * 100
    every = tokens.pop("first + last, all blocks")  # a token per block at most is lost to rounding
    assert set(tokens.values()) == {4 * 16 + 100} and tokens.popitem()[1] - 5 < every <= 4 * 16 + 100
    drawn = [dict(AblationVariants(PLAN).caches(100, seed))["first + last, random blocks"] for seed in range(4)]
    assert len({plan.kv.token_aware_blocks for plan in drawn}) > 1
    assert caches["attention, our blocks"].kv.token_choice == "attention"


@pytest.mark.parametrize("removed", [(), (0, 1), (0, 2, 6, 9)])
def test_other_blocks_with_as_many_token_aware_ones(removed):
    other = PruningPlan("tiny", "llama", 10, decode=StagePlan(removed))
    plan = AblationVariants(PLAN).with_blocks(other)
    assert plan.decode.removed_blocks == removed and len(plan.kv.token_aware_blocks) == 4
    assert not set(plan.kv.token_aware_blocks) & set(removed)
    assert (plan.kv.first_tokens, plan.kv.last_tokens) == (4, 12)


def test_unified_plan_costs_as_much():
    assert AblationVariants(PLAN).unified_blocks == 3  # two and five


def test_as_many_blocks_in_all_in_another_split():
    split = AblationVariants(PLAN).split
    assert split("one_shot") == ("one_shot", 2, 5)
    assert split("unified") == ("greedy", 3, 3) and split("mirrored") == ("annealing", 5, 2)
