from dataclasses import replace

import pytest
import torch
from accelerate.utils import AutocastKwargs

from hf_pdprune.plan import PruningPlan, StagePlan


@pytest.fixture
def dtypes_of_layers():
    """`dtypes_of_layers(model)` gathers, from now on, what the linear layers give, by name."""

    def watch(model):
        seen = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):

                def hook(module, args, output, name=name):
                    seen.setdefault(name, []).append(output.dtype)

                module.register_forward_hook(hook)
        return seen

    return watch


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"logits_chunk_tokens": 0}], ids=str)
def test_a_step_computes_in_the_dtype_that_is_asked_for(tiny_model, make_trainer, dtypes_of_layers, losses, options):
    runs = {}
    for bf16 in (False, True):
        model = tiny_model("llama")
        trainer = make_trainer(model, bf16=bf16, max_steps=2, local_distillation_tokens=0, **options)
        seen = dtypes_of_layers(model)
        trainer.train()
        expected = torch.bfloat16 if bf16 else torch.float32
        # The dense model's layers (teacher and stages, forward and again in the backward pass), the adapters' and the
        # LM head.
        assert {"lm_head", "model.layers.0.self_attn.q_proj.base_layer"} <= seen.keys()
        assert any("lora_A.prefill" in name for name in seen) and any("lora_B.decode" in name for name in seen)
        assert {name: set(dtypes) for name, dtypes in seen.items()} == {name: {expected} for name in seen}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        runs[bf16] = losses(trainer)
    assert runs[True] != runs[False]
    assert runs[True] == pytest.approx(runs[False], rel=0.05)


def test_evaluation_computes_in_it_too_and_losses_are_float32(tiny_llama, make_trainer, dtypes_of_layers):
    trainer = make_trainer(tiny_llama, bf16=True)
    seen = dtypes_of_layers(tiny_llama)
    trainer.evaluate()
    assert {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.bfloat16}
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(2))))
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.dtype == torch.float32 and loss.requires_grad


@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
def test_every_adapter_gets_its_gradient(tiny_model, make_trainer, plan, token_choice):
    """Casts of weights are kept during a step: one made without gradient must not be what learns later."""
    same = replace(plan, prefill=plan.decode, kv=replace(plan.kv, token_choice=token_choice))
    gradients = {}
    for cached in (False, True):
        trainer = make_trainer(tiny_model("llama"), plan=same, bf16=True, stage="unified", local_distillation_tokens=0)
        trainer.accelerator.autocast_handler = AutocastKwargs(cache_enabled=cached)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(4))))
        trainer.compute_loss(trainer.model, batch).backward()
        gradients[cached] = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, expected in gradients[False].items():
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradients[True][name], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_every_architecture_trains_in_it(tiny_model, make_trainer, architecture, plan, losses):
    """With all that looks at hidden states, whatever their dtype is: fading, matching, recomputation."""
    model = tiny_model(architecture)
    plan = PruningPlan.empty(model, prefill=StagePlan((3,), (), (1,)), decode=StagePlan((2, 3)), kv=plan.kv)
    options = {"removal_fade_steps": 1, "hidden_matching_weight": 0.1, "activation_checkpointing": True}
    trainer = make_trainer(
        model, plan=plan, bf16=True, optim="sgd", local_distillation_tokens=0, max_steps=2, **options
    )
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.gpu
def test_an_accelerator_trains_in_it_about_as_in_float32_and_as_the_cpu(
    tiny_model, make_trainer, accelerator, tmp_path, losses
):
    runs = {}
    for name, options in {"cpu": {"use_cpu": True}, "float32": {"bf16": False}, "bfloat16": {"bf16": True}}.items():
        options = {"use_cpu": False, "max_steps": 5, "local_distillation_tokens": 384} | options
        trainer = make_trainer(tiny_model("llama"), output_dir=tmp_path / name, **options)
        trainer.train()
        assert name == "cpu" or {p.device for p in trainer.model.parameters()} == {accelerator}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        runs[name] = losses(trainer)
    assert all(0 < loss < float("inf") for run in runs.values() for loss in run)
    assert runs["float32"] == pytest.approx(runs["cpu"], rel=0.02)
    assert runs["bfloat16"] == pytest.approx(runs["float32"], rel=0.1) and runs["bfloat16"] != runs["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"hidden_matching_weight": 0.1},
        {"full_finetuning": True, "stage": "decode"},
    ],
    ids=str,
)
def test_every_way_to_train_runs_in_it_on_an_accelerator(
    tiny_llama, make_trainer, accelerator, rows, tmp_path, losses, options
):
    options = {"use_cpu": False, "bf16": True, "max_steps": 2, "local_distillation_tokens": 0} | options
    trainer = make_trainer(tiny_llama, output_dir=tmp_path / "run", **options)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(0 < loss < float("inf") for loss in losses(trainer))
