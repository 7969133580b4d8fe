import pytest
import torch

from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer.hidden_matching import HiddenMatching


@pytest.fixture
def plan():
    return PruningPlan("base", "llama", 10, prefill=StagePlan((3, 4)), decode=StagePlan((3, 4, 7), ((0, 1),)))


def test_states_are_compared_after_the_gap_by_dense_numbers(plan):
    matching = HiddenMatching(plan)
    assert matching.prefill == [(2, 4)]
    assert matching.decode == [(0, 1), (2, 4), (6, 7)]
    assert matching.dense_blocks == {1, 4, 7}


def test_projected_blocks_are_part_of_a_gap():
    plan = PruningPlan("base", "llama", 10, prefill=StagePlan((3,), (), (4, 8)), decode=StagePlan((3,)))
    assert HiddenMatching(plan).prefill == [(2, 4), (7, 8)] and HiddenMatching(plan).decode == [(2, 3)]
    assert HiddenMatching(plan, [4, 5]).prefill == [(5, 5)]


def test_chosen_blocks_are_left_out_where_a_stage_lacks_them(plan):
    matching = HiddenMatching(plan, [1, 5, 6])
    assert matching.prefill == [(1, 1), (5, 5), (6, 6)]
    assert matching.decode == [(5, 5), (6, 7)]


def test_loss_counts_every_completion_token_once_in_each_stage(plan):
    matching = HiddenMatching(plan, [2])
    batch = {
        "prompt_ids": torch.zeros(2, 3, dtype=torch.long),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[5, 6, 7, -100], [5, -100, -100, -100]]),
    }
    dense = {4: torch.ones(2, 6, 8)}
    prefill = {2: torch.full((2, 3, 8), 1.5)}
    prefill[2][0, 0] = 1e3  # padding
    decode = {2: torch.full((2, 3, 8), 3.0)}
    decode[2][1] = 1e3  # no label
    loss = matching.loss(prefill, decode, dense, batch)
    assert loss == pytest.approx(0.25 * 3 + 0.25 * 1 + 4.0 * 2)
    assert matching.loss(prefill, {}, dense, batch) == pytest.approx(0.25 * 4)
