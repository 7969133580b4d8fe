import json
from pathlib import Path

import pytest
from made_text import text, write_rows
from trl import TrlParser

from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.hub import export_stages
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "smollm2-135m" / "ablation.yaml"


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("ablation")


@pytest.fixture
def options(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama", num_hidden_layers=6)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    kv = KVPlan((0, 4), first_tokens=2, last_tokens=6)
    plan = PruningPlan.empty(model, "tiny/llama", prefill=StagePlan((2,)), decode=StagePlan((1, 2, 3)), kv=kv)
    export_stages(model, plan, tmp_path / "pair", tokenizer=tiny_tokenizer)
    write_rows(tmp_path / "text.jsonl", [{"text": text(i, 60)} for i in range(30)])
    write_rows(tmp_path / "held_out.jsonl", [{"text": f"and {text(i, 60)}"} for i in range(30)])
    questions = [{"question": text(i), "choices": [text(i + 1, 3), text(i + 2, 4)], "answer": i % 2} for i in range(4)]
    write_rows(tmp_path / "piqa.validation.jsonl", questions)
    return {
        "plan": tmp_path / "pair",
        "output_dir": tmp_path / "ablation",
        "dense": tmp_path / "dense",
        "sections": ["parts", "healing", "strategies", "windows", "draft"],
        "healed": [f"exported={tmp_path / 'pair'}"],
        "strategies": ["one_shot", "random", "unified"],
        "random_seeds": 2,
        "windows": ["0+8", "4+4"],
        "calibration_dataset": tmp_path / "text.jsonl",
        "calibration_examples": 4,
        "calibration_prompt_tokens": 24,
        "calibration_completion_tokens": 17,
        "text_dataset": tmp_path / "held_out.jsonl",
        "text_examples": 3,
        "text_prompt_tokens": 40,
        "text_completion_tokens": 6,
        "draft_prompts": 1,
        "draft_tokens": 5,
    }


def run(recipe, options, **changes):
    arguments = []
    for name, value in {**options, **changes}.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    recipe.main(*TrlParser((recipe.AblationArguments,)).parse_args_and_config(arguments))


def test_every_section_once(recipe, options, capsys, monkeypatch):
    run(recipe, options)
    rows = list(RowFile(options["output_dir"] / "ablation.jsonl"))
    by_name = {
        (row["settings"]["section"], row["settings"]["variant"]): row["result"]
        for row in rows
        if "section" in row["settings"]
    }
    kl = {key: result["quality"]["kl"] for key, result in by_name.items() if "quality" in result}
    assert kl["parts", "nothing removed"] < 1e-6 < kl["parts", "cache only"] < kl["parts", "blocks and cache"]
    # The same plan is the same number wherever it stands, and exported what it is as a view.
    for key in (("strategies", "the plan"), ("healing", "unhealed"), ("healing", "exported")):
        assert kl[key] == pytest.approx(kl["parts", "blocks and cache"], rel=1e-4)
    assert len(by_name["strategies", "unified"]["prefill"]) == len(by_name["strategies", "unified"]["decode"]) == 2
    assert by_name["strategies", "unified"]["search_cost"] > by_name["strategies", "one_shot"]["search_cost"]
    assert ("strategies", "random, seed 1") in kl and ("windows", "window 4 + 4") in kl
    assert by_name["draft", "decode stage, unhealed"]["tokens_per_forward"] >= 1
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["kl"]["cache only"] == pytest.approx(kl["parts", "cache only"], abs=1e-4)
    report = (options["output_dir"] / "ablation.md").read_text()
    for part in ("### Blocks, cache, both", "| unified |", "search cost", "tokens per dense forward"):
        assert part in report, part

    for step in ("evaluate_quality", "search_plan", "draft_acceptance"):
        monkeypatch.setattr(recipe, step, lambda *args, **kwargs: pytest.fail("made twice"))
    run(recipe, options)
    assert len(list(RowFile(options["output_dir"] / "ablation.jsonl"))) == len(rows)
    with pytest.raises(ValueError, match="holds a study with text_examples=3, not 2"):
        run(recipe, options, text_examples=2)


def test_accuracies_stand_beside_the_quality(recipe, options, tmp_path):
    changes = {"sections": ["parts"], "tasks": ["piqa", "rte"], "data_folder": tmp_path, "limit": 3}
    run(recipe, options, **changes)
    rows = {row["settings"]["variant"]: row for row in RowFile(options["output_dir"] / "ablation.jsonl")}
    assert rows["cache only"]["settings"]["tasks"] == ["piqa"]  # there are no data of the other one
    accuracy = rows["cache only"]["result"]["accuracy"]
    assert accuracy["mean"] == accuracy["tasks"]["piqa"] and accuracy["stderr"] >= 0
    assert "accuracy" in (options["output_dir"] / "ablation.md").read_text()


def test_text_that_was_seen_is_refused(recipe, options, tmp_path):
    changes = {"text_dataset": options["calibration_dataset"]}
    with pytest.raises(ValueError, match="text.jsonl: 30 of the evaluation rows were seen"):
        run(recipe, options, **changes)
    assert not options["output_dir"].exists()
    # Without a search of its own it is what the pair was made on that counts.
    seen = {"stages": {"train_dataset": str(options["text_dataset"]), "train_split": "train"}}
    (tmp_path / "pair" / "run.json").write_text(json.dumps(seen))
    with pytest.raises(ValueError, match="held_out.jsonl: 30 of the evaluation rows were seen"):
        run(recipe, options, sections=["parts"])
    run(recipe, options, sections=["parts"], allow_overlap=True)
    run(recipe, options, sections=["parts"], **changes, output_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sections": ["partz"]}, "unknown section 'partz'"),
        ({"sections": ["healing"], "healed": []}, "needs healed"),
        ({"healed": ["folder"]}, "is not name=folder"),
        ({"windows": ["16-112"]}, "is not first\\+last"),
        ({"strategies": ["sleb"]}, "unknown strategy 'sleb'"),
        ({"plan": "/no/such/plan"}, "no pruning_plan.json"),
        ({"no_such_key": 1}, "no_such_key"),
    ],
    ids=str,
)
def test_bad_input_is_an_error_before_anything_is_written(recipe, options, changes, message):
    options = {key: value for key, value in options.items() if value != [] and changes.get(key) != []}
    changes = {key: value for key, value in changes.items() if value != []}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe, options, **changes)
    assert not options["output_dir"].exists()


def test_every_key_of_the_config_is_known(recipe):
    (args,) = TrlParser((recipe.AblationArguments,)).parse_args_and_config(["--config", str(CONFIG)])
    assert args.random_seeds == 3
