import pytest

from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer import BlockRemovalCallback


@pytest.fixture
def plan():
    return PruningPlan(
        "base", "llama", 12, prefill=StagePlan((3, 8), ((5, 6),)), decode=StagePlan((1, 3, 6, 8, 10), ((4, 5),))
    )


@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_rounds_lead_to_the_plan_and_keep_the_subset_rule(plan, rounds):
    removal = BlockRemovalCallback(plan, rounds)
    plans = [removal.plan_of_round(number) for number in range(1, rounds + 1)]
    missing = [len(p.decode.missing_blocks) for p in plans]
    assert plans[-1] == plan
    assert missing == sorted(missing) and len(set(missing)) == rounds
    for earlier, later in zip(plans, plans[1:], strict=False):
        assert set(earlier.prefill.missing_blocks) <= set(later.prefill.missing_blocks)


def test_round_follows_from_the_step_alone(plan):
    removal = BlockRemovalCallback(plan, rounds=3, fraction=0.6)
    assert [removal.round_at(step, 100) for step in (0, 19, 20, 39, 40, 99)] == [1, 1, 2, 2, 3, 3]
    assert BlockRemovalCallback(plan, rounds=3, fraction=0.0).round_at(0, 100) == 3
