import json

from hf_pdprune.trainer.training_checkpoint import begin_checkpoint, last_complete_checkpoint


def checkpoint(folder, step, state=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "optimizer.pt").write_bytes(b"...")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_latest_that_was_written_to_the_end_is_taken(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10):
        checkpoint(tmp_path, step, json.dumps({"global_step": step}))
    checkpoint(tmp_path, 11, '{"global_st')  # killed while its last file was written
    checkpoint(tmp_path, 12)  # killed before
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_is_written_anew_is_not_complete(tmp_path):
    path = checkpoint(tmp_path, 3, json.dumps({"global_step": 3}))
    begin_checkpoint(path)
    assert last_complete_checkpoint(tmp_path) is None
    begin_checkpoint(tmp_path / "checkpoint-4")
