import random

import pytest

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search.moves import Moves
from hf_pdprune.search.operations import Operations, with_removed


@pytest.mark.parametrize(("prefill", "decode"), [(0, 3), (2, 2), (2, 5), (3, 8)])
def test_neighbours_keep_counts_and_the_subset_rule_and_reach_every_set(tiny_model, prefill, decode):
    removable = (7, 3, 5, 1, 6, 2, 4, 8)
    plan = PruningPlan.empty(tiny_model("llama", num_hidden_layers=10))
    plan = with_removed(plan, removable[:prefill], removable[:decode])
    moves, rng = Moves(Operations(removable)), random.Random(0)
    seen = set()
    for _ in range(4000):
        neighbour = moves(plan, rng)
        removed = set(neighbour.prefill.removed_blocks), set(neighbour.decode.removed_blocks)
        assert (len(removed[0]), len(removed[1])) == (prefill, decode)
        assert removed[0] <= removed[1] <= set(removable)
        before = set(plan.prefill.removed_blocks), set(plan.decode.removed_blocks)
        assert all(len(old - new) <= 1 for old, new in zip(before, removed, strict=True))
        assert neighbour != plan
        plan = neighbour
        seen |= removed[1]
    assert seen == set(removable)


def test_a_plan_without_neighbours_is_its_own(tiny_llama):
    plan = PruningPlan.empty(tiny_llama)
    assert Moves(Operations((1, 2)))(plan, random.Random(0)) == plan
    full = with_removed(plan, (1, 2), (1, 2))
    assert Moves(Operations((1, 2)))(full, random.Random(0)) == full


def test_redundant_blocks_are_drawn_more_often(tiny_model):
    plan = with_removed(PruningPlan.empty(tiny_model("llama", num_hidden_layers=30)), (), (1,))
    removable = (1, *range(28, 1, -1))
    moves, rng = Moves(Operations(removable)), random.Random(0)
    drawn = [moves(plan, rng).decode.removed_blocks[0] for _ in range(3000)]
    assert drawn.count(28) > 3 * drawn.count(10)
    assert drawn.count(2) > drawn.count(28)  # the neighbour of what comes back


def test_blocks_change_how_they_go_where_pairs_can_be_merged(tiny_model):
    plan = with_removed(PruningPlan.empty(tiny_model("llama", num_hidden_layers=10)), (3, 4), (3, 4, 6))
    moves, rng = Moves(Operations(range(1, 9), [(b - 1, b) for b in range(2, 9)])), random.Random(0)
    merged, ways = set(), 0
    for _ in range(500):
        neighbour = moves(plan, rng)
        assert len(neighbour.prefill.missing_blocks) == 2 and len(neighbour.decode.missing_blocks) == 3
        same = neighbour.decode.missing_blocks == plan.decode.missing_blocks
        ways += same and neighbour != plan and neighbour.prefill.missing_blocks == plan.prefill.missing_blocks
        plan = neighbour
        merged |= set(plan.decode.merged_blocks)
    assert ways > 10 and len(merged) >= 6


@pytest.mark.parametrize(("prefill", "decode"), [(3, 2), (2, 2), (2, 4), (2, 0)])
def test_neighbours_under_the_relaxed_subset_rule(tiny_model, prefill, decode):
    removable = (7, 3, 5, 1, 6, 2, 4, 8)
    operations = Operations(removable, [(b - 1, b) for b in (2, 5, 8)], relaxed=True)
    start = operations.plan(
        PruningPlan.empty(tiny_model("llama", num_hidden_layers=10)),
        dict.fromkeys(removable[:prefill]),
        dict.fromkeys(removable[:decode]),
    )
    plan, moves, rng = start, Moves(operations), random.Random(0)
    seen = {"prefill": set(), "decode": set(), "projected": set(), "both": set()}
    for _ in range(4000):
        plan = moves(plan, rng)
        assert len(plan.prefill.skipped_blocks) == prefill and len(plan.decode.missing_blocks) == decode
        seen["prefill"] |= set(plan.prefill.skipped_blocks)
        seen["decode"] |= set(plan.decode.missing_blocks)
        seen["projected"] |= set(plan.prefill.projected_blocks)
        seen["both"] |= set(plan.prefill.missing_blocks)
    everything = set(removable)
    assert seen["prefill"] == seen["projected"] == everything
    assert seen["decode"] == seen["both"] == (everything if decode else set())
