import pytest

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search import BlockStatistics, SearchConfig, SearchJournal, search_plan
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
        "annealing_budget": 3,
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
    for cost in data["provenance"]["cost"].values():
        del cost["reference_block_tokens"]  # a resumed search has to compute the reference's states again
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


def test_annealing_is_never_worse_than_greedy(setup):
    energies = {}
    for strategy in ("greedy", "annealing"):
        plan = search_plan(*setup, config(strategy=strategy, num_token_aware_blocks=None))
        energies[strategy] = plan.provenance["objective"]["result"]
    assert energies["annealing"] <= energies["greedy"]


@pytest.mark.parametrize("after", [3, 60, 100])
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
    with pytest.raises(ValueError, match="another model or calibration set"):
        search_plan(model, calibration(model, seed=5), statistics, config(strategy="one_shot"), tmp_path)
