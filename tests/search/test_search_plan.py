import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search import BlockStatistics, MergedPairs, SearchConfig, SearchJournal, search_plan
from hf_pdprune.search.incremental_forward import IncrementalForward
from hf_pdprune.search.search_config import STRATEGIES


class Interrupted(Exception):
    """Stands for a kill."""


def config(**options):
    values = {
        "num_prefill_blocks": 2,
        "num_decode_blocks": 3,
        "distillation_threshold": -1,
        "num_token_aware_blocks": 2,
        "first_tokens": 1,
        "last_tokens": 4,
    }
    return SearchConfig(**values | options)


@pytest.fixture
def setup(tiny_model, calibration):
    model = tiny_model("llama", num_hidden_layers=8)
    data = calibration(model)
    return model, data, BlockStatistics.measure(model, data.batches)


def outcome(plan):
    """A plan without what depends on the clock."""
    data = plan.to_dict()
    del data["provenance"]["seconds"]
    return data


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_a_plan_with_its_provenance(setup, tmp_path, strategy):
    model, data, statistics = setup
    plan = search_plan(model, data, statistics, config(strategy=strategy), tmp_path)
    assert len(plan.prefill.removed_blocks) == 2 and len(plan.decode.removed_blocks) == 3
    assert len(plan.kv.token_aware_blocks) == 2
    assert not {0, 7} & set(plan.decode.removed_blocks)
    assert PruningPlan.from_pretrained(tmp_path) == plan
    provenance = plan.provenance
    assert provenance["config"]["strategy"] == strategy
    assert provenance["calibration"]["name"] == "random tokens"
    energies = provenance["objective"]
    assert energies["dense"] == 0 < energies["blocks"] <= energies["start"]
    assert provenance["cost"]["blocks"]["evaluations"] > 0


@pytest.mark.parametrize("choice", ["first_last", "attention"])
def test_the_plan_keeps_the_choice_of_tokens_that_was_searched_with(setup, choice):
    plan = search_plan(*setup, config(strategy="one_shot", token_choice=choice))
    assert plan.kv.token_choice == choice


def test_annealing_is_never_worse_than_greedy(setup):
    energies = {}
    for strategy in ("greedy", "annealing"):
        plan = search_plan(*setup, config(strategy=strategy, num_token_aware_blocks=None))
        energies[strategy] = plan.provenance["objective"]["result"]
    assert energies["annealing"] <= energies["greedy"]


@pytest.mark.parametrize("after", [3, 40, 70])
def test_a_resumed_search_equals_an_uninterrupted_one(setup, calibration, tmp_path, monkeypatch, after):
    model, data, statistics = setup
    prompts = calibration(model, prompt_tokens=(40, 50), seed=1)
    options = config(target_kv_reduction=3, kv_prompt_tokens=50, num_token_aware_blocks=None)
    expected = search_plan(model, data, statistics, options, tmp_path / "whole", prompts)
    add, written = SearchJournal.add, []

    def interrupting_add(self, *args):
        if len(written) == after:
            raise Interrupted
        written.append(args)
        add(self, *args)

    monkeypatch.setattr(SearchJournal, "add", interrupting_add)
    with pytest.raises(Interrupted):
        search_plan(model, data, statistics, options, tmp_path / "resumed", prompts)
    assert not (tmp_path / "resumed" / "pruning_plan.json").exists()
    monkeypatch.undo()
    resumed = search_plan(model, data, statistics, options, tmp_path / "resumed", prompts)
    assert outcome(resumed) == outcome(expected)


def test_targets_instead_of_counts(setup, tmp_path):
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "num_token_aware_blocks": None}
    plan = search_plan(*setup, config(target_ttft_speedup=1.3, **options), tmp_path)
    assert len(plan.prefill.missing_blocks) == len(plan.decode.missing_blocks) == 2  # 8 / 6 = 1.33
    assert plan.provenance["config"]["target_ttft_speedup"] == 1.3
    front = json.loads((tmp_path / "pareto_front.json").read_text())
    assert [point["num_decode_blocks"] for point in front["points"]] == [0, 1, 2]
    assert front["points"][-1]["kl"] == plan.provenance["objective"]["blocks"]

    bound = (front["points"][1]["kl"] + front["points"][2]["kl"]) / 2
    within = search_plan(*setup, config(max_kl=bound, **options))
    assert within.provenance["objective"]["blocks"] <= bound and len(within.prefill.missing_blocks) == 1
    with pytest.raises(ValueError, match="max_kl 1e-09 cannot be met: the best plan with one block less has KL 0.1"):
        search_plan(*setup, config(max_kl=1e-9, **options))
    with pytest.raises(ValueError, match=r"take 2 blocks from prefill and 2 from decode; within max_kl .* only 1"):
        search_plan(*setup, config(max_kl=bound, target_ttft_speedup=1.3, **options))


