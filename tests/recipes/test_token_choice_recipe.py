import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pdprune.plan import KVPlan, PruningPlan


RECIPE = Path(__file__).parents[2] / "recipes" / "token_choice.py"


def run(*arguments):
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_from_plan_to_table(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    PruningPlan.empty(tiny_llama, "tiny", kv=KVPlan((0, 2, 3, 5), 4, 12)).save_pretrained(tmp_path / "plan")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"Line {i} of a text that is long enough. " * 4}) + "\n" for i in range(20))
    )
    asked = tmp_path / "yes.jsonl"
    asked.write_text('{"question": "Is it so?", "choices": ["yes", "no"], "answer": 1}\n' * 4)
    options = ["--plan", tmp_path / "plan", "--model", tmp_path / "model", "--output_dir", tmp_path / "out"]
    options += ["--text", text, "--questions", asked, "--num_texts", 2, "--num_questions", 1, "--shots", 2]
    options += ["--prompt_tokens", 60, "--completion_tokens", 8, "--retrieval_tokens", 150, "--repeats", 1]
    options += ["--depths", 0, 0.5, "--quantizations", "int4"]
    done = run(*options)
    assert done.returncode == 0, done.stderr[-3000:]
    means = json.loads(done.stdout.splitlines()[-1])
    assert list(means) == ["text", "needle", "pairs", "yes"]
    for by_name in means.values():
        assert abs(by_name["dense"]["kl"]) < 1e-6
        assert by_name["all tokens"]["kl"] < 1e-4  # nothing is removed
        others = ["attention, our blocks", "first + last, our blocks", "first + last, all blocks"]
        others += ["first + last, random blocks", "H2O, all blocks", "SnapKV, all blocks"]
        others += ["all tokens, int4", "the plan, int4"]
        assert list(by_name) == ["dense", "all tokens", *others]
        kl = [by_name[name]["kl"] for name in others]
        assert min(kl) > by_name["all tokens"]["kl"]
        assert len(set(kl)) == len(kl)
    lines = (tmp_path / "out" / "token_choice.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 2 * 2 + 1

    # The second run has nothing left to do; one with other options does not mix its results with these.
    again = run(*options)
    assert again.stdout == done.stdout
    other = run(*options, "--num_texts", 0)
    assert other.returncode == 1
    assert "other options" in other.stderr
    assert len((tmp_path / "out" / "token_choice.jsonl").read_text().splitlines()) == len(lines)


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
