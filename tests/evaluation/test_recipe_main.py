import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_pdprune.evaluation.recipe_main import run_recipe


@dataclass
class Options:
    stages: str = field(metadata={"help": "Where the pair is."})
    num_decode_blocks: int = 2
    healed: list[str] = field(default_factory=list)
    text: str = ""


def ran(main, monkeypatch, capsys, *arguments, **kwargs):
    """Exit code and last line of what is said."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    try:
        run_recipe(main, Options, description="What it does:\n    an example", **kwargs)
    except SystemExit as end:
        return end.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_places_have_the_home_folder_for_the_tilde(monkeypatch, capsys, tmp_path):
    (tmp_path / "options.yaml").write_text("stages: ~/pair\nhealed: [a=~/a, /b]\ntext: ~/prompt\n")
    found = []
    assert ran(found.append, monkeypatch, capsys, "--config", tmp_path / "options.yaml")[0] == 0
    home = Path.home()
    assert found == [Options(f"{home}/pair", 2, [f"a={home}/a", "/b"], "~/prompt")]


@pytest.mark.parametrize(
    ("error", "goes_on", "code", "line"),
    [
        (ValueError("two\n  lines"), True, 1, "error: two lines"),
        (FileNotFoundError("no pair"), True, 1, "error: no pair"),
        (KeyboardInterrupt(), True, 130, "interrupted; the same command goes on from here"),
        (KeyboardInterrupt(), False, 130, "interrupted"),
    ],
)
def test_expected_ends_are_one_line(monkeypatch, capsys, error, goes_on, code, line):
    def main(options):
        raise error

    assert ran(main, monkeypatch, capsys, "--stages", "x", goes_on=goes_on) == (code, "", line + "\n")


def test_what_is_no_yaml_and_what_is_no_option(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }")
    code, _, said = ran(print, monkeypatch, capsys, "--config", tmp_path / "broken.yaml")
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and "broken.yaml" in said
    code, _, said = ran(print, monkeypatch, capsys, "--stages", "x", "--num_decode_block", 3)
    assert code == 1 and "--num_decode_block" in said.splitlines()[-1]


def test_help_says_what_it_does(monkeypatch, capsys):
    code, said, _ = ran(print, monkeypatch, capsys, "--help")
    assert code == 0 and "What it does:\n    an example" in said and "Where the pair is." in said