def test_blocks_that_a_speedup_takes_may_go_below_the_threshold_with_max_kl_too(setup):
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "num_token_aware_blocks": None, "strategy": "greedy"}
    options |= {"distillation_threshold": 1.0, "max_kl": 100.0}
    latency = {"target_latency_speedup": 1.2, "prefill_latency_share": 0.5}
    for target in ({"target_ttft_speedup": 1.3}, {"target_tpot_speedup": 1.2}, latency):
        speedup = search_plan(*setup, config(**options, **target))
        assert len(speedup.decode.missing_blocks) == 2
    with pytest.raises(ValueError, match="no block may go: none .* redundant as distillation_threshold 1.0"):
        search_plan(*setup, config(**options))


def test_plans_whose_logits_are_not_finite(setup, tmp_path, monkeypatch):
    run, broken = IncrementalForward.run, {}

    def overflowing(self, batch, plan, *args, **kwargs):
        kl_sum, state = run(self, batch, plan, *args, **kwargs)
        return (math.nan if broken["is"](plan) else kl_sum), state

    monkeypatch.setattr(IncrementalForward, "run", overflowing)
    options = {"strategy": "greedy", "num_token_aware_blocks": None}
    broken["is"] = lambda plan: len(plan.decode.missing_blocks) == 3
    for number, wanted in enumerate((config(**options), config(strategy="one_shot"))):
        with pytest.raises(ValueError, match="the logits of every plan that was tried hold NaN or infinity"):
            search_plan(*setup, wanted, tmp_path / str(number))
    broken["is"] = lambda plan: len(plan.decode.missing_blocks) == 2  # on the way to a plan that is finite
    plan = search_plan(*setup, config(**options), tmp_path / "through")
    assert PruningPlan.from_pretrained(tmp_path / "through") == plan and len(plan.decode.missing_blocks) == 3


def test_a_latency_instead_of_counts(setup, tmp_path):
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "num_token_aware_blocks": None}
    options |= {"target_latency_speedup": 1.3}
    lost = {}
    for share in (0.0, 1.0):
        wanted = config(**options, prefill_latency_share=share, relaxed_subset_rule=True)
        plan = search_plan(*setup, wanted, tmp_path / str(share))
        lost[share] = len(plan.prefill.skipped_blocks), len(plan.decode.missing_blocks)
        assert plan.provenance["config"]["prefill_latency_share"] == share
    assert lost[0.0][0] == lost[1.0][1] == 0 and min(lost[0.0][1], lost[1.0][0]) >= 2
    # The first step is within the bound and is not enough; more than that may not go.
    front = json.loads((tmp_path / "0.0" / "pareto_front.json").read_text())["points"]
    bound = (front[1]["kl"] + front[2]["kl"]) / 2
    message = r"target_latency_speedup 1.3 is not met, 1.\d+ is reached; within max_kl .* only 0 and 1 can go"
    with pytest.raises(ValueError, match=message):
        search_plan(*setup, config(**options, prefill_latency_share=0.0, relaxed_subset_rule=True, max_kl=bound))
    with pytest.raises(ValueError, match="target_latency_speedup 50 cannot be met: without all 6 blocks"):
        search_plan(*setup, config(**options | {"target_latency_speedup": 50}, prefill_latency_share=0.5))


def test_with_a_latency_token_aware_blocks_are_checked_for_what_may_go(setup):
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "strategy": "greedy", "prefill_latency_share": 0.5}
    options |= {"target_latency_speedup": 1.08, "num_token_aware_blocks": 7}
    plan = search_plan(*setup, config(**options))  # as many as there would not be without all that may go
    assert len(plan.kv.token_aware_blocks) == 7 and len(plan.decode.missing_blocks) == 1


@pytest.mark.parametrize("long_prompts", [False, True])
def test_max_kl_is_kept_by_token_aware_blocks_too(setup, calibration, tmp_path, long_prompts):
    prompts = calibration(setup[0], prompt_tokens=(40, 50), seed=1) if long_prompts else None

    def search(folder=None, **more):
        return search_plan(*setup, config(strategy="greedy", refine_token_aware_blocks=False, **more), folder, prompts)

    one, two = (search(num_prefill_blocks=count, num_decode_blocks=count).provenance["objective"] for count in (1, 2))
    # The second block may go, but not together with the token-aware ones.
    bound = max(one["result"], two["blocks"]) + 1e-6
    assert bound < two["result"]
    plan = search(num_prefill_blocks=0, num_decode_blocks=0, max_kl=bound)
    energies = plan.provenance["objective"]
    assert energies["blocks"] <= energies["result"] <= bound
    assert len(plan.decode.missing_blocks) == 1 and len(plan.kv.token_aware_blocks) == 2
    assert energies["blocks"] == pytest.approx(one["blocks"])
    message = r"max_kl 1e-05 and num_token_aware_blocks 2 cannot both be met: .* without 0 blocks and has KL 0\.\d+"
    with pytest.raises(ValueError, match=message):
        search(tmp_path, num_prefill_blocks=0, num_decode_blocks=0, max_kl=1e-5)
    assert not (tmp_path / "pruning_plan.json").exists()


