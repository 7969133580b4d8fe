import os
import socket
import subprocess
import sys
from pathlib import Path

from hf_pdprune.hub import export_stages
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


EXAMPLE = Path(__file__).parents[2] / "examples" / "01_handover_two_processes.py"


def test_example_answers_and_counts_bytes(tiny_llama, tiny_tokenizer, tmp_path):
    kv = KVPlan((0, 1, 3, 5), first_tokens=2, last_tokens=6)
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)), kv=kv)
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"STAGES": str(tmp_path), "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Give me three reasons" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "prompt tokens" in line)
    sent, dense = (int(part.split()[0].replace(",", "")) for part in (line.split(": ")[1], line.split(": ")[2]))
    assert 0 < sent < dense


def test_a_folder_without_stages_is_one_line(tmp_path):
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"STAGES": str(tmp_path)}, timeout=200
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"no stages in {tmp_path}: ")
    assert "Traceback" not in done.stderr
