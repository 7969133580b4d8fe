import pytest

from hf_pdprune.search import Objective, SearchConfig
from hf_pdprune.search.baselines import contiguous_group, end_group, one_shot, random_blocks
from hf_pdprune.search.operations import with_removed


REMOVABLE = (5, 2, 3, 6, 1, 4)  # of eight blocks, the most redundant first


@pytest.fixture
def objective(tiny_model, calibration):
    model = tiny_model("llama", num_hidden_layers=8)
    return Objective(model, calibration(model))


def test_one_shot_and_end_group_take_what_they_say(objective):
    config = SearchConfig(2, 3)
    plan = one_shot(objective, REMOVABLE, config)
    assert (plan.prefill.removed_blocks, plan.decode.removed_blocks) == ((2, 5), (2, 3, 5))
    plan = end_group(objective, REMOVABLE, config)
    assert (plan.prefill.removed_blocks, plan.decode.removed_blocks) == ((5, 6), (4, 5, 6))
    assert objective.cost.evaluations == 0


def test_random_blocks_depend_on_the_seed_alone(objective):
    plans = [random_blocks(objective, REMOVABLE, SearchConfig(2, 3, search_seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert plans[0] == plans[1] and len({plan.decode for plan in plans}) > 1
    assert all(len(plan.prefill.removed_blocks) == 2 and len(plan.decode.removed_blocks) == 3 for plan in plans)


def test_contiguous_groups_are_the_best_runs(objective):
    plan = contiguous_group(objective, REMOVABLE, SearchConfig(2, 3))
    prefill, decode = plan.prefill.removed_blocks, plan.decode.removed_blocks
    groups = [(begin, begin + 1) for begin in range(1, 6)]
    dense = objective.dense_plan
    assert prefill == min(groups, key=lambda group: objective.energy(with_removed(dense, group, group)))
    groups = [(begin, begin + 1, begin + 2) for begin in range(1, 5)]
    groups = [group for group in groups if set(prefill) <= set(group)]
    assert decode == min(groups, key=lambda group: objective.energy(with_removed(dense, prefill, group)))
