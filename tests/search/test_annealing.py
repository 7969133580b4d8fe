from itertools import combinations

import pytest

from hf_pdprune.search import AnnealingSearch, Objective, SearchJournal
from hf_pdprune.search.moves import Moves
from hf_pdprune.search.operations import Operations, with_removed


class Interrupted(Exception):
    """Stands for a kill."""


def search(objective, seed="0"):
    return AnnealingSearch(objective, Moves(Operations(range(1, 7))), seed, 0.2, 0.01, "test")


def test_it_never_ends_worse_than_it_began_and_finds_the_best_of_a_small_space(tiny_model, calibration):
    model = tiny_model("llama", num_hidden_layers=8)
    data = calibration(model)
    complete = Objective(model, data)
    plans = [with_removed(complete.dense_plan, blocks, blocks) for blocks in combinations(range(1, 7), 3)]
    energies = sorted(complete.energy(plan) for plan in plans)
    start = max(plans, key=complete.energy)
    objective = Objective(model, data)
    best = search(objective).run(start, budget=100 * objective.dense_block_tokens)
    assert objective.energy(best) == energies[0]
    assert objective.cost.block_tokens < complete.cost.block_tokens  # it ends when the neighbourhood is used up
    nothing = Objective(model, data)
    assert search(nothing).run(start, budget=0) == start


@pytest.mark.parametrize("after", [1, 9, 25])
def test_a_resumed_search_equals_an_uninterrupted_one(tiny_model, calibration, tmp_path, monkeypatch, after):
    model = tiny_model("llama", num_hidden_layers=8)
    data = calibration(model)

    def run(path):
        objective = Objective(model, data, journal=SearchJournal(path, data.digest))
        start = with_removed(objective.dense_plan, (1, 2), (1, 2, 3))
        annealing = search(objective, seed="7")
        best = annealing.run(start, budget=4 * objective.dense_block_tokens)
        assert annealing.num_accepted > 0
        return best, objective.cost, annealing.num_steps, annealing.num_accepted, annealing.rng.getstate()

    expected = run(None)
    path, add, written = tmp_path / "journal.jsonl", SearchJournal.add, []

    def interrupting_add(self, *args):
        if len(written) == after:
            raise Interrupted
        written.append(args)
        add(self, *args)

    monkeypatch.setattr(SearchJournal, "add", interrupting_add)
    with pytest.raises(Interrupted):
        run(path)
    monkeypatch.undo()
    resumed = SearchJournal(path, data.digest)
    assert len(resumed) == after
    assert run(path) == expected

    # Once more: everything is known, and the model is not called at all.
    monkeypatch.setattr(type(model), "forward", None)
    assert run(path) == expected


def test_other_seeds_search_elsewhere(tiny_model, calibration):
    model = tiny_model("llama", num_hidden_layers=8)
    data = calibration(model)
    states = []
    for seed in ("0", "0", "1"):
        objective = Objective(model, data)
        start = with_removed(objective.dense_plan, (1, 2), (1, 2, 3))
        annealing = search(objective, seed)
        annealing.run(start, budget=2 * objective.dense_block_tokens)
        states.append((objective.cost.block_tokens, sorted(objective._sums)))
    assert states[0] == states[1] != states[2]
