import math

import pytest
import torch

from hf_pdprune.search import (
    BlockCounts,
    LatencyGoal,
    MergedPairs,
    Objective,
    Operations,
    SearchConfig,
    StepwiseSearch,
)
from hf_pdprune.search.operations import with_removed


REMOVABLE = (5, 2, 3, 6, 1, 4)  # of eight blocks, the most redundant first


@pytest.fixture
def objective(tiny_model, calibration):
    model = tiny_model("llama", num_hidden_layers=8)
    return Objective(model, calibration(model))


def plain_greedy(objective, removable, config):
    """SLEB without any saving."""
    prefill, decode = [], []
    while len(decode) < config.num_decode_blocks:
        both = len(prefill) < config.num_prefill_blocks
        plans = {}
        for block in removable:
            if block not in decode:
                plans[block] = with_removed(
                    objective.dense_plan, [*prefill, block] if both else prefill, [*decode, block]
                )
        best = min(plans, key=lambda block: objective.energy(plans[block]))
        decode.append(best)
        prefill += [best] if both else []
    return with_removed(objective.dense_plan, prefill, decode)


@pytest.mark.parametrize("counts", [(0, 2), (2, 2), (2, 4)])
def test_greedy_is_sleb_at_less_cost(objective, counts):
    plain = Objective(objective.model, objective.calibration, hidden_cache_bytes=0)
    config = SearchConfig(*counts)
    search = StepwiseSearch(objective, Operations(REMOVABLE), config, annealing=False)
    steps = search.run(BlockCounts(*counts))
    assert steps[-1].plan == plain_greedy(plain, REMOVABLE, config)
    assert steps[-1].plain_block_tokens == plain.cost.block_tokens
    assert objective.cost.evaluations == plain.cost.evaluations
    assert objective.cost.plain_block_tokens == plain.cost.block_tokens
    assert objective.cost.total < plain.cost.block_tokens


def test_annealing_never_ends_above_its_greedy_start_and_keeps_counts(objective):
    config = SearchConfig(annealing_share=0.3, search_share=0.5)
    search = StepwiseSearch(objective, Operations(REMOVABLE), config)
    steps = search.run(BlockCounts(2, 4))
    assert [(len(s.plan.prefill.missing_blocks), len(s.plan.decode.missing_blocks)) for s in steps] == [
        (1, 1), (2, 2), (2, 3), (2, 4),
    ]  # fmt: skip
    exact = Objective(objective.model, objective.calibration)
    for step in steps:
        assert step.energy <= step.greedy_energy
        assert step.energy == pytest.approx(exact.energy(step.plan), abs=1e-9)  # on all batches, not on half of them
    costs = [step.block_tokens for step in steps]
    assert costs == sorted(costs) and costs[-1] == objective.cost.total


def test_restarts_share_the_budget_and_seeds_differ(objective):
    costs = {}
    for restarts in (1, 3):
        own = Objective(objective.model, objective.calibration)
        config = SearchConfig(annealing_share=0.2, num_restarts=restarts)
        StepwiseSearch(own, Operations(REMOVABLE), config).run(BlockCounts(3, 3))
        costs[restarts] = own.cost.total
    assert costs[1] != costs[3] and costs[3] < 1.5 * costs[1]


def test_max_kl_ends_the_search_with_prefill_first_and_decode_after_it(objective):
    config = SearchConfig(annealing_share=0)
    steps = StepwiseSearch(objective, Operations(REMOVABLE), config, annealing=False).run(BlockCounts(6, 6))
    bound = (steps[1].energy + steps[2].energy) / 2
    search = StepwiseSearch(objective, Operations(REMOVABLE), config, annealing=False)
    within = search.run(BlockCounts(6, 6), max_kl=bound)
    assert all(step.energy <= bound for step in within) and all(step.energy > bound for step in search.refused)
    assert len(within[-1].plan.prefill.missing_blocks) == 2 <= len(within[-1].plan.decode.missing_blocks)
    nothing = StepwiseSearch(objective, Operations(REMOVABLE), config, annealing=False)
    assert nothing.run(BlockCounts(6, 6), max_kl=1e-9) == [] and nothing.refused[-1].energy < math.inf


