"""Starts train_in_processes.py, for the tests that train in processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).with_name("train_in_processes.py")
ROOT = Path(__file__).parents[2]
OUTPUT = "output.txt"  # of the process, in its folder
OPTIONS = {
    "max_steps": 3,
    "learning_rate": 5e-3,
    "lora_rank": 4,
    "report_to": "none",
    "logging_steps": 1,
    "save_steps": 3,
    "use_cpu": True,
    "shuffle_dataset": False,
    "disable_tqdm": True,
    "optim": "sgd",  # Adam makes a full step of a gradient that is rounding alone
    "local_distillation_tokens": 96,
    "removal_rounds": 2,
}


def start_training(folder, processes=1, **options):
    """
    Trains the model of a `training_folder` with eight rows per step.

    Args:
        folder (`Path`): The folder.
        processes (`int`): How many share the rows.
        options: For `PDPruneConfig`, beside `OPTIONS`; `resume` is for `train`, and in `poisoned_process` the second
            step's loss is no number.

    Returns:
        `subprocess.Popen`: The process, or the one that starts them.
    """
    options = OPTIONS | {"per_device_train_batch_size": 8 // processes} | options
    command = [sys.executable]
    if processes > 1:
        options["ddp_backend"] = "gloo"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command += [str(SCRIPT), str(folder), json.dumps(options)]
    with open(folder / OUTPUT, "w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def result_of(process, folder):
    """Waits for the end of a training, and gives its log and its last evaluation."""
    try:
        process.wait(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, (folder / OUTPUT).read_text()[-3000:]
    return json.loads((folder / "result.json").read_text())


def losses_of(result):
    """The losses that a training has logged."""
    return [entry["loss"] for entry in result["log"] if "loss" in entry]
