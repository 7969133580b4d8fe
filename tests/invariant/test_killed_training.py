import random
import signal
import time

import pytest
from training_process import losses_of, result_of, start_training

from hf_pdprune.trainer import last_complete_checkpoint


@pytest.mark.invariant
def test_training_that_was_killed_goes_on_as_if_it_had_not_been(training_folder):
    # What is fitted in closed form is frozen, as by default, and blocks go in two rounds, at steps 0 and 10.
    options = {"max_steps": 40, "save_steps": 1, "optim": "adamw_torch"}
    folder = str(training_folder / "killed")
    killed = start_training(training_folder, **options, output_dir=folder)
    try:
        until = time.monotonic() + 200
        while last_complete_checkpoint(folder) is None:
            assert killed.poll() is None and time.monotonic() < until, "training did not get to its first checkpoint"
            time.sleep(0.02)
        time.sleep(random.uniform(0, 2))
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL, "training had ended before it was killed"

    process = start_training(training_folder, **options, output_dir=folder, resume=True)
    resumed = result_of(process, training_folder)
    process = start_training(training_folder, **options, output_dir=str(training_folder / "whole"))
    whole = result_of(process, training_folder)
    assert len(losses_of(whole)) == 40
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-5)
