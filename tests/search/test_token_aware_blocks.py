from dataclasses import replace
from itertools import combinations

import pytest

from hf_pdprune.plan import KVPlan, StagePlan
from hf_pdprune.search import AttentionMass, Objective, SearchConfig, TokenAwareBlocks


def objective_of(model, calibration, **options):
    return Objective(model, calibration(model, prompt_tokens=(20, 30), **options))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_as_many_blocks_as_wanted_and_none_that_decode_lacks(tiny_llama, calibration, count):
    objective = objective_of(tiny_llama, calibration)
    plan = replace(objective.dense_plan, prefill=StagePlan((2,)), decode=StagePlan((2,)))
    config = SearchConfig(num_token_aware_blocks=count, first_tokens=1, last_tokens=4)
    chosen = TokenAwareBlocks(objective, config).choose(plan)
    assert len(chosen.kv.token_aware_blocks) == count and 2 not in chosen.kv.token_aware_blocks
    assert (chosen.prefill, chosen.decode) == (plan.prefill, plan.decode)
    assert (chosen.kv.first_tokens, chosen.kv.last_tokens) == (1, 4)


@pytest.mark.parametrize("choice", ["first_last", "attention"])
@pytest.mark.parametrize("count", [2, 4])
def test_they_are_those_that_cost_least(tiny_llama, calibration, count, choice):
    objective = objective_of(tiny_llama, calibration)
    config = SearchConfig(num_token_aware_blocks=count, first_tokens=1, last_tokens=4, token_choice=choice)
    kv_plans = [KVPlan(blocks, 1, 4, choice) for blocks in combinations(range(6), count)]
    plans = [replace(objective.dense_plan, kv=kv) for kv in kv_plans]
    chosen = TokenAwareBlocks(objective, config).choose(objective.dense_plan)
    greedy = TokenAwareBlocks(objective, replace(config, refine_token_aware_blocks=False)).choose(objective.dense_plan)
    energies = sorted(objective.energy(plan) for plan in plans)
    assert objective.energy(chosen) <= objective.energy(greedy)
    assert objective.energy(chosen) <= energies[2]
    assert chosen.kv.token_choice == choice


@pytest.mark.parametrize("choice", ["first_last", "attention"])
def test_prefill_is_never_run_again(tiny_llama, calibration, choice):
    objective = objective_of(tiny_llama, calibration)
    objective.accept(objective.dense_plan)
    config = SearchConfig(num_token_aware_blocks=3, first_tokens=1, last_tokens=4, token_choice=choice)
    TokenAwareBlocks(objective, config).choose(objective.dense_plan)
    decode_tokens = sum(int(b["completion_mask"][:, :-1].sum()) for b in objective.calibration.batches)
    assert objective.cost.block_tokens <= objective.cost.evaluations * 6 * decode_tokens


def test_the_target_is_met_with_as_few_blocks_as_possible(tiny_llama, calibration):
    objective = objective_of(tiny_llama, calibration)
    plan = replace(objective.dense_plan, decode=StagePlan((2,)))
    config = SearchConfig(
        target_kv_reduction=2, kv_prompt_tokens=100, first_tokens=2, last_tokens=8, window_factors=[1.0]
    )
    chosen = TokenAwareBlocks(objective, config).choose(plan)
    assert chosen.kv_reduction(100)["total"] >= 2
    fewer = replace(chosen, kv=KVPlan(chosen.kv.token_aware_blocks[1:], 2, 8))
    assert fewer.kv_reduction(100)["total"] < 2


def test_what_cannot_be_met_says_how_near_the_best_comes(tiny_llama, tiny_model, calibration):
    objective = objective_of(tiny_llama, calibration)
    config = SearchConfig(
        target_kv_reduction=20, kv_prompt_tokens=100, first_tokens=2, last_tokens=8, window_factors=[1.0]
    )
    with pytest.raises(ValueError, match="target_kv_reduction 20 cannot be met: .* it is 10.00"):
        TokenAwareBlocks(objective, config).choose(objective.dense_plan)
    with pytest.raises(ValueError, match="num_token_aware_blocks is 7, but only 6"):
        TokenAwareBlocks(objective, SearchConfig(num_token_aware_blocks=7)).choose(objective.dense_plan)
    assert objective.cost.evaluations == 0


