from dataclasses import dataclass, field

import pytest

from hf_pdprune.run_folder import RunFolder


FILES = {"plan": ("plan.json", "journal.jsonl"), "stages": ("decode",), "results": ("results.json",)}


def test_a_step_is_done_with_its_settings_alone(tmp_path):
    run = RunFolder(tmp_path, FILES)
    assert not run.is_done("plan", {"blocks": 1})
    run.done("plan", {"blocks": 1})
    run.done("stages", {"rate": 2})
    again = RunFolder(str(tmp_path), FILES)
    assert again.is_done("stages", {"rate": 2}) and not again.is_done("results", {})
    with pytest.raises(ValueError, match="holds a run with blocks=1, not 3: choose another --output_dir"):
        again.is_done("plan", {"blocks": 3})
    assert again.is_done("plan", {"blocks": 1})


@dataclass
class Options:
    blocks: int
    rule: bool = False
    factors: list[int] = field(default_factory=lambda: [1, 2])


def test_an_option_that_is_younger_than_the_run_counts_as_its_default(tmp_path):
    RunFolder(tmp_path, FILES).done("plan", {"blocks": 1})
    run = RunFolder(tmp_path, FILES, options=(Options,))
    assert run.is_done("plan", {"blocks": 1, "rule": False, "factors": [1, 2]})
    with pytest.raises(ValueError, match="holds a run with rule=False, not True"):
        run.is_done("plan", {"blocks": 1, "rule": True})
    with pytest.raises(ValueError, match="holds a run with blocks=1, not 2"):
        run.is_done("plan", {"blocks": 2})
    changed = {"blocks": 1, "factors": [2], "other": 0}
    assert run.changed({"rule": False, **changed}) == changed


def test_overwrite_forgets_what_follows(tmp_path):
    run = RunFolder(tmp_path, FILES)
    for step in FILES:
        run.done(step, {"seed": 1})
    for name in ("plan.json", "results.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "decode").mkdir()
    anew = RunFolder(tmp_path, FILES, overwrite=True)
    assert anew.is_done("plan", {"seed": 1}) and not anew.is_done("stages", {"seed": 2})
    assert anew.is_done("plan", {"seed": 1}) and not anew.is_done("results", {"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "mine.txt", "run.json"}
    assert not anew.is_done("plan", {"seed": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "run.json"}
