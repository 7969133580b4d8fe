import json

import pytest

from hf_pdprune.evaluation import write_results


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("compare")


def test_runs_by_folder_and_by_name(recipe, tmp_path, capsys):
    for name in ("a", "b"):
        write_results(tmp_path / name, {"quality": {"healed": {"kl": 0.5}}})
    output = tmp_path / "comparison.md"
    recipe.main(recipe.CompareArguments([str(tmp_path / "a"), f"second={tmp_path / 'b'}"], str(output)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == ["a", "second"]
    assert "## second" in output.read_text()
    with pytest.raises(ValueError, match="two are called 'a'"):
        recipe.main(recipe.CompareArguments([str(tmp_path / "a"), f"a={tmp_path / 'b'}"], str(output)))


def test_notes_come_from_a_file(recipe, tmp_path):
    write_results(tmp_path / "a", {"quality": {"healed": {"kl": 0.5}}})
    (tmp_path / "notes.md").write_text("What it says: KL ist größer.\n", encoding="utf-8")
    output = tmp_path / "comparison.md"
    options = {"runs": [str(tmp_path / "a")], "output": str(output)}
    recipe.main(recipe.CompareArguments(**options, notes=str(tmp_path / "notes.md")))
    assert "KL ist größer." in output.read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        recipe.main(recipe.CompareArguments(**options, notes=str(tmp_path / "none.md")))


def test_a_run_without_results_or_plan_is_named(recipe, tmp_path):
    results = {"quality": {"healed": {"kl": 0.5}}, "commands": {"prune": "recipes/prune.py"}}
    write_results(tmp_path / "b", results)
    with pytest.raises(FileNotFoundError, match="b: no pruning_plan.json beside the results of its run"):
        recipe.main(recipe.CompareArguments([str(tmp_path / "b")], str(tmp_path / "comparison.md")))
    write_results(tmp_path / "a", {})
    with pytest.raises(ValueError, match="a/results.json holds no results"):
        recipe.main(recipe.CompareArguments([str(tmp_path / "a")], str(tmp_path / "comparison.md")))
    assert not (tmp_path / "comparison.md").exists()
