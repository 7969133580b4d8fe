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
# The same with weights in partitions, which are gathered by all processes together.
ZERO_3_JOBS = {
    "targets": {"config": GREEDY | {"num_prefill_blocks": 0, "target_ttft_speedup": 1.3}, "zero3": "engine"},
    "one batch": {"config": GREEDY | {"token_aware_criterion": "attention_mass"}, **ONE_BATCH, "zero3": "loaded"},
    # Batches of which decode reads nothing.
    "short completions": {
        "config": GREEDY | {"num_prefill_blocks": 0, "num_decode_blocks": 1, "token_choice": "attention"},
        "examples": [[1, 3], 48],
        "zero3": "loaded",
    },
    "one pair": JOBS["one pair"] | {"zero3": "engine"},
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def search_in_processes(folder, jobs):
    """What the searches of two processes come to, by process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(SCRIPT), str(folder), json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of the searches of two processes, and what each of these came to."""
    folder = tmp_path_factory.mktemp("searched")
    return folder, search_in_processes(folder, JOBS)


@pytest.fixture(scope="module")
def searched_in_partitions(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return search_in_processes(tmp_path_factory.mktemp("partitions"), ZERO_3_JOBS)


def greedy(jobs):
    """Those of the jobs that come to the same in any number of processes: guesses are made from the parts."""
    return [name for name, job in jobs.items() if job["config"].get("strategy") == "greedy"]


def check_same(outcomes):
    """Both processes come to the same, one of them perhaps on fewer batches."""
    first, second = outcomes
    batches = first.pop("batches", None), second.pop("batches", None)
    assert first == second
    assert first.get("is_written", True)
    return batches


def check_as_alone(outcome, job, folder):
    """One process finds the same on the same examples."""
    alone = run(folder, {key: value for key, value in job.items() if key != "zero3"})
    assert outcome["plan"] == alone["plan"]
    assert outcome["redundancy"] == pytest.approx(alone["redundancy"])
    assert outcome["energy"] == pytest.approx(alone["energy"], rel=1e-5)


@pytest.mark.parametrize("name", JOBS)
def test_both_processes_come_to_the_same_plan(searched, name):
    batches = check_same([outcomes[name] for outcomes in searched[1]])
    if name == "no pair":
        assert "pairs cannot be merged" in searched[1][0][name]["error"]
    else:
        assert batches == {"unequal prompts": (1, 1)}.get(name, (1, 0) if name.startswith("one batch") else (3, 2))


@pytest.mark.parametrize("name", greedy(JOBS))
def test_one_process_finds_the_same_on_the_same_examples(searched, tmp_path, name):
    check_as_alone(searched[1][0][name], JOBS[name], tmp_path)


@pytest.mark.parametrize("name", ZERO_3_JOBS)
def test_both_processes_come_to_the_same_plan_with_weights_in_partitions(searched_in_partitions, name):
    batches = check_same([outcomes[name] for outcomes in searched_in_partitions])
    assert batches == {"one batch": (1, 0), "short completions": (12, 12)}.get(name, (3, 2))


@pytest.mark.parametrize("name", greedy(ZERO_3_JOBS))
def test_one_process_finds_the_same_as_two_with_weights_in_partitions(searched_in_partitions, tmp_path, name):
    check_as_alone(searched_in_partitions[0][name], ZERO_3_JOBS[name], tmp_path)


def test_two_processes_do_not_go_on_where_one_stopped_nor_the_reverse(searched):
    # An entry of their journal is the sum of two batches.
    outcome = run(searched[0] / "greedy", JOBS["greedy"])
    assert (
        "search_journal.jsonl is the journal of a search with another model, calibration set or number"
        in (outcome["error"])
    )
