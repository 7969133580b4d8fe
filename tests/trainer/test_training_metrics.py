import math

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from hf_pdprune.trainer.distillation_step import StepOutput
from hf_pdprune.trainer.training_metrics import TrainingMetrics


def batch_of(prefill, decode, read=10):
    """What a step gives for sums of KL, negative log-likelihood, agreement and tokens of each stage."""
    sums = torch.tensor([prefill, decode])
    return StepOutput(sums[:, 0].sum(), sums, torch.tensor(0.5)), {
        "prompt_mask": torch.ones(1, read - 2),
        "completion_mask": torch.ones(1, 2),
    }


def test_means_are_over_the_tokens_of_each_stage():
    metrics = TrainingMetrics()
    metrics.add(*batch_of([1.0, 2.0, 1.0, 2.0], [6.0, 12.0, 3.0, 6.0]))
    metrics.add(*batch_of([3.0, 4.0, 0.0, 2.0], [2.0, 4.0, 1.0, 2.0]))
    found = metrics.pop()
    assert found == pytest.approx(
        {
            "kl": 1.0,
            "prefill_kl": 1.0,
            "decode_kl": 1.0,
            "perplexity": math.exp(22 / 12),
            "prefill_perplexity": math.exp(1.5),
            "decode_perplexity": math.exp(2.0),
            "top1_agreement": 5 / 12,
            "hidden_loss": 1 / 12,
            "read_tokens": 20,
        }
    )
    assert metrics.pop() == {}


def test_decode_has_none_where_every_completion_is_one_token():
    metrics = TrainingMetrics()
    metrics.add(*batch_of([1.0, 900.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]))
    found = metrics.pop()
    assert found["prefill_perplexity"] == math.inf and not any(name.startswith("decode") for name in found)


def test_prefill_has_none_where_the_first_token_is_left_to_decode():
    metrics = TrainingMetrics()
    metrics.add(*batch_of([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 1.0, 2.0]))
    found = metrics.pop()
    assert found["kl"] == found["decode_kl"] == 0.5 and not any(name.startswith("prefill") for name in found)


OF_STAGES = {f"{stage}_{what}" for stage in ("prefill", "decode") for what in ("kl", "perplexity", "blocks")}


class Tracker(TrainerCallback):
    """Stands for what `report_to` names: gets what an experiment tracker gets, under the names that it shows."""

    def __init__(self):
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for name, value in rewrite_logs(logs).items():
                self.shown.setdefault(name, []).append(value)


def test_metrics_of_both_stages_reach_a_tracker(tiny_llama, make_trainer):
    tracker = Tracker()
    trainer = make_trainer(tiny_llama, callbacks=[tracker], max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for prefix, times in (("train", 2), ("eval", 1)):
        for name in OF_STAGES | {"kl", "perplexity", "top1_agreement", "loss"}:
            values = tracker.shown[f"{prefix}/{name}"]
            assert len(values) == times and all(math.isfinite(value) for value in values), name
    # The mean over tokens of both lies between those of the stages.
    for entry in trainer.state.log_history:
        for prefix in ("", "eval_"):
            if f"{prefix}kl" in entry:
                of_stages = sorted(entry[f"{prefix}{stage}_perplexity"] for stage in ("prefill", "decode"))
                assert of_stages[0] <= entry[f"{prefix}perplexity"] <= of_stages[1]


def test_metrics_reach_tensorboard(tiny_llama, make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make_trainer(tiny_llama, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=2).train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in OF_STAGES:
        assert [event.step for event in board.Scalars(f"train/{name}")] == [1, 2]
        assert [event.step for event in board.Scalars(f"eval/{name}")] == [2]
