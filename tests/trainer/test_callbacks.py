from dataclasses import replace
from types import SimpleNamespace

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


def test_projected_blocks_go_in_rounds_and_fade(plan):
    relaxed = replace(plan, prefill=StagePlan((3, 8), ((5, 6),), (0, 2)))
    removal = BlockRemovalCallback(relaxed, rounds=4, fraction=1.0, fade_steps=2)
    skipped = [removal.plan_of_round(number).prefill.skipped_blocks for number in range(1, 5)]
    assert skipped == [(3, 6), (0, 3, 6, 8), (0, 2, 3, 6, 8), (0, 2, 3, 6, 8)]
    assert removal.plan_of_round(4) == relaxed
    removal.move_to(5, 20)
    assert {stage: sorted(scales) for stage, scales in removal.scales.items()} == {"prefill": [0, 8], "decode": [8]}


def test_round_follows_from_the_step_alone(plan):
    removal = BlockRemovalCallback(plan, rounds=3, fraction=0.6)
    assert [removal.round_at(step, 100) for step in (0, 19, 20, 39, 40, 99)] == [1, 1, 2, 2, 3, 3]
    assert BlockRemovalCallback(plan, rounds=3, fraction=0.0).round_at(0, 100) == 3


def test_blocks_fade_before_they_go(plan):
    removal = BlockRemovalCallback(plan, rounds=2, fraction=1.0, fade_steps=3)
    seen = []
    for step in range(20):
        removal.move_to(step, 20)
        seen.append((len(removal.current_plan.decode.missing_blocks), removal.scales.get("decode", {})))
    assert [missing for missing, _ in seen] == [0] * 3 + [3] * 7 + [3] * 3 + [6] * 7
    assert [max(scales.values(), default=0) for _, scales in seen[:4]] == [0.75, 0.5, 0.25, 0]
    fading = set(seen[10][1])
    assert fading == set(plan.decode.missing_blocks) - set(removal.plan_of_round(1).decode.missing_blocks)
    removal.move_to(10, 20)
    assert set(removal.scales["prefill"]) <= fading and not removal.is_complete


@pytest.mark.parametrize(
    ("rounds", "fraction", "max_steps", "longest"),
    [
        (1, 0.5, 10, 9),  # one round begins at once and has all steps but one
        (2, 1.0, 6, 2),  # the last one begins at step 3
        (4, 0.5, 100, 12),  # rounds of 12.5 steps
        (3, 0.0, 100, 0),
        (1, 0.5, 1, 0),
    ],
)
def test_every_round_is_long_enough_for_its_blocks_to_fade(plan, rounds, fraction, max_steps, longest):
    state = SimpleNamespace(max_steps=max_steps, global_step=0)
    BlockRemovalCallback(plan, rounds, fraction, longest).on_train_begin(None, state, None)
    message = rf"removal_fade_steps={longest + 1} is too long: .* at most {longest} fits"
    with pytest.raises(ValueError, match=message):
        BlockRemovalCallback(plan, rounds, fraction, longest + 1).on_train_begin(None, state, None)


def test_rounds_may_choose_their_blocks(plan):
    calls = []

    def search(before, target):
        calls.append((before, target))
        return target

    removal = BlockRemovalCallback(plan, rounds=3, search=search)
    removal.move_to(19, 20)
    assert [before for before, _ in calls] == removal.plans[:2] and removal.final_plan == plan


def test_metrics_do_not_count_before_all_blocks_are_gone(plan):
    removal = BlockRemovalCallback(plan, rounds=2, fraction=0.5)
    state = SimpleNamespace(
        global_step=4, max_steps=20, best_metric=1.0, best_global_step=3, best_model_checkpoint="x"
    )
    removal.on_step_begin(None, state, None)
    assert state.best_metric is state.best_global_step is state.best_model_checkpoint is None
    state.global_step, state.best_metric = 5, 2.0  # measured after step 4
    removal.on_step_begin(None, state, None)
    assert state.best_metric is None and removal.is_complete
    state.global_step, state.best_metric = 6, 3.0
    removal.on_step_begin(None, state, None)
    assert state.best_metric == 3.0


def test_checkpoint_of_other_rounds_is_refused(plan, tmp_path):
    removal = BlockRemovalCallback(plan, rounds=3, fraction=0.6)
    removal.move_to(25, 100)
    removal.save(tmp_path)
    again = BlockRemovalCallback(plan, rounds=3, fraction=0.6)
    again.load(tmp_path)
    assert again.plans == removal.plans and len(again.plans) == 2
    with pytest.raises(ValueError, match="other rounds"):
        BlockRemovalCallback(plan, rounds=2).load(tmp_path)


def walk(removal, steps, max_steps):
    """By step, how many blocks decode lacks, and what fading ones are multiplied with."""
    seen = []
    for step in steps:
        removal.move_to(step, max_steps)
        fading = removal.scales.get("decode", {})
        seen.append((len(removal.current_plan.decode.missing_blocks), max(fading.values(), default=0)))
    return seen


def test_blocks_that_are_gone_stay_so_when_resumed_with_another_number_of_steps(plan, tmp_path):
    removal = BlockRemovalCallback(plan, rounds=2, fraction=1.0, fade_steps=3)
    assert walk(removal, range(6), 8) == [(0, 0.75), (0, 0.5), (0, 0.25), (3, 0), (3, 0.75), (3, 0.5)]
    removal.save(tmp_path)
    for max_steps in (8, 16):
        again = BlockRemovalCallback(plan, rounds=2, fraction=1.0, fade_steps=3)
        again.load(tmp_path)
        assert (again.step, again.scales) == (removal.step, removal.scales)
        again.on_train_begin(None, SimpleNamespace(global_step=6, max_steps=max_steps), None)
        assert walk(again, range(6, max_steps), max_steps) == [(3, 0.25)] + [(6, 0)] * (max_steps - 7)


def test_a_round_that_has_not_begun_follows_the_new_number_of_steps(plan, tmp_path):
    removal = BlockRemovalCallback(plan, rounds=2, fraction=1.0)
    walk(removal, range(3), 8)
    removal.save(tmp_path)
    again = BlockRemovalCallback(plan, rounds=2, fraction=1.0)
    again.load(tmp_path)
    assert walk(again, range(3, 12), 16) == [(3, 0)] * 5 + [(6, 0)] * 4


def test_another_training_goes_on_without_the_blocks_that_are_gone(plan):
    removal = BlockRemovalCallback(plan, rounds=2, fraction=1.0, fade_steps=3)
    walk(removal, range(9), 8)
    removal.begin_training()
    removal.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=2), None)
    assert removal.is_complete and walk(removal, range(2), 2) == [(6, 0)] * 2
    stopped = BlockRemovalCallback(plan, rounds=2, fraction=1.0, fade_steps=3)
    walk(stopped, range(2), 20)
    stopped.begin_training()  # its blocks fade on
    assert walk(stopped, range(12), 20) == [(0, 0.5), (0, 0.25)] + [(3, 0)] * 8 + [(3, 0.75), (3, 0.5)]


def test_a_training_that_begins_again_begins_with_the_first_round(plan):
    """As with auto_find_batch_size, where memory has run out."""
    removal, state = BlockRemovalCallback(plan, rounds=2, fraction=1.0), SimpleNamespace(global_step=0, max_steps=8)
    for _ in range(2):
        removal.on_train_begin(None, state, None)
        assert walk(removal, range(8), 8) == [(3, 0)] * 4 + [(6, 0)] * 4
