"""BlockRemovalCallback in a training."""

import torch


def test_rounds_are_logged(tiny_llama, make_trainer):
    trainer = make_trainer(tiny_llama, removal_rounds=2, removal_fraction=1.0)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["decode_blocks"] for entry in entries] == [5, 5, 4, 4]
    assert [entry["prefill_blocks"] for entry in entries] == [5, 5, 5, 5]


def test_a_second_training_begins_without_the_blocks_that_the_first_has_removed(tiny_llama, make_trainer):
    options = {"removal_rounds": 2, "removal_fraction": 1.0, "removal_fade_steps": 2, "local_distillation_tokens": 0}
    trainer = make_trainer(tiny_llama, max_steps=6, **options)
    trainer.train()
    trainer.train()
    blocks = [entry["decode_blocks"] for entry in trainer.state.log_history if "loss" in entry]
    assert blocks == [4] * 6


def test_where_memory_runs_out_all_rounds_begin_again(tiny_llama, make_trainer, monkeypatch):
    options = {"removal_rounds": 2, "removal_fraction": 1.0, "local_distillation_tokens": 0}
    trainer = make_trainer(tiny_llama, auto_find_batch_size=True, per_device_train_batch_size=8, **options)
    compute_loss, calls = trainer.compute_loss, []

    def runs_out(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # in the second round
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", runs_out)
    trainer.train()
    blocks = [entry["decode_blocks"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(calls) == 8 and blocks == [5, 5, 4, 4]