def test_a_target_that_windows_for_long_prompts_meet_is_not_refused(setup, calibration, caplog):
    long_prompts = calibration(setup[0], prompt_tokens=(40, 50), seed=1)
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "num_token_aware_blocks": None, "kv_prompt_tokens": 50}
    # Of the window's 16 tokens 4 are enough, which only long prompts can tell.
    target = config(**options, target_kv_reduction=8, first_tokens=4, last_tokens=12, token_choice="first_last")
    short = calibration(setup[0], prompt_tokens=(5, 7), count=12)
    plan = search_plan(setup[0], short, setup[2], target, kv_calibration=long_prompts)
    assert plan.kv_reduction(50)["total"] >= 8
    assert not caplog.records  # nothing is chosen on short prompts


def test_a_target_that_removed_blocks_make_reachable_is_not_refused(setup):
    options = {"num_prefill_blocks": 0, "num_decode_blocks": 0, "num_token_aware_blocks": None, "strategy": "greedy"}
    # A window of 10 of 50 tokens is 5 times less, and 8 of 6 blocks a third more.
    target = options | {"target_kv_reduction": 6.6, "kv_prompt_tokens": 50, "first_tokens": 2, "last_tokens": 8}
    target |= {"window_factors": [1.0]}
    plan = search_plan(*setup, config(**target, max_kl=10.0))
    assert len(plan.decode.missing_blocks) >= 2 and plan.kv_reduction(50)["total"] >= 6.6
    with pytest.raises(ValueError, match=r"within max_kl 0.01, target_kv_reduction 6.6 cannot be met: .* it is 5"):
        search_plan(*setup, config(**target, max_kl=0.01))
    # As many token-aware blocks as there would not be without all blocks that may go.
    plan = search_plan(*setup, config(**options | {"num_token_aware_blocks": 7}, max_kl=10.0))
    assert len(plan.kv.token_aware_blocks) == 7 and len(plan.decode.missing_blocks) == 1


def test_pairs_are_distilled_on_rows_within_the_context(tiny_model, calibration):
    model = tiny_model("gpt2", n_positions=64)
    setup = model, calibration(model), BlockStatistics.measure(model, calibration(model).batches)
    text = torch.randint(3, 250, (4, 100)).tolist()
    plan = search_plan(*setup, SearchConfig(num_decode_blocks=1, merge_pairs=True, merge_tokens=300), merge_text=text)
    assert len(plan.decode.missing_blocks) == 1


def test_merged_pairs_are_distilled_once_and_resumed(setup, tmp_path, monkeypatch):
    options = config(merge_pairs=True, merge_tokens=256, num_token_aware_blocks=None)
    with pytest.raises(ValueError, match="merge_pairs needs merge_text"):
        search_plan(*setup, options, tmp_path)
    read, text = [], torch.randint(3, 250, (100, 32)).tolist()
    rows = (read.append(row) or row for row in text)
    plan = search_plan(*setup, options, tmp_path, merge_text=rows)
    assert len(read) == 8  # 256 tokens
    assert plan.decode.merged_blocks and plan.provenance["cost"]["distilling_pairs_block_tokens"] > 0
    monkeypatch.setattr(type(setup[0]), "forward", None)  # all is known
    assert outcome(search_plan(*setup, options, tmp_path, merge_text=text)) == outcome(plan)
    others = ({"merge_tokens": 128}, {"merge_rank": 8}, {"num_protected_first_blocks": 2})
    for other in others:
        with pytest.raises(ValueError, match=r"merged_pairs.safetensors holds pairs .* remove it, or choose another"):
            search_plan(*setup, replace(options, **other), tmp_path, merge_text=text)
    with pytest.raises(ValueError, match="distilled from other text"):
        search_plan(*setup, options, tmp_path, merge_text=text[::-1])


