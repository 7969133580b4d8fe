import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_pdprune.inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.search.objective import Objective
from hf_pdprune.search.operations import with_removed


@torch.no_grad()
def plain_energy(model, plan, calibration):
    """The definition: mean KL of the disaggregated forward per labelled token, everything computed anew."""
    total, count = 0.0, 0
    for batch in calibration.batches:
        student = disaggregated_forward(PrefillStage(model, plan), DecodeStage(model, plan), batch)
        teacher = dense_forward(model, batch)
        kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        mask = batch["labels"] != -100
        total, count = total + kl[mask].double().sum().item(), count + int(mask.sum())
    return total / count


def test_energy_is_that_of_the_disaggregated_forward(tiny_model, architecture, calibration, random_plan):
    model = tiny_model(architecture)
    objective = Objective(model, calibration(model))
    rng = random.Random(0)
    for step in range(8):
        plan = random_plan(model, rng)
        expected = plain_energy(model, plan, objective.calibration)
        assert objective.energy(plan) == pytest.approx(expected, abs=1e-5, rel=1e-5)
        if step % 2:  # later ones are then computed from the first block that differs
            objective.accept(plan)


def test_energy_where_decode_predicts_the_first_token(tiny_llama, calibration, random_plan):
    data = calibration(tiny_llama, first_token="decode")
    objective, plain = Objective(tiny_llama, data), Objective(tiny_llama, calibration(tiny_llama))
    rng = random.Random(0)
    for step in range(6):
        plan = random_plan(tiny_llama, rng)
        assert objective.energy(plan) == pytest.approx(plain_energy(tiny_llama, plan, data), abs=1e-5, rel=1e-5)
        assert objective.energy(plan) != pytest.approx(plain.energy(plan), rel=1e-3)
        if step % 2:
            objective.accept(plan)


@pytest.mark.parametrize("token_aware", [False, True])
def test_every_saving_is_exact(tiny_llama, calibration, random_plan, token_aware):
    data = calibration(tiny_llama)
    fast, plain = Objective(tiny_llama, data), Objective(tiny_llama, data, hidden_cache_bytes=0)
    rng = random.Random(1)
    plans = [random_plan(tiny_llama, rng, token_aware) for _ in range(25)]
    for number, plan in enumerate(plans):
        assert fast.energy(plan) == plain.energy(plan)
        if number % 3 == 0:
            fast.accept(plan)
    assert fast.cost.evaluations == plain.cost.evaluations
    assert plain.cost.block_tokens == plain.cost.plain_block_tokens == fast.cost.plain_block_tokens
    assert fast.cost.block_tokens < plain.cost.block_tokens


def test_a_decode_only_change_does_not_run_prefill(tiny_llama, calibration):
    objective = Objective(tiny_llama, calibration(tiny_llama))
    plan = replace(objective.dense_plan, prefill=StagePlan((1,)), decode=StagePlan((1,)))
    objective.energy(plan)
    objective.accept(plan)
    before = objective.cost.block_tokens
    objective.energy(replace(plan, decode=StagePlan((1, 4))))
    decode_tokens = sum(int(b["completion_mask"][:, :-1].sum()) for b in objective.calibration.batches)
    assert objective.cost.block_tokens - before == decode_tokens  # of blocks 4 and 5 only block 5 runs
    objective.energy(replace(plan, kv=KVPlan((3,), 1, 2)))
    assert objective.cost.block_tokens - before == decode_tokens + 3 * decode_tokens
    assert objective.cost.reference_block_tokens == 0  # the reference's states were kept when it was evaluated


def test_a_plan_that_changes_nothing_has_no_energy(tiny_model, architecture, calibration):
    model = tiny_model(architecture)
    objective = Objective(model, calibration(model))
    assert objective.energy(objective.dense_plan) == 0 and objective.cost.total == 0
    everything = replace(objective.dense_plan, kv=KVPlan((1,), 64, 1))
    assert 0 <= objective.energy(everything) < 1e-5 and objective.cost.total > 0


