import pytest


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("push")


def test_options_reach_the_library(recipe, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(recipe, "push_stages_to_hub", lambda **kwargs: calls.append(kwargs) or {"decode": "url"})
    assert recipe.main(["outputs/x", "me/x"]) == 0
    everything = ["--subfolders", "--private", "--revision", "v1", "--commit_message", "m", "--collection", "Title"]
    assert recipe.main(["outputs/x", "me/x", *everything]) == 0
    default = {"subfolders": False, "private": None, "revision": None, "commit_message": None, "collection": False}
    given = {"subfolders": True, "private": True, "revision": "v1", "commit_message": "m", "collection": "Title"}
    assert calls == [{"folder": "outputs/x", "repo_id": "me/x"} | options for options in (default, given)]
    assert capsys.readouterr().out == "decode: url\n" * 2


def test_errors_are_one_line(recipe, capsys, tmp_path):
    assert recipe.main([str(tmp_path / "nothing"), "me/x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "is not a folder with stages" in error