def test_options_reach_the_search(setup, calibration):
    model, _, statistics = setup
    data = calibration(model, count=24, completion_tokens=(8, 10), prompt_tokens=(6, 9))

    def spent(**options):
        options = {"num_prefill_blocks": 2, "num_decode_blocks": 2, "num_token_aware_blocks": None} | options
        plan = search_plan(model, data, statistics, config(**options))
        return plan.provenance["cost"]["blocks"], plan.provenance["objective"]["result"]

    usual, _ = spent(search_confidence=0.0)
    assert spent(search_confidence=0.0, annealing_share=0.4)[0]["block_tokens"] > usual["block_tokens"]
    # For the same budget more candidates are looked at.
    assert spent(search_confidence=0.2)[0]["evaluations"] > usual["evaluations"]
    assert spent(search_confidence=0.0, search_share=0.3)[0]["evaluations"] > usual["evaluations"]
    exact, rounded = (spent(strategy="greedy", hidden_cache_dtype=dtype)[1] for dtype in (None, "bfloat16"))
    assert rounded != exact == pytest.approx(rounded, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"token_choice": "attention"}, {"token_aware_criterion": "attention_mass"}, {"relaxed_subset_rule": True}],
    ids=str,
)
def test_a_model_that_lies_on_several_devices_gets_the_same_plan(setup, tiny_model, calibration, tmp_path, options):
    model, data, statistics = setup
    options = config(strategy="annealing" if "relaxed_subset_rule" in options else "greedy", **options)
    expected = search_plan(model, data, statistics, options)
    places = {f"model.layers.{block}": "cpu" if block % 2 else "disk" for block in range(8)}
    places |= {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    spread = tiny_model("llama", num_hidden_layers=8)
    spread = dispatch_model(spread, places, offload_dir=str(tmp_path), skip_keys="past_key_values")
    data = calibration(spread)
    statistics = BlockStatistics.measure(spread, data.batches)
    assert outcome(search_plan(spread, data, statistics, options)) == outcome(expected)


def test_pairs_of_a_model_that_lies_on_several_devices_are_corrected(tiny_model, calibration, tmp_path):
    model = tiny_model("llama", num_hidden_layers=8)
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    data = calibration(model)
    statistics, text = BlockStatistics.measure(model, data.batches), torch.randint(3, 250, (20, 32)).tolist()
    options = config(merge_pairs=True, merge_rank=8, merge_tokens=256, num_prefill_blocks=1, num_decode_blocks=1)
    plan = search_plan(model, data, statistics, options, tmp_path, merge_text=text)
    assert all(fit.neurons is None for fit in MergedPairs.from_pretrained(tmp_path, model).pairs.values())
    assert len(plan.decode.missing_blocks) == 1


def test_nothing_to_remove_gives_the_empty_plan(setup):
    plan = search_plan(*setup, SearchConfig())
    assert plan.digest == PruningPlan.empty(setup[0]).digest


def test_bad_requests_fail_before_anything_is_spent(setup, tiny_model, calibration, tmp_path, monkeypatch):
    model, data, statistics = setup
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match="num_decode_blocks is 8"):
        search_plan(model, data, statistics, config(num_decode_blocks=8), tmp_path)
    with pytest.raises(ValueError, match="cannot be met"):
        options = config(num_token_aware_blocks=None, target_kv_reduction=500, kv_prompt_tokens=100)
        search_plan(model, data, statistics, options, tmp_path)
    with pytest.raises(ValueError, match=r"the block statistics are of tiny \(llama, 6 blocks\)"):
        other = BlockStatistics("tiny", "llama", 6)
        search_plan(model, data, other, config(), tmp_path)
    assert not (tmp_path / "pruning_plan.json").exists()


def test_a_folder_with_another_search_is_refused(setup, calibration, tmp_path):
    model, data, statistics = setup
    search_plan(model, data, statistics, config(strategy="one_shot"), tmp_path)
    with pytest.raises(ValueError, match="another model, calibration set"):
        search_plan(model, calibration(model, seed=5), statistics, config(strategy="one_shot"), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "annealing", "token_choice": "attention"},
        {"strategy": "annealing", "merge_pairs": True, "merge_rank": 8, "merge_tokens": 256},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_accelerator_finds_the_plan_of_the_cpu(tiny_model, calibration, accelerator, options):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 250, (8, 32), generator=generator).tolist() if "merge_pairs" in options else None
    plans = []
    for device in ("cpu", accelerator):
        model = tiny_model("llama", num_hidden_layers=8).to(device)
        data = calibration(model)
        statistics = BlockStatistics.measure(model, data.batches)
        plans.append(search_plan(model, data, statistics, config(**options), merge_text=text))
    expected, actual = plans
    assert (actual.prefill, actual.decode, actual.kv) == (expected.prefill, expected.decode, expected.kv)
    energies = actual.provenance["objective"]
    assert energies["result"] == pytest.approx(expected.provenance["objective"]["result"], rel=1e-2)