def test_bad_plans_are_rejected_early_and_never_measured_twice(tiny_llama, calibration):
    data = calibration(tiny_llama)
    objective, complete = Objective(tiny_llama, data), Objective(tiny_llama, data)
    plan = replace(objective.dense_plan, decode=StagePlan((2, 3, 4)))
    energy = complete.energy(plan)
    assert objective.energy(plan, limit=energy * 0.1) == math.inf
    partial = objective.cost.block_tokens
    assert partial < complete.cost.block_tokens
    assert objective.is_above(plan, energy * 0.1) and not objective.is_above(plan, energy)
    assert objective.energy(plan, limit=energy * 0.1) == math.inf and objective.cost.block_tokens == partial
    assert objective.energy(plan, limit=energy) == energy  # exactly at the limit is not above it
    assert objective.energy(plan) == energy
    assert objective.cost == complete.cost


def test_the_best_of_many_plans_is_exact_and_cheaper_than_measuring_all(tiny_llama, calibration):
    data = calibration(tiny_llama, count=12)
    objective, complete = Objective(tiny_llama, data), Objective(tiny_llama, data)
    plans = [replace(objective.dense_plan, decode=StagePlan((block,))) for block in range(6)]
    energies = [complete.energy(plan) for plan in plans]
    best, energy = objective.best_of(plans)
    assert energy == min(energies) and best == plans[energies.index(energy)]
    assert objective.cost.block_tokens < complete.cost.block_tokens


def test_guesses_give_up_earlier_and_never_change_an_energy(tiny_llama, calibration):
    data = calibration(tiny_llama, count=32)
    exact = Objective(tiny_llama, data)
    plans = [with_removed(exact.dense_plan, (), (block,)) for block in range(1, 5)]
    energies = [exact.energy(plan) for plan in plans]
    reference = plans[energies.index(min(energies))]
    costs = {}
    for confidence in (None, 1.0):
        objective = Objective(tiny_llama, data)
        assert objective.energy(reference) == min(energies)
        objective.accept(reference)
        before = objective.cost.total
        with objective.estimating(1.0, confidence):
            for plan, energy in zip(plans, energies, strict=True):
                # What is given up is above the limit or, by a guess, thought to be; what is returned is exact.
                assert objective.energy(plan, limit=1.05 * min(energies)) in (energy, math.inf)
        costs[confidence] = objective.cost.total - before
    assert costs[1.0] < costs[None]


def test_a_part_is_measured_first_and_counts_afterwards(tiny_llama, calibration):
    data = calibration(tiny_llama, count=32)
    objective, complete = Objective(tiny_llama, data), Objective(tiny_llama, data)
    plan = with_removed(objective.dense_plan, (2,), (2, 3))
    with objective.estimating(0.5, None):
        part = objective.energy(plan)
        assert objective.is_known(plan)
        measured = objective.cost.block_tokens
    assert not objective.is_known(plan)
    assert objective.energy(plan) == complete.energy(plan) != part
    assert measured < 0.7 * objective.cost.block_tokens and objective.cost == complete.cost


def test_what_is_expected_to_cost_much_is_not_measured(tiny_llama, calibration):
    data = calibration(tiny_llama)
    complete = Objective(tiny_llama, data)
    plans = [with_removed(complete.dense_plan, (), (block,)) for block in range(1, 5)]
    energies = [complete.energy(plan) for plan in plans]
    objective = Objective(tiny_llama, data)
    expected = [energy if energy == min(energies) else 100.0 for energy in energies]
    assert objective.best_of(plans, expected=expected) == (plans[energies.index(min(energies))], min(energies))
    assert objective.cost.evaluations == 1
    # An expectation that is too low costs time and changes nothing.
    assert Objective(tiny_llama, data).best_of(plans, expected=[0.0] * 4)[1] == min(energies)


