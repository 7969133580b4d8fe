import pytest

from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.search import BlockCounts


BOTH, DECODE, PREFILL = (True, True), (False, True), (True, False)


@pytest.fixture
def plan(tiny_llama):
    def make(prefill=(), decode=(), projected=()):
        return PruningPlan.empty(
            tiny_llama, prefill=StagePlan(prefill, projected_blocks=projected), decode=StagePlan(decode)
        )

    return make


def test_both_stages_come_first_and_decode_after_them(plan):
    goal = BlockCounts(1, 2)
    assert (goal.fewest_blocks, goal.required_blocks, goal.num_steps) == (2, 0, 2)
    assert goal.next_stages(plan()) == [BOTH] and goal.next_stages(plan(), {BOTH}) == [DECODE]
    assert goal.next_stages(plan((2,), (2,))) == [DECODE] and goal.next_stages(plan((2,), (2, 3))) == []
    assert goal.next_stages(plan(), {BOTH, DECODE}) == []


def test_stages_take_turns_under_the_relaxed_rule(plan):
    goal = BlockCounts(2, 1, relaxed=True)
    assert (goal.fewest_blocks, goal.num_steps) == (2, 3)
    assert goal.next_stages(plan()) == [DECODE] and goal.next_stages(plan(), {DECODE}) == [PREFILL]
    assert goal.next_stages(plan((), (2,))) == [PREFILL]
    assert goal.next_stages(plan((), (), (2,))) == [DECODE]
    assert goal.next_stages(plan((), (2,), (3,))) == [PREFILL] and goal.next_stages(plan((2,), (2,), (3,))) == []


def test_what_falls_short_of_a_speedup_is_said(plan):
    assert BlockCounts(1, 2).shortfall(plan()) is None  # with max_kl these are the most that go
    goal = BlockCounts(1, 2, least=(1, 0))
    assert (goal.fewest_blocks, goal.required_blocks) == (2, 1)
    assert goal.shortfall(plan((2,), (2,))) is None
    assert goal.shortfall(plan((), (2,))) == "the speedups asked for take 1 blocks from prefill and 2 from decode"
