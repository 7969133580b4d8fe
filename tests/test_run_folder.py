import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_pdprune.run_folder import RunFolder


FILES = {"plan": ("plan.json", "journal.jsonl"), "stages": ("decode",), "results": ("results.json",)}


def test_a_step_is_done_with_its_settings_alone(tmp_path):
    run = RunFolder(tmp_path, FILES)
    assert not run.is_done("plan", {"blocks": 1})
    run.done("plan", {"blocks": 1})
    run.done("stages", {"rate": 2})
    again = RunFolder(str(tmp_path), FILES)
    assert again.is_done("stages", {"rate": 2}) and not again.is_done("results", {})
    with pytest.raises(ValueError, match="holds a run with blocks=1, not 3: choose another --output_dir"):
        again.is_done("plan", {"blocks": 3})
    assert again.is_done("plan", {"blocks": 1})


@dataclass
class Options:
    blocks: int
    rule: bool = False
    factors: list[int] = field(default_factory=lambda: [1, 2])


def test_an_option_that_is_younger_than_the_run_counts_as_its_default(tmp_path):
    RunFolder(tmp_path, FILES).done("plan", {"blocks": 1})
    run = RunFolder(tmp_path, FILES, options=(Options,))
    assert run.is_done("plan", {"blocks": 1, "rule": False, "factors": [1, 2]})
    with pytest.raises(ValueError, match="holds a run with rule=False, not True"):
        run.is_done("plan", {"blocks": 1, "rule": True})
    with pytest.raises(ValueError, match="holds a run with blocks=1, not 2"):
        run.is_done("plan", {"blocks": 2})
    changed = {"blocks": 1, "factors": [2], "other": 0}
    assert run.is_done("plan", {"blocks": 1, "digest": "younger, and no option"})
    assert run.changed({"rule": False, **changed}) == changed


def test_overwrite_forgets_what_follows(tmp_path):
    run = RunFolder(tmp_path, FILES)
    for step in FILES:
        run.done(step, {"seed": 1})
    for name in ("plan.json", "results.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "decode").mkdir()
    anew = RunFolder(tmp_path, FILES, overwrite=True)
    assert anew.is_done("plan", {"seed": 1}) and not anew.is_done("stages", {"seed": 2})
    assert anew.is_done("plan", {"seed": 1}) and not anew.is_done("results", {"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "mine.txt", "run.json"}
    assert not anew.is_done("plan", {"seed": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "run.json"}


def test_a_step_that_has_lost_a_file_is_made_again_with_those_after_it(tmp_path, caplog):
    needed = {"plan": ("plan.json",), "stages": ("decode/*.safetensors",), "results": ("results.json",)}
    run = RunFolder(tmp_path, FILES, needed=needed)
    (tmp_path / "decode").mkdir()
    for name in ("plan.json", "decode/model.safetensors", "results.json"):
        (tmp_path / name).write_text("{}")
    for step in FILES:
        run.done(step, {"seed": 1})
    assert all(RunFolder(tmp_path, FILES, needed=needed).is_done(step, {"seed": 1}) for step in FILES)
    (tmp_path / "decode" / "model.safetensors").unlink()
    again = RunFolder(tmp_path, FILES, needed=needed)
    with pytest.raises(ValueError, match="holds a run with seed=1, not 2"):
        again.is_done("stages", {"seed": 2})
    assert [again.is_done(step, {"seed": 1}) for step in FILES] == [True, False, False]
    assert "the step stages is done again: decode/*.safetensors is no longer there" in caplog.text
    (tmp_path / "decode" / "model.safetensors").write_text("")
    again.done("stages", {"seed": 1})
    interrupted = RunFolder(tmp_path, FILES, needed=needed)
    assert [interrupted.is_done(step, {"seed": 1}) for step in FILES] == [True, True, False]


IN_PROCESSES = """
import sys, time
from pathlib import Path
from accelerate import PartialState
from hf_pdprune import run_folder
from hf_pdprune.run_folder import RunFolder

state, folder = PartialState(cpu=True), Path(sys.argv[1])
files, changed = {"plan": ["plan.json"]}, []
for owner, name in ((run_folder, "write_artefact"), (Path, "unlink")):
    def slow(*args, inner=getattr(owner, name), **kwargs):
        changed.append(args[0])
        time.sleep(1)
        return inner(*args, **kwargs)
    setattr(owner, name, slow)
run = RunFolder(folder, files)
assert not run.is_done("plan", {"blocks": 1})
if state.is_main_process:
    (folder / "plan.json").write_text("{}")
run.done("plan", {"blocks": 1})
again = RunFolder(folder, files, overwrite=True)
assert again.is_done("plan", {"blocks": 1})
assert not again.is_done("plan", {"blocks": 2})
assert not (folder / "plan.json").exists()
assert bool(changed) == state.is_main_process
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_the_main_process_alone_writes_and_the_others_wait(tmp_path):
    (tmp_path / "script.py").write_text(IN_PROCESSES)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "run")]
    source = str(Path(__file__).parents[1] / "src")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
