import json

import pytest
import torch
from transformers import TrainerCallback

from hf_pdprune.plan import PruningPlan
from hf_pdprune.trainer import DivergenceError


@pytest.mark.invariant
@pytest.mark.parametrize("rounds", [1, 2])
def test_resumed_training_is_the_uninterrupted_one(tiny_model, make_trainer, tmp_path, losses, adapters_of, rounds):
    options = {"max_steps": 6, "removal_rounds": rounds, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tiny_model("llama"), output_dir=tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tiny_model("llama"), output_dir=tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-5)
    expected, actual = adapters_of(whole), adapters_of(resumed)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_finished_training_is_not_trained_further(tiny_model, make_trainer, tmp_path, adapters_of, caplog):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tiny_model("llama"), **options)
    whole.train()
    again = make_trainer(tiny_model("llama"), **options)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 3
    assert "is a checkpoint of step 3, and training has 3 steps in all: there is nothing left to do" in caplog.text
    expected, actual = adapters_of(whole), adapters_of(again)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("more", [{"num_train_epochs": 2}, {"max_steps": 16}])
def test_a_finished_training_goes_on_where_more_steps_are_asked_for(tiny_model, make_trainer, losses, more):
    options = {"max_steps": -1, "save_strategy": "epoch", "local_distillation_tokens": 0}
    make_trainer(tiny_model("llama"), num_train_epochs=1, **options).train()  # of 8 steps
    again = make_trainer(tiny_model("llama"), **options | more)
    assert again.train(resume_from_checkpoint=True).global_step == 16
    assert len(losses(again)) == 16


def test_checkpoints_hold_adapters_and_plan_but_not_the_dense_weights(tiny_llama, make_trainer, plan, tmp_path):
    trainer = make_trainer(tiny_llama, save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert PruningPlan.from_pretrained(checkpoint) == plan
    assert (checkpoint / "prefill" / "adapter_model.safetensors").is_file()
    assert (checkpoint / "decode" / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("model*.safetensors"))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.invariant
@pytest.mark.parametrize("options", [{}, {"removal_fade_steps": 2}, {"search_in_rounds": True}])
def test_resumed_in_the_middle_of_a_round_is_uninterrupted(
    tiny_model, make_trainer, tmp_path, losses, adapters_of, options
):
    options = {
        "max_steps": 8,
        "removal_rounds": 2,
        "removal_fraction": 1.0,
        "save_strategy": "steps",
        "save_steps": 5,
        "shuffle_dataset": True,
        "local_distillation_tokens": 0,
    } | options
    whole = make_trainer(tiny_model("llama"), **options)
    whole.train()
    again = make_trainer(tiny_model("llama"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(again)[5:] == pytest.approx(losses(whole)[5:], rel=1e-5)
    assert again.plan == whole.plan and again.removal.is_complete
    expected, actual = adapters_of(whole), adapters_of(again)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


def test_resume_takes_the_last_complete_checkpoint(tiny_model, make_trainer, tmp_path, losses):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tiny_model("llama"), **options).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # as a kill leaves it
    again = make_trainer(tiny_model("llama"), **options)
    again.train(resume_from_checkpoint=True)
    assert len(losses(again)) == 4 and (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


def test_checkpoint_whose_adapters_do_not_fit_is_refused(tiny_model, make_trainer, tmp_path):
    make_trainer(tiny_model("llama"), save_strategy="steps", save_steps=2).train()
    other = make_trainer(tiny_model("llama"), output_dir=tmp_path / "other", lora_rank=5)
    with pytest.raises(ValueError, match="not that of this model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_divergence_names_the_step_and_the_last_good_checkpoint(tiny_llama, make_trainer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(tiny_llama, max_steps=6, save_strategy="steps", save_steps=2)
    trainer.add_callback(Poison())
    with pytest.raises(DivergenceError, match=r"step 4: the loss is nan; the last good checkpoint is .*checkpoint-2"):
        trainer.train()


def test_divergence_of_another_process_ends_this_one(tiny_llama, make_trainer, monkeypatch):
    reduced = []

    def with_another(loss, reduction):
        reduced.append(loss)
        return loss + (float("nan") if len(reduced) == 2 else 1.0)

    monkeypatch.setattr("hf_pdprune.trainer.stage_trainer.reduce", with_another)
    trainer = make_trainer(tiny_llama, gradient_accumulation_steps=2)
    with pytest.raises(DivergenceError, match="step 2: the loss is nan"):
        trainer.train()
    assert all(torch.isfinite(loss) for loss in reduced) and len(reduced) == 2  # once per step


def test_checkpoint_with_an_adapter_that_the_model_lacks_is_refused(tiny_model, make_trainer, tmp_path):
    adapted = make_trainer(tiny_model("llama"), stage="prefill").model
    make_trainer(adapted, stage="decode", save_strategy="steps", save_steps=2).train()
    other = make_trainer(tiny_model("llama"), output_dir=tmp_path / "other", stage="decode")
    with pytest.raises(ValueError, match="has an adapter 'prefill', which the model lacks"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one_on_an_accelerator(
    tiny_model, make_trainer, accelerator, tmp_path, losses, bf16
):
    options = {"use_cpu": False, "bf16": bf16, "local_distillation_tokens": 384, "save_strategy": "steps"}
    options |= {"max_steps": 4, "save_steps": 2}
    whole = make_trainer(tiny_model("llama"), output_dir=tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tiny_model("llama"), output_dir=tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert {p.device for p in resumed.model.parameters()} == {accelerator}
    # Backward passes add up in any order there.
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-2 if bf16 else 1e-4)
