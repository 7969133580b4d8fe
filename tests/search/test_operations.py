import pytest

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search import SearchConfig
from hf_pdprune.search.operations import Operations, missing_of, removable_blocks, unprotected_blocks, with_removed


@pytest.fixture
def empty(tiny_model):
    return PruningPlan.empty(tiny_model("llama", num_hidden_layers=8))


def test_the_pruning_set(statistics):
    redundancy = statistics([0.99, 0.97, 0.96, 0.98, 0.5, 0.99])
    assert removable_blocks(redundancy, SearchConfig()) == (3, 1, 2)
    assert removable_blocks(redundancy, SearchConfig(num_protected_first_blocks=0)) == (0, 3, 1, 2)
    assert removable_blocks(redundancy, SearchConfig(distillation_threshold=0.965)) == (3, 1)
    # Too few are above the threshold: the next ones are taken, as many as are needed.
    assert removable_blocks(redundancy, SearchConfig(distillation_threshold=0.975), at_least=3) == (3, 1, 2)
    assert unprotected_blocks(redundancy, SearchConfig()) == (3, 1, 2, 4)


def test_operations_become_plans_and_back(empty):
    operations = Operations((5, 2, 3), [(1, 2), (3, 4)])
    assert operations.blocks == (5, 2, 3, 4)
    plan = operations.plan(empty, {2: 1}, {2: 1, 5: None, 4: 3})
    assert plan.prefill.merged_blocks == ((1, 2),) and plan.prefill.removed_blocks == ()
    assert plan.decode.merged_blocks == ((1, 2), (3, 4)) and plan.decode.removed_blocks == (5,)
    assert missing_of(plan.decode) == {2: 1, 5: None, 4: 3}
    assert operations.plan(empty, {3: None}, {2: 1}) is None  # the subset rule


def test_a_pair_whose_kept_block_goes_is_a_removal(empty):
    operations = Operations((2, 3, 5), [(1, 2), (2, 3), (3, 4)])
    plan = operations.plan(empty, {}, {3: 2, 2: None})
    assert plan.decode.removed_blocks == (2, 3) and plan.decode.merged_blocks == ()
    assert operations.plan(empty, {}, {4: 3, 3: None}) is None  # 4 may be merged, not removed outright


def test_additions_lose_one_more_block_merged_where_it_can_be(empty):
    operations = Operations((2, 3), [(1, 2), (3, 4)])
    plans = operations.additions(empty, in_prefill=True, in_decode=True)
    assert [(p.decode.removed_blocks, p.decode.merged_blocks) for p in plans] == [
        ((), ((1, 2),)), ((3,), ()), ((), ((3, 4),)),
    ]  # fmt: skip
    assert all(plan.prefill == plan.decode for plan in plans)
    more = operations.additions(with_removed(empty, (3,), (3,)), in_prefill=False, in_decode=True)
    assert [missing_of(plan.decode) for plan in more] == [{3: None, 2: 1}]  # 4 has lost the block that would keep it
    assert all(plan.prefill.removed_blocks == (3,) for plan in more)


def test_under_the_relaxed_subset_rule_prefill_projects_what_decode_keeps(empty):
    operations = Operations((2, 3, 5), [(3, 4)], relaxed=True)
    plan = operations.plan(empty, {2: None, 5: None}, {5: None, 4: 3})
    assert (plan.prefill.removed_blocks, plan.prefill.projected_blocks) == ((5,), (2,))
    assert missing_of(plan.prefill) == {2: None, 5: None} and missing_of(plan.decode) == {5: None, 4: 3}
    assert operations.plan(empty, {4: 3}, {}) is None  # decode runs block 4 on what only the dense block 3 makes
    assert operations.plan(empty, {4: None}, {}) is None  # not one of the pruning set
    assert Operations((2, 3, 5)).plan(empty, {2: None}, {}) is None


def test_additions_under_the_relaxed_subset_rule(empty):
    operations = Operations((2, 3, 5), [(1, 2)], relaxed=True)
    plan = operations.plan(empty, {2: None}, {5: None})

    def skipped(stages):
        found = operations.additions(plan, *stages)
        return [(missing_of(added.prefill), missing_of(added.decode)) for added in found]

    two, five = {2: None}, {5: None}
    assert skipped((True, True)) == [(two | {3: None}, five | {3: None})]
    assert skipped((True, False)) == [(two | {3: None}, five), (two | five, five)]
    assert skipped((False, True)) == [({2: 1}, five | {2: 1}), (two, five | {3: None})]
