from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hf_pdprune.hub import load_stages
from hf_pdprune.inference import disaggregated_forward
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer
from hf_pdprune.trainer.block_checkpointing import CheckpointedBlock


def check_saved_stages(trainer, rows, folder):
    """What is saved does what the trained stages do."""
    trainer.save_model(str(folder))
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.model.eval()
    with torch.no_grad():
        there = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        expected = disaggregated_forward(*trainer.stages(), there)
        actual = disaggregated_forward(*load_stages(folder), batch)
    torch.testing.assert_close(actual, expected.cpu(), atol=1e-4, rtol=1e-4)


def test_training_brings_the_pair_nearer_to_the_dense_model(tiny_llama, make_trainer):
    trainer = make_trainer(tiny_llama, max_steps=30)
    before = trainer.evaluate()["eval_loss"]
    dense = {name: p.detach().clone() for name, p in tiny_llama.named_parameters() if "lora" not in name}
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before
    for entry in trainer.state.log_history:
        if "loss" in entry:  # every labelled token counts once
            assert entry["loss"] == pytest.approx(entry["kl"], rel=1e-3)
    for name, parameter in tiny_llama.named_parameters():
        if name in dense:
            assert torch.equal(parameter, dense[name]), name


def test_both_adapters_learn_and_only_in_blocks_that_their_stage_keeps(tiny_llama, make_trainer, adapters_of):
    trainer = make_trainer(tiny_llama, max_steps=1)
    before = adapters_of(trainer)
    assert before and not any(".layers.3." in name for name in before)
    assert not any(".layers.2." in name and ".decode." in name for name in before)
    trainer.train()
    after = adapters_of(trainer)
    # Fitted layers are not trained on, but have been changed by the fit.
    changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    for stage in ("prefill", "decode"):
        # B learns in the first step (A's gradient is zero as long as B is).
        assert {n for n in before if f"lora_B.{stage}." in n} <= changed, stage


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"hidden_matching_weight": 0.5}], ids=str)
def test_prefill_may_project_blocks_that_decode_keeps(
    tiny_llama, make_trainer, plan, rows, tmp_path, adapters_of, options
):
    relaxed = replace(plan, prefill=StagePlan((3,), (), (1, 5)))
    trainer = make_trainer(
        tiny_llama,
        plan=relaxed,
        output_dir=tmp_path / "run",
        max_steps=30,
        local_distillation_tokens=0,
        **options,
    )
    of_projected = {name for name in adapters_of(trainer) if ".layers.1." in name and ".prefill." in name}
    assert {name.split(".layers.1.")[1].split(".lora")[0] for name in of_projected} == {
        "self_attn.k_proj", "self_attn.v_proj",
    }  # fmt: skip
    before, started = trainer.evaluate()["eval_loss"], adapters_of(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    learned = adapters_of(trainer)
    assert all(not torch.equal(learned[name], started[name]) for name in of_projected if "lora_B" in name)
    check_saved_stages(trainer, rows, tmp_path / "stages")


def test_saved_stages_are_what_was_trained(tiny_llama, make_trainer, rows, tmp_path):
    trainer = make_trainer(tiny_llama, output_dir=tmp_path / "run")
    trainer.train()
    check_saved_stages(trainer, rows, tmp_path / "stages")
    decode = AutoModelForCausalLM.from_pretrained(tmp_path / "stages" / "decode")
    assert decode.config.num_hidden_layers == 4


@pytest.mark.invariant
def test_gradient_accumulation_of_eight_ones_is_one_eight(tiny_model, make_trainer, losses, adapters_of):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        # SGD: Adam makes a full step of a gradient that is rounding alone.
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
        }
        trainer = make_trainer(tiny_model("llama"), max_steps=2, **options)
        trainer.train()
        runs.append((losses(trainer), adapters_of(trainer)))
    (one_loss, one), (eight_loss, eight) = runs
    assert one_loss == pytest.approx(eight_loss, rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], eight[name], atol=1e-6, rtol=1e-4)