def test_merging_is_an_operation(objective):
    model, data = objective.model, objective.calibration
    pairs = MergedPairs.distil(model, list(torch.randint(3, 250, (64, 32)).split(16)), range(2, 7), rank=16)
    merging = Objective(model, data, merged_pairs=pairs)
    search = StepwiseSearch(merging, Operations(REMOVABLE, pairs.pairs), SearchConfig(annealing_share=0.3))
    steps = search.run(BlockCounts(2, 3))
    removing = StepwiseSearch(objective, Operations(REMOVABLE), SearchConfig(), annealing=False).run(BlockCounts(2, 3))
    assert steps[-1].plan.decode.merged_blocks and steps[-1].energy < removing[-1].energy
    with pytest.raises(ValueError, match="which has not been distilled"):
        objective.energy(steps[-1].plan)


@pytest.mark.parametrize("counts", [(2, 4), (4, 2), (2, 0)])
def test_the_relaxed_subset_rule_lets_prefill_lose_other_blocks_and_more(objective, counts):
    config = SearchConfig(annealing_share=1.0)
    search = StepwiseSearch(objective, Operations(REMOVABLE, relaxed=True), config)
    steps = search.run(BlockCounts(*counts, relaxed=True))
    sizes = [(len(s.plan.prefill.skipped_blocks), len(s.plan.decode.missing_blocks)) for s in steps]
    assert len(steps) == sum(counts) and sizes == sorted(sizes)
    assert all(
        abs(p / max(counts[0], 1) - d / max(counts[1], 1)) <= 1 / min(filter(None, counts)) for p, d in sizes[:-1]
    )
    found = steps[-1].plan
    assert (len(found.prefill.skipped_blocks), len(found.decode.missing_blocks)) == counts
    exact = Objective(objective.model, objective.calibration)
    assert steps[-1].energy == pytest.approx(exact.energy(found), abs=1e-9)
    if counts[0] <= counts[1]:
        strict = StepwiseSearch(objective, Operations(REMOVABLE), config).run(BlockCounts(*counts))
        assert steps[-1].energy <= strict[-1].energy
    else:
        assert found.prefill.projected_blocks


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_for_a_latency_each_block_goes_where_it_costs_least_for_the_time_it_saves(objective, share, relaxed):
    goal = LatencyGoal(objective.model, 1.25, share, relaxed)
    operations = Operations(REMOVABLE, relaxed=relaxed)
    search = StepwiseSearch(objective, operations, SearchConfig(), annealing=False)
    steps = search.run(goal)
    exact = Objective(objective.model, objective.calibration)
    plan, energy, plain = exact.dense_plan, 0.0, 0
    for step in steps:
        assert goal.latency(plan) > 1 / 1.25
        additions = {stages: operations.additions(plan, *stages) for stages in goal.next_stages(plan)}
        for (_, in_decode), plans in additions.items():
            lost = plan.decode.missing_blocks if in_decode else plan.prefill.skipped_blocks
            plain += (len(REMOVABLE) - len(lost)) * exact.plain_block_tokens(plans[0])
        best = [min(plans, key=exact.energy) for plans in additions.values()]
        prices = [goal.price(plan, added, exact.energy(added) - energy) for added in best]
        assert step.plan == best[prices.index(min(prices))] and step.plain_block_tokens == plain
        plan, energy = step.plan, exact.energy(step.plan)
    assert goal.latency(plan) <= 1 / 1.25
    lost = len(plan.prefill.skipped_blocks), len(plan.decode.missing_blocks)
    if not relaxed:
        assert lost[0] <= lost[1] and not plan.prefill.projected_blocks
    elif share in (0.0, 1.0):  # what does not count is left alone
        assert lost[round(share == 1)] == 0


def test_annealing_for_a_latency_ends_at_or_below_the_greedy_plan(objective):
    goal = LatencyGoal(objective.model, 1.3, 0.5, relaxed=True)
    config = SearchConfig(annealing_share=0.5)
    steps = StepwiseSearch(objective, Operations(REMOVABLE, relaxed=True), config).run(goal)
    assert all(step.energy <= step.greedy_energy for step in steps)
    assert goal.next_stages(steps[-1].plan) == [] and goal.next_stages(steps[-2].plan)