def test_narrower_states_round_and_take_less_memory(tiny_llama, calibration):
    data = calibration(tiny_llama)
    exact, narrow = Objective(tiny_llama, data), Objective(tiny_llama, data, hidden_cache_dtype=torch.bfloat16)
    assert 2 * narrow.state_nbytes == exact.state_nbytes
    first, second = (with_removed(exact.dense_plan, blocks, blocks) for blocks in ((4,), (3, 4)))
    energies = []
    for objective in (exact, narrow):
        objective.energy(first)
        objective.accept(first)
        energies.append(objective.energy(second))
    assert energies[0] != energies[1] == pytest.approx(energies[0], rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_less_memory_gives_the_same_energies(tiny_model, architecture, calibration, random_plan):
    model = tiny_model(architecture)
    data = calibration(model)
    full = Objective(model, data)
    hidden, entries = full.forward.state_sizes
    rng = random.Random(2)
    plans = [random_plan(model, rng) for _ in range(6)]
    costs = []
    for positions in (5, 2, 1, 0):
        bound = 2 * (entries + positions * hidden) if positions else 0
        objective = Objective(model, data, hidden_cache_bytes=bound)
        assert len(objective.forward.recorded_blocks) == positions
        assert 2 * objective.state_nbytes <= bound
        for plan in plans:
            assert objective.energy(plan) == full.energy(plan)
            objective.accept(plan)
        costs.append(objective.cost.block_tokens)
    assert costs[0] == min(costs) < max(costs) == costs[-1]


def test_the_stated_memory_is_what_is_kept(tiny_model, architecture, calibration):
    model = tiny_model(architecture)
    objective = Objective(model, calibration(model, prompt_tokens=(5, 8)))  # within any sliding window
    plan = replace(objective.dense_plan, kv=KVPlan((1,), 64, 1))  # all blocks run
    objective.energy(plan)
    objective.accept(plan)
    tensors = []
    for state in objective._states:
        tensors += [*state.prefill_inputs.values(), *state.decode_inputs.values()]
        tensors += [tensor for pair in state.entries.values() for tensor in pair]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 0.8 * objective.state_nbytes <= held <= objective.state_nbytes


def test_nothing_of_the_model_is_changed(tiny_llama, calibration):
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    state = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    objective = Objective(tiny_llama, calibration(tiny_llama))
    for plan in (objective.dense_plan, replace(objective.dense_plan, decode=StagePlan((1,)), kv=KVPlan((2,), 1, 2))):
        objective.energy(plan)
        objective.accept(plan)
    assert tiny_llama.training and not tiny_llama.model.layers[1].training and tiny_llama.model.layers[2].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())


def test_a_rounded_teacher_changes_energies_little(tiny_llama, calibration):
    plan = PruningPlan.empty(tiny_llama, decode=StagePlan((2, 3)))
    exact = Objective(tiny_llama, calibration(tiny_llama)).energy(plan)
    rounded = Objective(tiny_llama, calibration(tiny_llama, teacher_dtype=torch.bfloat16)).energy(plan)
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != exact


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_energies_on_an_accelerator_are_those_of_the_cpu(
    tiny_model, calibration, random_plan, accelerator, architecture
):
    here, there = tiny_model(architecture), tiny_model(architecture).to(accelerator)
    objectives = [Objective(model, calibration(model)) for model in (here, there)]
    assert objectives[1].calibration[0].rest.probabilities.device == accelerator
    rng = random.Random(0)
    for step in range(6):
        plan = random_plan(here, rng)
        expected, actual = (objective.energy(plan) for objective in objectives)
        assert actual == pytest.approx(expected, abs=1e-5, rel=1e-3)
        if step % 2:  # later ones are then computed from the first block that differs
            for objective in objectives:
                objective.accept(plan)
    assert objectives[0].cost.block_tokens == objectives[1].cost.block_tokens
