import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_text import text, write_rows
from trl import TrlParser

from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.hub import export_stages
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "smollm2-135m" / "ablation.yaml"
DRAFT = {"tokens_per_forward": 1.5, "time_ratio": 1.0, "same_text": 1.0, "prompts": 1}


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
    write_rows(tmp_path / "wikitext2.validation.jsonl", [{"text": f" = A = \n\n{text(i, 20)}"} for i in range(50, 53)])
    return {
        "plan": tmp_path / "pair",
        "output_dir": tmp_path / "ablation",
        "dense": tmp_path / "dense",
        "sections": ["parts", "healing", "strategies", "windows", "caches", "quantization", "draft"],
        "healed": [f"exported={tmp_path / 'pair'}"],
        "strategies": ["one_shot", "random", "unified", "mirrored"],
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


def arguments_of(options):
    arguments = []
    for name, value in options.items():
        if value != []:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def run(recipe, options, **changes):
    recipe.main(*TrlParser((recipe.AblationArguments,)).parse_args_and_config(arguments_of({**options, **changes})))


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
    mirrored = by_name["strategies", "mirrored"]
    assert (len(mirrored["prefill"]), len(mirrored["decode"])) == (3, 1)  # the plan: 1 and 3
    assert by_name["strategies", "unified"]["search_cost"] > by_name["strategies", "one_shot"]["search_cost"]
    assert ("strategies", "random, seed 1") in kl and ("windows", "window 4 + 4") in kl
    assert (
        kl["caches", "first + last, our blocks"] == kl["quantization", "the plan"] == kl["parts", "blocks and cache"]
    )
    assert kl["caches", "all tokens"] == pytest.approx(kl["parts", "blocks only"], rel=1e-4)
    fewer = {kind: by_name["quantization", f"the plan{kind}"]["kv_reduction"] for kind in ("", ", int8", ", int4")}
    assert 1 < fewer[""] < fewer[", int8"] < fewer[", int4"]
    assert kl["quantization", "the plan, int8"] != kl["quantization", "the plan"]
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


def test_accuracies_stand_beside_the_quality(recipe, options, tmp_path, capsys):
    changes = {"sections": ["parts"], "tasks": ["piqa", "rte", "wikitext2"], "data_folder": tmp_path, "limit": 3}
    run(recipe, options, **changes)
    rows = {row["settings"]["variant"]: row for row in RowFile(options["output_dir"] / "ablation.jsonl")}
    assert rows["cache only"]["settings"]["tasks"] == ["piqa", "wikitext2"]  # there are no data of the other one
    accuracy = rows["cache only"]["result"]["accuracy"]
    assert accuracy["mean"] == accuracy["tasks"]["piqa"] and accuracy["stderr"] >= 0
    assert rows["cache only"]["result"]["other_tasks"]["wikitext2"]["metric"] == "word_perplexity"
    report, reason = (options["output_dir"] / "ablation.md").read_text(), f"no rte.validation.jsonl in {tmp_path}"
    assert "| accuracy | wikitext2, word_perplexity |" in report and report.endswith(f"\n\nleft out: rte ({reason})\n")
    *printed, last = capsys.readouterr().out.splitlines()
    assert f"left out: rte ({reason})" in printed and json.loads(last)["tasks_skipped"] == ["rte"]


def test_a_task_without_an_accuracy_can_stand_alone(recipe, options, tmp_path):
    run(recipe, options, sections=["parts"], tasks=["wikitext2"], data_folder=tmp_path)
    for row in RowFile(options["output_dir"] / "ablation.jsonl"):
        assert "accuracy" not in row["result"] and row["result"]["other_tasks"]["wikitext2"]["value"] > 1


def test_a_healed_pair_comes_beside_the_dense_model(recipe, options, monkeypatch):
    moved = []
    model = SimpleNamespace(to=moved.append)
    monkeypatch.setattr(
        recipe, "load_stages", lambda *args, **kwargs: (SimpleNamespace(model=model, quantization=None),) * 2
    )
    quality = {"perplexity": 2.0, "kl": 0.1, "kl_prefill": 0.1, "top1_agreement": 0.5}
    monkeypatch.setattr(recipe, "evaluate_quality", lambda *args: quality)
    monkeypatch.setattr(recipe, "draft_acceptance", lambda *args: {**DRAFT, "model": args[1] is model})
    run(recipe, options, sections=["healing", "draft"])
    assert moved == [recipe.PartialState().device] * 4
    assert [row["result"].get("model") for row in RowFile(options["output_dir"] / "ablation.jsonl")][-1] is True


def test_two_processes_make_each_row_once(recipe, options, tmp_path):
    changes = {"sections": ["parts", "strategies", "draft"], "strategies": ["greedy"], "healed": []}
    changes |= {"tasks": ["piqa", "wikitext2"], "data_folder": tmp_path, "limit": 3}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, ROOT / "recipes" / "ablation.py", *arguments_of(options | changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith('{"kl"')]) == 1
    path = options["output_dir"] / "ablation.jsonl"
    found = list(RowFile(path))
    assert len(path.read_text().splitlines()) == len(found)
    run(recipe, options, **changes, output_dir=tmp_path / "alone")
    for one, other in zip(found, RowFile(tmp_path / "alone" / "ablation.jsonl"), strict=True):
        assert one["settings"] == other["settings"]
        assert one["result"].get("cost") == other["result"].get("cost")
        for part in ("quality", "accuracy", "other_tasks"):
            assert flat(one["result"].get(part)) == pytest.approx(flat(other["result"].get(part)), rel=1e-4, abs=1e-6)


def flat(part, name=""):
    """Numbers of a nested dictionary by their place in it; what is no number is left out."""
    if isinstance(part, dict):
        return {place: number for key, value in part.items() for place, number in flat(value, f"{name}/{key}").items()}
    return {name: part} if isinstance(part, int | float) else {}


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
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe, options, **changes)
    assert not options["output_dir"].exists()


def test_every_key_of_the_config_is_known(recipe):
    (args,) = TrlParser((recipe.AblationArguments,)).parse_args_and_config(["--config", str(CONFIG)])
    assert args.random_seeds == 3
