import os
import sys

import pytest

from hf_pdprune.evaluation.figures import new_figure, save_figure
from hf_pdprune.evaluation.speed_plot import plot_speed
from hf_pdprune.evaluation.task_plot import plot_tasks


def test_a_picture_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_figure(new_figure(2, 1), tmp_path / "a.png")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(*args):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            save_figure(new_figure(3, 2), path)
    assert path.read_bytes() == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-pdprune\[plots\]"):
        new_figure(2, 1)


def test_tasks_without_an_accuracy_have_no_picture(tmp_path):
    part = {"metric": "word_perplexity", "dense": 20.0, "pruned": 30.0, "difference_stderr": None}
    assert plot_tasks({"wikitext2": part}, tmp_path / "tasks.png") is None and not list(tmp_path.iterdir())
    right = {"metric": "acc", "dense": 0.5, "pruned": 0.4, "difference_stderr": None}
    assert plot_tasks({"piqa": right, "wikitext2": part}, tmp_path / "tasks.png").is_file()


@pytest.mark.parametrize("sizes", [[(128, 1)], [(128, 1), (1024, 1), (128, 8), (1024, 8)]])
def test_speed_of_one_case_and_of_many(tmp_path, sizes):
    times = {name: {"median": 0.2, "quartiles": [0.1, 0.3]} for name in ("dense", "pruned")}
    cases = [
        {
            "prompt_tokens": tokens,
            "batch_size": rows,
            "ttft": {**times, "ratio": 1.1},  # slower than the dense model: bars below zero
            "tpot": {**times, "ratio": 0.7},
            "roofline": {"prefill_flops_removed": 0.0, "decode_bytes_removed": 0.4},
        }
        for tokens, rows in sizes
    ]
    assert plot_speed(cases, tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