def test_options_of_the_loss_are_read(tiny_model, make_trainer):
    def first_loss(**options):
        trainer = make_trainer(tiny_model("llama"), **options)
        return trainer.evaluate()["eval_loss"]

    default = first_loss()
    assert first_loss(distillation_loss="reverse_kl") != pytest.approx(default, rel=1e-3)
    assert first_loss(distillation_temperature=3.0) != pytest.approx(default, rel=1e-3)
    assert first_loss(token_aware_distillation=False) != pytest.approx(default, rel=1e-4)


def test_layers_that_are_fitted_have_a_rank_of_their_own(tiny_llama, make_trainer):
    options = {"local_distillation_tokens": 384, "local_distillation_rank": 7, "lora_rank": 4}
    trainer = make_trainer(tiny_llama, **options)
    layers = trainer.model.base_model.model.model.layers  # block 3 is missing in both stages, 2 in decode only
    assert layers[1].mlp.up_proj.r == {"prefill": 4, "decode": 7}
    assert layers[2].mlp.down_proj.r == {"prefill": 7}
    assert layers[1].self_attn.o_proj.r == {"prefill": 4, "decode": 4}


@pytest.mark.parametrize("tokens", [0, 384])
def test_training_starts_from_the_closed_form_where_it_is_asked_for(tiny_llama, make_trainer, tokens):
    options = {"local_distillation_tokens": tokens, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(tiny_llama, **options)
    trainer.train()
    parameters = trainer.model.named_parameters()
    changed = [name for name, p in parameters if "lora_B" in name and p.abs().sum() > 0]
    assert bool(changed) == bool(tokens)
    assert all(".mlp." in name for name in changed)


def test_lora_options_are_read(tiny_llama, make_trainer):
    trainer = make_trainer(tiny_llama, lora_rank=3, lora_alpha=7)
    config = trainer.model.peft_config["decode"]
    assert (config.r, config.lora_alpha) == (3, 7)


def test_the_callers_options_stay_as_they_are(tiny_model, plan, rows, tiny_tokenizer, tmp_path):
    tiny_model("llama", max_position_embeddings=32).save_pretrained(tmp_path / "dense")
    options = {"max_length": 400, "activation_checkpointing": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    args = PDPruneConfig(str(tmp_path), report_to="none", use_cpu=True, **options)
    before = args.to_dict()
    trainer = PDPruneTrainer(tmp_path / "dense", plan, args, train_dataset=rows, processing_class=tiny_tokenizer)
    assert args.to_dict() == before and trainer.args.max_length == 32


def test_options_of_another_kind_are_refused(tiny_llama, plan, rows, tmp_path):
    with pytest.raises(TypeError, match="args must be a PDPruneConfig, got SFTConfig"):
        PDPruneTrainer(tiny_llama, plan, SFTConfig(str(tmp_path), bf16=False), train_dataset=rows)
    with pytest.raises(TypeError, match="peft_config must be a PeftConfig, got dict"):
        PDPruneTrainer(tiny_llama, plan, train_dataset=rows, peft_config={"r": 4})


def test_plan_of_another_model_is_refused(tiny_model, make_trainer):
    other = PruningPlan("other", "llama", 12)
    with pytest.raises(ValueError, match="12 blocks"):
        make_trainer(tiny_model("llama"), plan=other)


# Stages


def test_the_stage_that_stays_has_no_dropout(tiny_model, make_trainer, plan):
    model = tiny_model("gpt2").train()
    own = PruningPlan.empty(model, prefill=plan.prefill, decode=plan.decode)
    trainer = make_trainer(model, plan=own, stage="decode", full_finetuning=True)
    assert trainer.evaluate()["eval_kl"] == trainer.evaluate()["eval_kl"]


def test_no_adapter_where_all_weights_learn(tiny_llama, make_trainer):
    with pytest.raises(ValueError, match="peft_config has no effect with full_finetuning"):
        make_trainer(tiny_llama, stage="decode", full_finetuning=True, peft_config=LoraConfig())


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("full", [False, True])
def test_one_stage_learns_and_the_other_stays(tiny_llama, make_trainer, rows, tmp_path, stage, full):
    options = {"stage": stage, "full_finetuning": full, "max_steps": 12, "learning_rate": 1e-3 if full else 5e-3}
    trainer = make_trainer(tiny_llama, output_dir=tmp_path / "run", **options)
    before = trainer.evaluate()["eval_loss"]
    dense = {name: p.detach().clone() for name, p in tiny_llama.named_parameters() if "lora" not in name}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    for name, parameter in tiny_llama.named_parameters():
        if name in dense:
            assert torch.equal(parameter, dense[name]), name
    if not full:
        assert list(trainer.model.peft_config) == [stage]
    check_saved_stages(trainer, rows, tmp_path / "stages")


def test_unified_stages_share_one_adapter(tiny_model, make_trainer, plan, rows, tmp_path):
    with pytest.raises(ValueError, match="unified"):
        make_trainer(tiny_model("llama"), stage="unified")
    model = tiny_model("llama")
    same = PruningPlan.empty(model, prefill=StagePlan((2, 3)), decode=StagePlan((2, 3)), kv=plan.kv)
    trainer = make_trainer(model, plan=same, stage="unified", max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert list(trainer.model.peft_config) == ["unified"]
    assert trainer.evaluate()["eval_loss"] < before
    assert_exports_one_model(trainer, rows, tmp_path / "stages")


def test_unified_stages_share_all_weights(tiny_llama, make_trainer, plan, rows, tmp_path):
    same = replace(plan, prefill=plan.decode)
    trainer = make_trainer(tiny_llama, plan=same, stage="unified", full_finetuning=True, learning_rate=1e-3)
    trainer.train()
    assert_exports_one_model(trainer, rows, tmp_path / "stages")


def assert_exports_one_model(trainer, rows, folder):
    trainer.save_model(str(folder))
    assert {path.name for path in folder.iterdir()} == {"unified", "pruning_plan.json"}
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.model.eval()
    with torch.no_grad():
        expected = disaggregated_forward(*trainer.stages(), batch)
        actual = disaggregated_forward(*load_stages(folder), batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_adapters_of_an_earlier_training_go_on(tiny_llama, make_trainer, adapters_of):
    first = make_trainer(tiny_llama, stage="prefill")
    first.train()
    expected = adapters_of(first)
    second = make_trainer(first.model, stage="decode")
    assert [stage.adapter for stage in second.stages()] == ["prefill", "decode"]
    second.train()
    there = dict(second.model.named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(there[name], tensor) and not there[name].requires_grad


@pytest.mark.parametrize("options", [{}, {"removal_rounds": 2, "search_in_rounds": True, "round_search_examples": 8}])
def test_decode_learns_to_predict_the_first_token(tiny_llama, make_trainer, adapters_of, options):
    trainer = make_trainer(tiny_llama, first_token="decode", local_distillation_tokens=0, **options)
    before = adapters_of(trainer)
    trainer.train()
    changed = {name for name, tensor in adapters_of(trainer).items() if not torch.equal(tensor, before[name])}
    # Prefill learns by its keys and values alone: behind those of its last block nothing of it is used.
    assert {stage for stage in ("prefill", "decode") for name in changed if f".{stage}." in name} == {
        "prefill",
        "decode",
    }
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logged and all("decode_kl" in entry and "prefill_kl" not in entry for entry in logged)
    assert all(entry["kl"] == entry["decode_kl"] for entry in logged)


# Losses, rounds, memory


@pytest.mark.parametrize(
    "options",
    [
        {"distillation_loss": "jensen_shannon"},
        {"distillation_loss": "jensen_shannon", "distillation_mixture": 0.9},
        {"distillation_top_k": 2},
        {"distillation_weight": 0.5},
        {"cross_entropy_weight": 0.5},
        {"hidden_matching_weight": 1.0},
        {"hidden_matching_weight": 1.0, "hidden_matching_blocks": [0]},
        {"local_distillation_tokens": 0, "removal_fade_steps": 1},
        {"first_token": "decode"},
    ],
    ids=lambda options: "+".join(options),
)
def test_more_options_of_the_loss_are_read(tiny_model, make_trainer, options):
    def first_loss(**options):
        trainer = make_trainer(tiny_model("llama"), **options)
        return trainer.evaluate()["eval_loss"]

    without_last = dict(list(options.items())[:-1])
    assert first_loss(**options) != pytest.approx(first_loss(**without_last), rel=1e-4)


def test_the_old_name_of_activation_checkpointing_does_the_same(tiny_model, make_trainer, monkeypatch):
    runs, run = [], CheckpointedBlock._run
    monkeypatch.setattr(CheckpointedBlock, "_run", lambda *args, **kwargs: runs.append(1) or run(*args, **kwargs))
    for option, does in (("logging_first_step", False), ("gradient_checkpointing", True)):
        make_trainer(tiny_model("llama"), max_steps=1, local_distillation_tokens=0, **{option: True}).train()
        assert bool(runs) == does


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"logits_chunk_tokens": 3}])
def test_what_saves_memory_changes_no_step(tiny_model, make_trainer, losses, options):
    runs = []
    for given in ({"logits_chunk_tokens": 0}, options):
        trainer = make_trainer(tiny_model("llama"), optim="sgd", **given)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"down_proj": 6}}, {"use_dora": True}])
