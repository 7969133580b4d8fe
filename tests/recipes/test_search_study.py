import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "search_study.py"
WORDS = "the quick brown fox jumps over the lazy dog while an old cat sleeps under a warm red stone wall".split()


@pytest.fixture
def study(load_recipe):
    return load_recipe("search_study")


@pytest.fixture
def options(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model("llama", num_hidden_layers=5).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for name, words in (("first", WORDS), ("second", WORDS[::-1])):
        rows = [{"text": " ".join(words[(i * j) % len(words)] for j in range(1, 30))} for i in range(1, 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["text"], "completion": " yes"} for row in rows]
    (tmp_path / "third.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "calibration": [f"first={tmp_path / 'first.jsonl'}"],
        "validation": [f"{name}={tmp_path / name}.jsonl" for name in ("first", "second")],
        "output_dir": str(tmp_path / "study"),
        "seeds": [0, 1],
        "num_blocks": [1, 2],
        "calibration_examples": 8,
        "validation_examples": [8, 4],
        "prompt_tokens": 12,
        "completion_tokens": 20,
        "merge_rank": 4,
        "merge_text": [str(tmp_path / "second.jsonl"), str(tmp_path / "third.jsonl")],
        "merge_tokens": 300,
        "allow_overlap": True,
    }


def test_a_row_for_each_strategy_seed_count_and_text(study, options, capsys, monkeypatch):
    study.Study(study.StudyArguments(**options)).run()
    folder = Path(options["output_dir"])
    rows = json.loads((folder / "search_study.json").read_text())
    seeded, others = 3, 4
    assert len(rows) == (2 * seeded + others) * 2 * 2  # seeds, numbers of blocks, validation texts
    assert len({(r["strategy"], r["seed"], r["num_blocks"], r["calibration"], r["validation"]) for r in rows}) == len(
        rows
    )
    for row in rows:
        assert row["kl"] > 0 and len(row["removed_blocks"]) + len(row["merged_blocks"]) == row["num_blocks"]
    by_strategy = {(r["strategy"], r["seed"]): r for r in rows if r["num_blocks"] == 2}
    greedy = by_strategy["greedy", None]
    assert by_strategy["annealing", 0]["kl_calibration"] <= greedy["kl_calibration"]
    assert greedy["block_tokens"] < greedy["plain_greedy_block_tokens"]
    assert by_strategy["annealing+merges", 0]["distilling_block_tokens"] > 0
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("| first | 2 |") == 7
    command = json.loads((folder / "results.json").read_text())["commands"]["search_study"]
    assert command.startswith("accelerate launch recipes/search_study.py") and str(folder.parent) not in command
    header = table.splitlines()[0].split(" | ")
    assert header[:6] == ["| calibration", "blocks", "strategy", "KL, calibration", "KL, first", "KL, second"]
    assert header[-2:] == ["minutes", "missing blocks (first seed) |"]
    assert (folder / "fronts" / "first-annealing-1" / "pareto_front.json").is_file()

    # A finished study makes nothing again, and one that lost its rows computes no energy again.
    study.Study(study.StudyArguments(**options)).run()
    assert json.loads((folder / "search_study.json").read_text()) == rows
    (folder / "search_study.json").unlink()
    monkeypatch.setattr(study.Objective, "_measure", None)
    study.Study(study.StudyArguments(**options)).run()
    again = json.loads((folder / "search_study.json").read_text())
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]


def rows_of(study, options, **changed):
    few = {"strategies": ["greedy"], "num_blocks": [1], "seeds": [0]}
    study.Study(study.StudyArguments(**options | few | changed)).run()
    return json.loads((Path(options["output_dir"]) / "search_study.json").read_text())


def test_other_options_make_other_rows(study, options, monkeypatch):
    first = rows_of(study, options)
    assert len(first) == 2 and {row["calibration_examples"] for row in first} == {8}
    rows = rows_of(study, options, calibration_examples=10)
    assert rows[:2] == first and [row["calibration_examples"] for row in rows[2:]] == [10, 10]
    table = (Path(options["output_dir"]) / "table.md").read_text().splitlines()
    assert table[0].startswith("| calibration | blocks | strategy | calibration_examples | KL, calibration |")
    for line, row in zip(table[2:], rows[::2], strict=True):
        assert line.startswith(f"| first | 1 | greedy | {row['calibration_examples']} | {row['kl_calibration']:.4f} |")
    # A text more is measured without another search.
    monkeypatch.setattr(study.Study, "_found", None)
    texts = [*options["validation"], f"third={Path(options['model_name_or_path']).with_name('third.jsonl')}"]
    more = rows_of(study, options, validation=texts, validation_examples=[8, 4, 60])
    assert more[:4] == rows and [row["validation"] for row in more[4:]] == ["third"]


