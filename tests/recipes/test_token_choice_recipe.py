import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_text import write_rows
from trl import TrlParser

from hf_pdprune.plan import KVPlan, PruningPlan


RECIPE = Path(__file__).parents[2] / "recipes" / "token_choice.py"


def run(*arguments):
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("token_choice")


@pytest.fixture
def options(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for last_tokens in (12, 8):
        plan = PruningPlan.empty(tiny_llama, "tiny", kv=KVPlan((0, 2, 3, 5), 4, last_tokens))
        plan.save_pretrained(tmp_path / f"plan-{last_tokens}")
    rows = [{"text": f"Line {i} of a text that is long enough. " * 4} for i in range(20)]
    write_rows(tmp_path / "text.jsonl", rows)
    write_rows(tmp_path / "yes.jsonl", [{"question": "Is it so?", "choices": ["yes", "no"], "answer": 1}] * 4)
    return {
        "plan": tmp_path / "plan-12",
        "model": tmp_path / "model",
        "output_dir": tmp_path / "out",
        "text": tmp_path / "text.jsonl",
        "questions": tmp_path / "yes.jsonl",
        "num_texts": 2,
        "num_questions": 1,
        "shots": 2,
        "prompt_tokens": 60,
        "completion_tokens": 8,
        "retrieval_tokens": 150,
        "repeats": 1,
        "depths": [0, 0.5],
        "quantizations": "int4",
    }


@pytest.fixture
def means(recipe, options, capsys):
    """Factory: the means of a run of the recipe in this process, with some options changed."""

    def run_recipe(**changes):
        arguments = []
        for name, value in {**options, **changes}.items():
            if value != []:
                arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        recipe.main(*TrlParser(recipe.TokenChoiceArguments).parse_args_and_config(arguments))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_recipe


def test_from_plan_to_table(means, tmp_path):
    found = means()
    assert list(found) == ["text", "needle", "pairs", "yes"]
    for by_name in found.values():
        assert abs(by_name["dense"]["kl"]) < 1e-6
        assert by_name["all tokens"]["kl"] < 1e-4  # nothing is removed
        others = ["attention, our blocks", "first + last, our blocks", "first + last, all blocks"]
        others += ["first + last, random blocks", "H2O, all blocks", "SnapKV, all blocks"]
        others += ["all tokens, int4", "the plan, int4"]
        assert list(by_name) == ["dense", "all tokens", *others]
        kl = [by_name[name]["kl"] for name in others]
        assert min(kl) > by_name["all tokens"]["kl"]
        assert len(set(kl)) == len(kl)
    assert len((tmp_path / "out" / "token_choice.jsonl").read_text().splitlines()) == 2 + 2 * 2 + 1
    command = json.loads((tmp_path / "out" / "results.json").read_text())["commands"]["token_choice"]
    assert command.startswith("accelerate launch recipes/token_choice.py --plan <plan> --model <model> ")


def test_a_run_with_other_options_in_the_same_folder_has_its_own_numbers(means, recipe, tiny_model, tmp_path):
    first = means(repeats=0, num_questions=0)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    recipe.load_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "other")
    write_rows(
        tmp_path / "other.jsonl", [{"text": f"{i} is what another text says on its line. " * 4} for i in range(20)]
    )
    for changes in (
        {"plan": tmp_path / "plan-8"},
        {"model": tmp_path / "other"},
        {"seed": 3},
        {"prompt_tokens": 52},
        {"text": tmp_path / "other.jsonl"},
    ):
        other = means(repeats=0, num_questions=0, **changes)["text"]
        name = "first + last, random blocks" if "seed" in changes else "first + last, our blocks"
        assert other[name]["kl"] != first["text"][name]["kl"], changes
    assert means(repeats=0, num_questions=0) == first
    assert list(means(num_texts=0, repeats=0)) == ["yes"]


def test_an_interrupted_run_goes_on(means, recipe, tmp_path, monkeypatch):
    first = means(repeats=0)
    path = tmp_path / "out" / "token_choice.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # as a kill leaves it
    made, score = [], recipe.score
    monkeypatch.setattr(recipe, "score", lambda example, logits: made.append(example.task) or score(example, logits))
    assert means(repeats=0) == first and made == ["yes"]
    assert means(repeats=0) == first and made == ["yes"]


def test_text_and_questions_that_were_seen_are_refused(means, options, tmp_path):
    run_file = options["plan"] / "run.json"
    for seen, message in ((options["text"], "text.jsonl: 20 of the"), (options["questions"], "yes.jsonl: 2 of the")):
        run_file.write_text(json.dumps({"plan": {"calibration_dataset": str(seen), "calibration_split": "train"}}))
        with pytest.raises(ValueError, match=message):
            means()
    assert not options["output_dir"].exists()
    assert means(repeats=0, num_texts=0, allow_overlap=True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--depths", 2, "depths must be from 0 to 1, got [2.0]"),
        ("--quantizations", "int3", "quantizations must be of fp8, int8, int4, got ['int3']"),
    ],
)
def test_bad_input(tmp_path, option, value, message):
    done = run("--plan", tmp_path, "--model", tmp_path, "--text", "x", "--output_dir", tmp_path, option, value)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize(
    ("option", "rows", "message"),
    [
        ("text", [{"prompt": "Why?", "completion": "So."}], "text: .*rows.jsonl has rows of prompt, completion"),
        ("questions", [{"text": "no question"}], "rows.jsonl, line 1: no 'question'"),
        ("questions", [{"question": "Why?", "choices": ["a"], "answer": 1}], "rows.jsonl, line 1: answer must be an"),
        ("questions", "{broken", "rows.jsonl, line 1: broken JSON"),
        ("retrieval_tokens", 20, "retrieval_tokens: 20 tokens are too few to hide something, give [0-9]+$"),
        ("retrieval_tokens", 9000, "retrieval_tokens: .* tokens, too few for a prompt of 9000"),
    ],
)
def test_what_cannot_be_asked_is_named(means, tmp_path, option, rows, message):
    path = tmp_path / "rows.jsonl"
    if isinstance(rows, list):
        write_rows(path, rows)
    elif isinstance(rows, str):
        path.write_text(rows)
    with pytest.raises(ValueError, match=message):
        means(**{option: rows if isinstance(rows, int) else path})


def test_windows_smaller_than_what_chooses(means, tiny_llama, tmp_path):
    kv = KVPlan((0, 2, 3), 4, 32).with_windows({0: (4, 12), 2: (4, 40), 3: (2, 30)})
    PruningPlan.empty(tiny_llama, "tiny", kv=kv).save_pretrained(tmp_path / "plan")
    found = means(plan=tmp_path / "plan", repeats=0, num_questions=0, quantizations=[])["text"]
    assert found["attention, our blocks"]["kl"] > 0
