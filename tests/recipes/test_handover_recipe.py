import json
import subprocess
import sys
from pathlib import Path

from hf_pdprune.hub import export_stages
from hf_pdprune.inference import LINKS
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


RECIPE = Path(__file__).parents[2] / "recipes" / "handover.py"


def run(*arguments):
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_three_hand_overs_over_two_links(tiny_llama, tmp_path):
    tiny_llama.generation_config.eos_token_id = None
    tiny_llama.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.empty(tiny_llama, "tiny", decode=StagePlan((2,)), kv=KVPlan((0, 1, 3), 4, 12))
    export_stages(tiny_llama, plan, tmp_path / "stages")
    options = ["--stages", tmp_path / "stages", "--dense", tmp_path / "dense", "--prompt_tokens", 100]
    done = run(*options, "--gbit_per_second", 0.01, 1, "--decode_tokens", 4, "--repeats", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == ["dense", "plan", "plan + int4"]
    handover = json.loads((tmp_path / "stages" / "handover.json").read_text())
    assert handover["settings"]["prompt_tokens"] == 100 and handover["environment"]["dtype"] == "float32"

    measured, modelled = handover["measured"], handover["modelled"]
    kinds = [(kind, sent) for sent in ("in one piece", "block by block") for kind in summary]
    assert [(row["link"], row["kind"], row["sent"]) for row in measured] == [
        (link, *kind) for link in ("0.01 Gbit/s", "1 Gbit/s") for kind in kinds
    ]
    assert [row["link"] for row in modelled[::6]] == [link.name for link in LINKS]
    for row in measured + modelled:
        # Where decode gives the first token, TTFT contains prefill, hand-over and a step; else the second one waits.
        assert row["ttft_decode"] > row["hand_over"] and row["second_token"] > row["ttft"] > 0
        assert row["tpot"] > 0 and 0 <= row["hand_over_share"] < 1
    for row in measured[:3]:  # what has arrived cannot have come faster than the link allows
        assert row["hand_over"] >= 8 * 0.99 * row["bytes_sent"] / 1e7
    sent = [row["bytes_sent"] for row in measured[:3]]
    assert sent == sorted(sent, reverse=True)
    for kind, row in zip(summary, measured[:3], strict=True):
        assert summary[kind]["bytes_sent"] == row["bytes_sent"]
        assert list(summary[kind]["ttft_decode"]) == ["0.01 Gbit/s", *(link.name for link in LINKS)]
    results = json.loads((tmp_path / "stages" / "results.json").read_text())
    assert (
        "recipes/handover.py --stages <stages> --dense <dense> --prompt_tokens 100" in results["commands"]["handover"]
    )


def test_decode_process_that_fails_is_one_line(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.empty(tiny_llama, "tiny", decode=StagePlan((2,)))
    export_stages(tiny_llama, plan, tmp_path / "stages")
    (tmp_path / "stages" / "decode" / "model.safetensors").write_bytes(b"no weights")
    done = run("--stages", tmp_path / "stages", "--dense", tmp_path / "dense", "--prompt_tokens", 10, "--repeats", 1)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: the decode process ended")


def test_a_prompt_longer_than_the_context_is_one_line(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.empty(tiny_llama, "tiny", decode=StagePlan((2,)))
    export_stages(tiny_llama, plan, tmp_path / "stages")
    done = run("--stages", tmp_path / "stages", "--dense", tmp_path / "dense", "--prompt_tokens", 600)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: prompt_tokens is too long: ")


def test_bad_input(tmp_path):
    for option, value, message in (
        ("--quantization", "int2", "quantization must be one of fp8, int8, int4"),
        ("--repeats", 0, "repeats must be at least 1"),
        ("--threads", 0, "threads must be at least 1"),
        ("--gbit_per_second", 0, "gbit_per_second must be positive"),
    ):
        done = run("--stages", tmp_path, option, value)
        assert done.returncode == 1
        assert message in done.stderr.strip().splitlines()[-1]