def test_adapters_of_ones_own_learn_and_are_exported(tiny_llama, make_trainer, rows, tmp_path, options):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **options)
    tokens = 0 if "use_dora" in options else 384
    trainer = make_trainer(
        tiny_llama, peft_config=config, output_dir=tmp_path / "run", max_steps=12, local_distillation_tokens=tokens
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    layer = trainer.model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.r["prefill"] == options.get("rank_pattern", {}).get("down_proj", 3)
    check_saved_stages(trainer, rows, tmp_path / "stages")


def test_adapter_without_a_block_of_the_stage_is_an_error(tiny_llama, make_trainer):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[3])
    with pytest.raises(ValueError, match="touches no block"):
        make_trainer(tiny_llama, peft_config=config)


# What people watch


@pytest.mark.parametrize("trained", [False, True])
def test_fitted_layers_are_trained_on_only_where_asked_for(tiny_model, make_trainer, tmp_path, trained):
    def lora_of(trainer):
        return {name[name.index("layers.") :]: p for name, p in trainer.model.named_parameters() if "lora" in name}

    options = {"local_distillation_tokens": 384, "train_fitted_layers": trained}
    options |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tiny_model("llama"), **options)
    whole.train()
    fixed = {name for name, p in lora_of(whole).items() if not p.requires_grad}
    fitted = {
        f"layers.{block}.mlp.{name}_proj.lora_{part}.{stage}.weight"
        for block, stage in ((2, "prefill"), (4, "prefill"), (1, "decode"), (4, "decode"))
        for name in ("gate", "up", "down")
        for part in "AB"
    }
    assert fixed == (set() if trained else fitted)
    resumed = make_trainer(tiny_model("llama"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in lora_of(resumed).items():
        torch.testing.assert_close(parameter, lora_of(whole)[name], msg=name)
        assert parameter.requires_grad == (name not in fixed)


@pytest.mark.gpu
@pytest.mark.parametrize("local_distillation_tokens", [0, 384])
def test_stages_that_an_accelerator_trained_are_loaded_on_the_cpu(
    tiny_llama, make_trainer, accelerator, rows, tmp_path, local_distillation_tokens
):
    options = {"use_cpu": False, "bf16": False, "local_distillation_tokens": local_distillation_tokens}
    trainer = make_trainer(tiny_llama, output_dir=tmp_path / "run", **options)
    assert trainer.args.device == accelerator
    trainer.train()
    check_saved_stages(trainer, rows, tmp_path / "stages")
