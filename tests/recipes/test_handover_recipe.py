import json
import subprocess
import sys
from pathlib import Path

from hf_pdprune.hub import export_stages
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
    results = json.loads((tmp_path / "stages" / "handover.json").read_text())
    sent = [results[name]["bytes_sent"] for name in results]
    assert sent == sorted(sent, reverse=True)
    for name, blocks in (("dense", 6), ("plan", 5), ("plan + int4", 5)):
        result = results[name]
        assert len(result["frames"]) == blocks + 1
        assert sum(nbytes for _, nbytes in result["frames"]) == result["bytes_sent"]
        slow = result["measured"]["0.01 Gbit/s"]
        assert list(result["measured"]) == ["0.01 Gbit/s", "1 Gbit/s"]
        # What has arrived cannot have come faster than the link allows.
        assert slow["arrival"] >= 8 * result["bytes_sent"] / 1e7
        shares = [values["share_of_prefill"] for values in result["modelled"].values()][:4]
        assert shares == sorted(shares, reverse=True)


def test_bad_input(tmp_path):
    for option, value, message in (
        ("--quantization", "int2", "quantization must be one of fp8, int8, int4"),
        ("--repeats", 0, "repeats must be at least 1"),
        ("--gbit_per_second", 0, "gbit_per_second must be positive"),
    ):
        done = run("--stages", tmp_path, option, value)
        assert done.returncode == 1
        assert message in done.stderr.strip().splitlines()[-1]
