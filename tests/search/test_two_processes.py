import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from search_in_processes import run


SCRIPT = Path(__file__).with_name("search_in_processes.py")
OPTIONS = {
    "num_prefill_blocks": 2,
    "num_decode_blocks": 3,
    "distillation_threshold": -1,
    "num_token_aware_blocks": 2,
    "first_tokens": 1,
    "last_tokens": 4,
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_both_processes_come_to_the_same_plan(tmp_path):
    options = [OPTIONS | {"merge_pairs": True, "merge_rank": 4}, OPTIONS | {"strategy": "greedy"}]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(SCRIPT), str(tmp_path), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*outcomes, strict=True):
        assert (first.pop("batches"), second.pop("batches")) == (3, 2)
        assert first == second
    # One process finds the same on the same examples. (Where guesses decide it may be another set: two processes guess
    # from fewer and larger parts.)
    greedy, alone = outcomes[0][1], run(tmp_path / "alone", options[1])
    assert greedy["plan"] == alone["plan"]
    assert greedy["redundancy"] == pytest.approx(alone["redundancy"])
    assert greedy["energy"] == pytest.approx(alone["energy"], rel=1e-5)
