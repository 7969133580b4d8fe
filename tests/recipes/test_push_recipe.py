import os
import subprocess
import sys

import pytest

from hf_pdprune.hub import export_stages
from hf_pdprune.plan import PruningPlan, StagePlan


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


def test_no_network_is_one_line(recipe, capsys, monkeypatch, tiny_llama, tmp_path):
    plan = PruningPlan.empty(tiny_llama, "tiny", decode=StagePlan((2,)))
    export_stages(tiny_llama, plan, tmp_path / "pair")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, recipe.__file__, str(tmp_path / "pair"), "me/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot reach http://127.0.0.1:9: ")
