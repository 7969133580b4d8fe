import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_text import text, write_rows
from trl import TrlParser

from hf_pdprune.evaluation import read_results, write_results
from hf_pdprune.hub import export_stages
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "smollm2-135m" / "evaluate.yaml"


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("evaluate")


@pytest.fixture
def options(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "dense")
    kv = KVPlan((0, 3), first_tokens=2, last_tokens=6)
    plan = PruningPlan.empty(model, "tiny/llama", prefill=StagePlan((1,)), decode=StagePlan((1, 2)), kv=kv)
    export_stages(model, plan, tmp_path / "pair", tokenizer=tiny_tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    questions = [{"question": text(i), "choices": [text(i + 1, 3), text(i + 2, 4)], "answer": i % 2} for i in range(6)]
    write_rows(data / "piqa.validation.jsonl", questions)
    write_rows(data / "lambada.validation.jsonl", [{"text": text(i, 15)} for i in range(6)])
    write_rows(data / "text.validation.jsonl", [{"text": text(i, 60)} for i in range(20, 30)])
    write_rows(data / "piqa.calibration.jsonl", [{"text": text(i, 9)} for i in range(40, 44)])
    return {
        "stages": tmp_path / "pair",
        "dense": tmp_path / "dense",
        "data_folder": data,
        "tasks": ["piqa", "lambada", "hellaswag"],
        "limit": 4,
        "batch_size": 2,
        "text_dataset": data / "text.validation.jsonl",
        "text_examples": 3,
        "text_prompt_tokens": 40,
        "text_completion_tokens": 6,
        "seen_data": [f"{data}:calibration:piqa"],
    }


def arguments_of(options):
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def run(recipe, options, **changes):
    recipe.main(*TrlParser((recipe.EvaluateArguments,)).parse_args_and_config(arguments_of({**options, **changes})))


def test_from_stages_to_the_report_and_on_after_an_interruption(recipe, options, capsys, monkeypatch):
    evaluated = []
    evaluate = recipe.TaskEvaluation.run

    def interrupted(self, lm, task, *args):
        evaluated.append(task)
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return evaluate(self, lm, task, *args)

    monkeypatch.setattr(recipe.TaskEvaluation, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, options)
    assert len((options["stages"] / "evaluation.jsonl").read_text().splitlines()) == 2
    run(recipe, options)
    assert evaluated == ["piqa", "lambada", "piqa", "piqa", "lambada"]

    folder = options["stages"]
    results = read_results(folder)
    assert set(results["tasks"]) == {"piqa", "lambada"} and results["tasks"]["piqa"]["rows"] == 4
    assert results["tasks_skipped"] == {"hellaswag": f"no hellaswag.validation.jsonl in {options['data_folder']}"}
    assert results["overlap"] == {"checked": True, "seen_rows": {}}
    assert results["quality_of_stages"]["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["quality_of_stages"]["pruned"]["kl"] > results["quality_of_stages"]["dense"]["kl"]
    assert results["tasks"]["lambada"]["all"]["dense"]["perplexity"] > 1
    assert results["kv_of_stages"]["pruned"]["prompt_tokens"] == 511  # the context of the tiny model is 512
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["tasks_skipped"] == ["hellaswag"] and any(line.startswith("piqa") for line in table)
    report = (folder / "report.md").read_text()
    for part in ("## Tasks", "left out: hellaswag", "| piqa | acc | 4 |", "(tasks.png)", "top-1 agreement"):
        assert part in report, part
    assert (folder / "tasks.png").read_bytes().startswith(b"\x89PNG")

    run(recipe, options)
    assert len(evaluated) == 5  # all is there
    run(recipe, options, limit=2)
    assert len(evaluated) == 9 and read_results(folder)["tasks"]["piqa"]["rows"] == 2


def test_results_are_those_of_the_text_and_the_dense_model_that_are_there(recipe, options, tiny_model):
    options |= {"tasks": ["piqa"], "limit": 2, "dense": str(options["dense"])}
    run(recipe, options)
    first = read_results(options["stages"])
    write_rows(options["text_dataset"], [{"text": text(i, 60)} for i in range(21, 31)])
    run(recipe, options)
    second = read_results(options["stages"])
    assert second["tasks"] == first["tasks"]
    assert second["quality_of_stages"]["pruned"]["kl"] != first["quality_of_stages"]["pruned"]["kl"]
    tiny_model("llama", num_hidden_layers=4, seed=1).save_pretrained(options["dense"])
    with pytest.raises(ValueError, match="dense is not the dense model of .*: its weights differ"):
        run(recipe, options)


def test_quantised_payloads_beside_the_plain_ones(recipe, options, capsys):
    run(recipe, options, tasks="piqa", limit=2, quantizations="int4", kv_prompt_tokens=100)
    results, last = read_results(options["stages"]), json.loads(capsys.readouterr().out.splitlines()[-1])
    for suffix in ("", "_all_tokens"):
        quality, sent = (results[f"{part}_of_stages{suffix}"] for part in ("quality", "kv"))
        assert quality["pruned, int4"]["kl"] != pytest.approx(quality["pruned"]["kl"], rel=1e-4)
        assert sent["pruned, int4"]["prompt_tokens"] == 100
        assert sent["pruned, int4"]["bytes_kv"] < sent["pruned"]["bytes_kv"] / 4
    assert results["kv_of_stages"]["pruned"]["bytes_kv"] < results["kv_of_stages_all_tokens"]["pruned"]["bytes_kv"]
    assert last["kv_times_fewer"]["pruned, int4"] > last["kv_times_fewer"]["pruned"] > 1
    report = (options["stages"] / "report.md").read_text()
    assert "| pruned, int4, all tokens handed over |" in report and "KV bytes, 100 prompt tokens" in report
    with pytest.raises(ValueError, match="quantizations must be of fp8, int8, int4, got 'int2'"):
        recipe.EvaluateArguments(stages="x", quantizations=["int2"])


def test_the_first_token_can_be_left_to_decode(recipe, options):
    found = {}
    for stage in ("prefill", "decode", "prefill"):
        run(recipe, options, tasks="piqa", limit=3, first_token=stage)
        results = read_results(options["stages"])
        found.setdefault(stage, results["quality_of_stages"])
        assert found[stage] == results["quality_of_stages"]  # the other's results are not taken for its own
    dense, pruned = ([found[stage][name] for stage in found] for name in ("dense", "pruned"))
    assert dense[0]["perplexity"] == pytest.approx(dense[1]["perplexity"], rel=1e-5)
    assert pruned[0]["tokens"] == pruned[1]["tokens"]
    assert pruned[0]["kl_prefill"] != pytest.approx(pruned[1]["kl_prefill"], rel=1e-3)
    assert pruned[0]["kl_stderr"] == pytest.approx(pruned[1]["kl_stderr"], rel=1.0)  # of as many examples
    rows = [json.loads(line) for line in (options["stages"] / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == 5  # piqa of the dense model, of the pair twice; text twice
    with pytest.raises(ValueError, match="first_token must be prefill or decode"):
        recipe.EvaluateArguments(stages="x", first_token="both")


def test_a_report_has_the_parts_of_the_last_command_alone(recipe, options):
    write_results(options["stages"], {"handover": {"nbytes": 7}})
    run(recipe, options, tasks="piqa", limit=2)
    results = read_results(options["stages"])
    assert results["tasks_mean"]["tasks"] == 1 and "quality_of_stages" in results
    write_rows(options["data_folder"] / "wikitext2.validation.jsonl", [{"text": f" = A = \n\n{text(3, 30)}"}])
    run(recipe, options, tasks="wikitext2", text_dataset="none")
    results = read_results(options["stages"])
    assert set(results["tasks"]) == {"wikitext2"}
    assert not {"tasks_mean", "quality_of_stages", "quality_of_stages_all_tokens"} & set(results)
    assert results["handover"] == {"nbytes": 7} and "evaluation_environment" in results


def test_two_processes_share_the_requests_and_one_writes(recipe, options, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, ROOT / "recipes" / "evaluate.py", *arguments_of(options | {"output_dir": tmp_path / "two"})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "two" / "evaluation.jsonl").read_text().splitlines()) == 5
    assert len(list((tmp_path / "two" / "answers").glob("*.piqa.rank*.db"))) == 4  # of two models
    run(recipe, options)
    found, alone = (read_results(folder) for folder in (tmp_path / "two", options["stages"]))
    assert found["tasks"]["piqa"]["rows"] == 4 and found["tasks"]["piqa"]["all"] == alone["tasks"]["piqa"]["all"]
    assert found["quality_of_stages"]["pruned"]["kl"] == pytest.approx(alone["quality_of_stages"]["pruned"]["kl"])


def test_other_worked_examples_are_other_results(recipe, options, monkeypatch):
    shown = []

    def evaluated(self, lm, task, *args):
        shown.append(task)
        return {"metrics": {"acc": 0.5}, "stderr": {}, "rows": 2, "num_fewshot": 1, "per_row": {"acc": [0.0, 1.0]}}

    monkeypatch.setattr(recipe.TaskEvaluation, "run", evaluated)
    changes = {"tasks": "piqa", "text_dataset": "none", "num_fewshot": 1}
    for number in (50, 50, 51):
        write_rows(options["data_folder"] / "piqa.calibration.jsonl", [{"text": text(number, 9)}])
        run(recipe, options, **changes)
    assert shown == ["piqa"] * 4


def test_data_that_were_seen_are_refused(recipe, options, tmp_path):
    seen = options["data_folder"] / "seen.calibration.jsonl"
    write_rows(seen, [{"prompt": text(2).upper(), "completion": " x"}])
    changes = {"seen_data": [f"{seen}:any"], "tasks": ["piqa"]}
    with pytest.raises(ValueError, match="piqa: 1 of the evaluation rows were seen"):
        run(recipe, options, **changes)
    assert not (options["stages"] / "evaluation.jsonl").exists()
    # What a run of the pruning recipe has recorded is looked up too.
    (options["stages"] / "run.json").write_text(
        json.dumps({"plan": {"calibration_dataset": str(seen), "calibration_split": "x", "calibration_subset": None}})
    )
    arguments = {key: value for key, value in options.items() if key != "seen_data"} | {"tasks": ["piqa"]}
    with pytest.raises(ValueError, match="piqa: 1 of"):
        run(recipe, arguments)
    run(recipe, arguments, allow_overlap=True, limit=3)
    chat = options["data_folder"] / "chat.jsonl"
    messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Why?"}]
    write_rows(chat, [{"messages": [*messages, {"role": "assistant", "content": "So."}]}])
    with pytest.raises(ValueError, match="chat.jsonl: 1 of"):
        run(recipe, options, text_dataset=chat, seen_data=f"{chat}:any")
    assert read_results(options["stages"])["overlap"] == {"checked": True, "seen_rows": {"piqa": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["no_such_task"]}, "unknown task 'no_such_task'"),
        ({"tasks": ["piqa", "piqa"]}, "named twice"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"data_folder": "/no/such/folder"}, "data_folder: no folder"),
        ({"seen_data": ["piqa"]}, "seen_data: 'piqa'"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"stages": "/no/such/pair"}, "no pruning_plan.json"),
    ],
    ids=str,
)
def test_bad_input_is_an_error_before_anything_is_written(recipe, options, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe, options, **changes)
    assert not (options["stages"] / "evaluation.jsonl").exists()


def test_the_recipe_does_not_hide_the_library_of_its_name():
    """Run as a script, from its folder, with a library that wants the other `evaluate`."""
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); "
        "runpy.run_path(sys.argv[1] + '/evaluate.py', run_name='recipe'); import evaluate; evaluate.Metric"
    )
    command = [sys.executable, "-c", code, str(ROOT / "recipes")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_key_of_the_config_is_known(recipe):
    (args,) = TrlParser((recipe.EvaluateArguments,)).parse_args_and_config(["--config", str(CONFIG)])
    assert args.tasks == yaml.safe_load(CONFIG.read_text())["tasks"]