@pytest.mark.parametrize("criterion", ["kl", "attention_mass"])
def test_prompts_of_which_the_window_drops_nothing_are_named(tiny_llama, calibration, caplog, criterion):
    objective = objective_of(tiny_llama, calibration)
    longest = objective.calibration.longest_prompt
    options = {"num_token_aware_blocks": 2, "first_tokens": 1, "token_aware_criterion": criterion}
    TokenAwareBlocks(objective, SearchConfig(last_tokens=longest - 2, **options)).choose(objective.dense_plan)
    assert not caplog.records
    TokenAwareBlocks(objective, SearchConfig(last_tokens=longest - 1, **options)).choose(objective.dense_plan)
    assert f"prompts of at most {longest} tokens, of which a window of 1 + {longest - 1} drops none" in caplog.text


def test_sliding_windows_are_left_alone(tiny_model, calibration):
    model = tiny_model("gemma3_text", num_hidden_layers=12)
    objective = objective_of(model, calibration)
    selection = TokenAwareBlocks(objective, SearchConfig(num_token_aware_blocks=1, first_tokens=1, last_tokens=4))
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert selection.candidates(objective.dense_plan) == tuple(full)
    assert set(selection.choose(objective.dense_plan).kv.token_aware_blocks) <= set(full)


@pytest.mark.parametrize("criterion", ["attention_mass", "random"])
def test_baselines_choose_without_measuring_kl(tiny_llama, calibration, criterion):
    objective = objective_of(tiny_llama, calibration)
    options = {"num_token_aware_blocks": 3, "first_tokens": 1, "last_tokens": 4, "token_aware_criterion": criterion}
    chosen = TokenAwareBlocks(objective, SearchConfig(**options)).choose(objective.dense_plan)
    assert len(chosen.kv.token_aware_blocks) == 3 and objective.cost.evaluations == 0
    if criterion == "attention_mass":
        shares = AttentionMass.measure(tiny_llama, objective.calibration, 1, 4).shares
        assert max(shares[b] for b in chosen.kv.token_aware_blocks) <= sorted(shares)[2]


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({}, "attention"),
        ({"num_prefill_blocks": 1, "num_decode_blocks": 1}, "first_last"),
        ({"max_kl": 1.0}, "first_last"),
        ({"token_aware_criterion": "random"}, "first_last"),
        ({"token_choice": "first_last"}, "first_last"),
        ({"num_decode_blocks": 1, "token_choice": "attention"}, "attention"),
    ],
)
def test_tokens_are_chosen_by_attention_where_no_block_goes(tiny_llama, calibration, options, choice):
    config = SearchConfig(num_token_aware_blocks=3, first_tokens=1, last_tokens=4, **options)
    objective = objective_of(tiny_llama, calibration)
    plan = objective.dense_plan
    assert TokenAwareBlocks(objective, config).choose(plan).kv.token_choice == choice


def test_attention_that_cannot_be_observed_is_refused_before_anything_is_spent(tiny_llama, calibration, monkeypatch):
    objective = objective_of(tiny_llama, calibration)
    attention = type(tiny_llama.model.layers[0].self_attn)

    def forward(self, hidden_states, rotations, attention_mask=None, past_key_values=None):
        pass

    monkeypatch.setattr(attention, "forward", forward)
    TokenAwareBlocks(objective, SearchConfig(num_token_aware_blocks=3, token_choice="first_last"))
    # Where nobody asks for it, it is done without.
    default = TokenAwareBlocks(objective, SearchConfig(num_token_aware_blocks=3))
    assert default.config.token_choice == "first_last"
    with pytest.raises(ValueError, match=r"LlamaAttention takes arguments .* \(rotations\).*first_last"):
        TokenAwareBlocks(objective, SearchConfig(num_token_aware_blocks=3, token_choice="attention"))
