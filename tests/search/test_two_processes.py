import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from search_in_processes import run


SCRIPT = Path(__file__).with_name("search_in_processes.py")
CONFIG = {
    "num_prefill_blocks": 2,
    "num_decode_blocks": 3,
    "distillation_threshold": -1,
    "num_token_aware_blocks": 2,
    "first_tokens": 1,
    "last_tokens": 4,
}
GREEDY = CONFIG | {"strategy": "greedy", "refine_token_aware_blocks": False}
WINDOWS = GREEDY | {"num_token_aware_blocks": None, "target_kv_reduction": 3, "kv_prompt_tokens": 50}
ONE_BATCH = {"examples": [[40, 50], 2]}
JOBS = {
    "annealing": {"config": CONFIG | {"merge_pairs": True, "merge_rank": 4}},
    "greedy": {"config": GREEDY},
    # Longer windows fit into the longer prompts alone, which one process has.
    "unequal prompts": {"config": WINDOWS, "prompts": [[6, 8], [44, 50]], "examples": [[40, 50], 4]},
    # The second process has none.
    "one batch": {"config": GREEDY, **ONE_BATCH},
    "one batch, windows": {"config": WINDOWS, "prompts": [[44, 50]] * 2, **ONE_BATCH},
    "one batch, attention": {"config": GREEDY | {"token_aware_criterion": "attention_mass"}, **ONE_BATCH},
    "one pair": {
        "config": CONFIG | {"num_prefill_blocks": 1, "num_decode_blocks": 1, "num_protected_last_blocks": 5}
        | {"merge_pairs": True, "merge_rank": 4, "num_token_aware_blocks": None},
    },
    "no pair": {"config": CONFIG | {"merge_pairs": True, "merge_rank": 4}, "model": "olmo2"},
}  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of the searches of two processes, and what each of these came to."""
    folder = tmp_path_factory.mktemp("searched")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(SCRIPT), str(folder), json.dumps(JOBS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", JOBS)
def test_both_processes_come_to_the_same_plan(searched, name):
    first, second = (outcomes[name] for outcomes in searched[1])
    batches = first.pop("batches", None), second.pop("batches", None)
    assert first == second
    assert first.get("is_written", True)
    if name == "no pair":
        assert "pairs cannot be merged" in first["error"]
    else:
        assert batches == {"unequal prompts": (1, 1)}.get(name, (1, 0) if name.startswith("one batch") else (3, 2))


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job["config"].get("strategy") == "greedy"])
def test_one_process_finds_the_same_on_the_same_examples(searched, tmp_path, name):
    # Where guesses decide it may be another set: two processes guess from fewer and larger parts.
    of_two, alone = searched[1][0][name], run(tmp_path, JOBS[name])
    assert of_two["plan"] == alone["plan"]
    assert of_two["redundancy"] == pytest.approx(alone["redundancy"])
    assert of_two["energy"] == pytest.approx(alone["energy"], rel=1e-5)


def test_two_processes_do_not_go_on_where_one_stopped_nor_the_reverse(searched):
    # An entry of their journal is the sum of two batches.
    outcome = run(searched[0] / "greedy", JOBS["greedy"])
    assert (
        "search_journal.jsonl is the journal of a search with another model, calibration set or number"
        in (outcome["error"])
    )