def test_a_study_is_of_one_model_and_its_texts(study, options, tiny_model, tmp_path):
    options |= {"strategies": ["one_shot"], "num_blocks": [1]}
    rows = rows_of(study, options)
    path = tmp_path / "second.jsonl"
    before = path.read_text()
    path.write_text(before.replace("quick", "slow"))
    with pytest.raises(ValueError, match="holds a study with another validation text second"):
        rows_of(study, options)
    path.write_text(before)
    tiny_model("llama", num_hidden_layers=5, seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a study with another model"):
        rows_of(study, options)
    assert json.loads((tmp_path / "study" / "search_study.json").read_text()) == rows


def test_rows_that_do_not_say_what_they_were_made_with_are_kept_and_not_mixed_in(study, options):
    folder = Path(options["output_dir"])
    old = {"strategy": "greedy", "seed": None, "num_blocks": 1, "calibration": "first", "validation": "first", "kl": 9}
    folder.mkdir()
    (folder / "search_study.json").write_text(json.dumps([old]))
    rows = rows_of(study, options)
    assert rows[0] == old and len(rows) == 3
    assert (folder / "table.md").read_text().count("| greedy |") == 1


def test_pairs_are_those_of_the_options(study, options):
    options |= {"strategies": ["annealing+merges"], "num_blocks": [1], "seeds": [0], "validation_examples": [4]}
    study.Study(study.StudyArguments(**options)).run()
    study.Study(study.StudyArguments(**options | {"merge_tokens": 200})).run()
    pairs = {path.parent.name for path in Path(options["output_dir"]).glob("pairs/*/merged_pairs.safetensors")}
    rows = json.loads((Path(options["output_dir"]) / "search_study.json").read_text())
    assert [row["merge_tokens"] for row in rows] == [300, 300, 200, 200]
    assert {row["merge_source"] for row in rows} == pairs and len(pairs) == 2


def test_what_is_found_on_one_text_is_measured_on_the_others(study, options):
    texts = options["validation"]
    rows = rows_of(study, options, calibration=texts, validation=texts[:1], validation_examples=[8])
    measured = {(row["calibration"], row["validation"]): row["kl"] for row in rows}
    assert measured.keys() == {
        ("first", "first"), ("first", "second, calibration"), ("second", "first"), ("second", "first, calibration")
    }  # fmt: skip
    # On the same examples it is the same.
    assert measured["second", "first"] == pytest.approx(measured["second", "first, calibration"])
    table = (Path(options["output_dir"]) / "table.md").read_text()
    assert " | KL, first | KL, first, calibration | KL, second, calibration | " in table.splitlines()[0]
    assert rows_of(study, options, calibration=texts, validation=texts[:1], validation_examples=[8]) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": ["text={}/first.jsonl"]}, "text: 19 of the evaluation rows"),
        ({"validation": ["text={}/second.jsonl"]}, "text: 19 of the evaluation rows"),
    ],
)
def test_text_that_was_searched_or_distilled_on_is_not_validated_on(study, options, tmp_path, change, message):
    change = {key: [entry.format(tmp_path) for entry in value] for key, value in change.items()}
    args = study.StudyArguments(**options | {"validation_examples": [4], "allow_overlap": False} | change)
    with pytest.raises(ValueError, match=message):
        study.Study(args)


def test_text_for_pairs_may_be_validated_on_where_none_are_distilled(study, options):
    own = {"validation": options["validation"][1:], "validation_examples": [4], "strategies": ["one_shot"]}
    assert rows_of(study, options, **own, allow_overlap=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": ["magic"]}, "unknown strategy 'magic'"),
        ({"validation_examples": [1, 2, 3]}, "validation_examples: 3 for 2 texts"),
        ({"calibration": ["nameless"]}, "'nameless' is not name=source"),
        ({"calibration": ["a=first", "a=second"]}, "two texts are called 'a'"),
        ({"calibration": ["a=first:train,second"]}, "the split comes once, after the last source"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is named twice"),
        ({"num_blocks": [1, 0]}, "num_blocks must be at least 1, got 0"),
        ({"num_blocks": [1, 4]}, "is 4, but of the model's 5 blocks only 3 may be removed"),
        ({"merge_rank": 0}, "merge_rank must be a whole number of at least 1"),
    ],
)
def test_bad_requests_are_named(study, options, change, message):
    with pytest.raises(ValueError, match=message):
        study.Study(study.StudyArguments(**options | change)).run()


def test_pairs_are_distilled_on_the_calibration_text_where_nothing_else_is_said(study, options):
    few = {"strategies": ["annealing+merges"], "num_blocks": [1], "seeds": [0], "validation_examples": [4]}
    del options["merge_text"]
    args = study.StudyArguments(**options | few)
    assert args.merge_text == [entry.partition("=")[2] for entry in options["calibration"]]
    study.Study(args).run()
    rows = json.loads((Path(options["output_dir"]) / "search_study.json").read_text())
    assert all(row["distilling_block_tokens"] > 0 for row in rows)


def test_the_command_explains_itself():
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, RECIPE, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Texts to search on" in done.stdout
    assert "Strategies against each other on the same objective" in done.stdout and "--config" in done.stdout
