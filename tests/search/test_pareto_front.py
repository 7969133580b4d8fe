import json

from hf_pdprune.plan import PruningPlan
from hf_pdprune.search import ParetoFront
from hf_pdprune.search.operations import with_removed
from hf_pdprune.search.pareto_front import ParetoPoint


def points(model):
    empty = PruningPlan.empty(model)
    made = [((), (), 0.0), ((1,), (1,), 0.3), ((2,), (2,), 0.2), ((2,), (2, 3), 0.4), ((2, 3), (2, 3), 0.4)]
    return [ParetoPoint(with_removed(empty, prefill, decode), kl) for prefill, decode, kl in made]


def test_only_plans_that_none_beats_are_on_the_front(tiny_llama):
    front = ParetoFront(points(tiny_llama))
    assert [(p.num_prefill_blocks, p.num_decode_blocks, p.kl) for p in front.points] == [
        (0, 0, 0.0), (1, 1, 0.2), (2, 2, 0.4),
    ]  # fmt: skip


def test_it_is_written_as_json_and_png(tiny_llama, tmp_path):
    ParetoFront(points(tiny_llama)).save(tmp_path)
    written = json.loads((tmp_path / "pareto_front.json").read_text())
    assert [point["kl"] for point in written["points"]] == [0.0, 0.2, 0.4]
    assert written["points"][1]["decode"] == {"removed_blocks": [2], "merged_blocks": []}
    assert (tmp_path / "pareto_front.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto_front.json", "pareto_front.png"]
