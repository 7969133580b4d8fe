import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pdprune.evaluation import BenchmarkConfig, read_results, write_results
from hf_pdprune.evaluation.model_shape import SHAPES
from hf_pdprune.hub import export_stages
from hf_pdprune.plan import PruningPlan, StagePlan


RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark.py"


def run(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)


@pytest.fixture
def stages(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)))
    return export_stages(tiny_llama, plan, tmp_path / "pair")


def test_table_json_line_and_artefacts(stages):
    write_results(stages, {"quality": {"dense": {"kl": 0.0}}})
    sizes = ["--prompt_tokens", 16, 32, "--batch_sizes", 2, "--decode_tokens", 2, "--repeats", 2]
    done = run("--stages", stages, "--dense", stages.parent / "dense", *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.splitlines()
    printed = json.loads(last)
    assert printed["kv"]["prompt_tokens"] == 16 and printed["speed"]["batch_size"] == 2
    assert any(line.startswith("32") for line in table) and any("TTFT (prefill)" in line for line in table)
    assert len(json.loads((stages / "benchmark.json").read_text())["cases"]) == 2
    results = read_results(stages)
    assert results["speed"] == printed["speed"] and results["kv"] == printed["kv"]
    assert results["quality"] == {"dense": {"kl": 0.0}}


def test_a_folder_that_cannot_be_written_is_found_before_the_measurement(stages, tmp_path, monkeypatch, load_recipe):
    recipe = load_recipe("benchmark")
    monkeypatch.setattr(recipe, "load_all", lambda args: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    args = recipe.BenchmarkArguments(stages=str(stages), output_dir=str(tmp_path / "file"))
    with pytest.raises(FileExistsError):
        recipe.main(args, BenchmarkConfig())


def test_what_was_measured_is_printed_before_it_is_written(tmp_path, monkeypatch, load_recipe, capsys):
    recipe = load_recipe("benchmark")
    small = {**SHAPES["llama-3.1-8b"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    monkeypatch.setitem(SHAPES, "llama-3.1-8b", small)

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(recipe, "write_artefact", full)
    args = recipe.BenchmarkArguments(shape="llama-3.1-8b", output_dir=str(tmp_path / "speed"), num_decode_blocks=20)
    with pytest.raises(OSError, match="no space"):
        recipe.main(args, BenchmarkConfig(prompt_tokens=[8], decode_tokens=1, repeats=1))
    assert "kv" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_random_weights_of_a_real_size(tmp_path, monkeypatch, load_recipe):
    """In this process, with a smaller size under a real one's name."""
    recipe = load_recipe("benchmark")
    small = {**SHAPES["llama-3.1-8b"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    monkeypatch.setitem(SHAPES, "llama-3.1-8b", small)
    args = recipe.BenchmarkArguments(
        shape="llama-3.1-8b",
        output_dir=str(tmp_path / "speed"),
        num_prefill_blocks=4,
        num_decode_blocks=8,
        num_token_aware_blocks=20,
    )
    recipe.main(args, BenchmarkConfig(prompt_tokens=[160, 16], decode_tokens=2, repeats=1))
    results = read_results(tmp_path / "speed")
    assert results["speed"]["prefill_share_removed"] == pytest.approx(4 / 32)
    assert results["kv"]["bytes_held"]["pruned"] * 5 < results["kv"]["bytes_dense"] * 4
    report = (tmp_path / "speed" / "report.md").read_text()
    assert "| 160 | 1 |" in report and "decode bytes removed" in report and "(speed.png)" in report
    assert PruningPlan.from_pretrained(tmp_path / "speed").base_model == "llama-3.1-8b"
    for values, message in (
        ({}, "either stages"),
        ({"shape": "llama-3.1-8b"}, "output_dir"),
        ({"stages": "x", "num_decode_blocks": 1}, "go with shape"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.BenchmarkArguments(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_tokenz", 7], "--prompt_tokenz"),
        (["--dense", "no/such-model"], "no dense model 'no/such-model'"),
        (["--dtype", "float99"], "dtype must be one of"),
    ],
)
def test_bad_input_is_one_line(stages, arguments, message):
    done = run("--stages", stages, *arguments)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1] and done.stdout == ""
    assert not (stages / "benchmark.json").exists()
