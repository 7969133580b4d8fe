import random

import pytest

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search import SearchConfig
from hf_pdprune.search.moves import Moves, removable_blocks, with_removed


@pytest.mark.parametrize(("prefill", "decode"), [(0, 3), (2, 2), (2, 5), (3, 8)])
def test_neighbours_keep_counts_and_the_subset_rule_and_reach_every_set(tiny_model, prefill, decode):
    removable = (7, 3, 5, 1, 6, 2, 4, 8)
    plan = PruningPlan.empty(tiny_model("llama", num_hidden_layers=10))
    plan = with_removed(plan, removable[:prefill], removable[:decode])
    moves, rng = Moves(removable), random.Random(0)
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
    assert Moves((1, 2))(plan, random.Random(0)) == plan
    full = with_removed(plan, (1, 2), (1, 2))
    assert Moves((1, 2))(full, random.Random(0)) == full


def test_redundant_blocks_are_drawn_more_often(tiny_model):
    plan = with_removed(PruningPlan.empty(tiny_model("llama", num_hidden_layers=30)), (), (1,))
    removable = (1, *range(28, 1, -1))
    moves, rng = Moves(removable), random.Random(0)
    drawn = [moves(plan, rng).decode.removed_blocks[0] for _ in range(3000)]
    assert drawn.count(28) > 3 * drawn.count(10)
    assert drawn.count(2) > drawn.count(28)  # the neighbour of what comes back


def test_the_pruning_set(statistics):
    redundancy = statistics([0.99, 0.97, 0.96, 0.98, 0.5, 0.99])
    assert removable_blocks(redundancy, SearchConfig(1, 2)) == (3, 1, 2)
    assert removable_blocks(redundancy, SearchConfig(1, 2, num_protected_first_blocks=0)) == (0, 3, 1, 2)
    assert removable_blocks(redundancy, SearchConfig(1, 2, distillation_threshold=0.965)) == (3, 1)
    # Too few are above the threshold: the next ones are taken, as many as are needed.
    assert removable_blocks(redundancy, SearchConfig(1, 3, distillation_threshold=0.975)) == (3, 1, 2)
