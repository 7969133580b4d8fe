import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_pdprune.hub import load_stages
from hf_pdprune.inference import disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer


@pytest.fixture
def plan(tiny_llama):
    return PruningPlan.empty(
        tiny_llama, "tiny", prefill=StagePlan((3,)), decode=StagePlan((2, 3)), kv=KVPlan((1, 4), 2, 4)
    )


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 240, (24,), generator=generator).tolist()} for _ in range(16)]
    )


def make_trainer(model, plan, rows, folder, tokenizer, **options):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "lora_rank": 4,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "shuffle_dataset": False,
        "disable_tqdm": True,
    }
    args = PDPruneConfig(str(folder), **{**defaults, **options})
    return PDPruneTrainer(model, plan, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_training_brings_the_pair_nearer_to_the_dense_model(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, max_steps=30)
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


def test_both_adapters_learn_and_only_in_blocks_that_their_stage_keeps(
    tiny_llama, plan, rows, tmp_path, tiny_tokenizer
):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, max_steps=1)
    before = adapters_of(trainer)
    assert before and not any(".layers.3." in name for name in before)
    assert not any(".layers.2." in name and ".decode." in name for name in before)
    trainer.train()
    after = adapters_of(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for stage in ("prefill", "decode"):
        # B learns in the first step (A's gradient is zero as long as B is).
        assert {n for n in before if f"lora_B.{stage}." in n} <= changed, stage


def test_saved_stages_are_what_was_trained(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path / "run", tiny_tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "stages"))
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.model.eval()
    with torch.no_grad():
        expected = disaggregated_forward(*trainer.stages(), batch)
        actual = disaggregated_forward(*load_stages(tmp_path / "stages"), batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    decode = AutoModelForCausalLM.from_pretrained(tmp_path / "stages" / "decode")
    assert decode.config.num_hidden_layers == 4


@pytest.mark.invariant
def test_gradient_accumulation_of_eight_ones_is_one_eight(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        # SGD: Adam makes a full step of a gradient that is rounding alone.
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
        }
        trainer = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, max_steps=2, **options)
        trainer.train()
        runs.append((losses(trainer), adapters_of(trainer)))
    (one_loss, one), (eight_loss, eight) = runs
    assert one_loss == pytest.approx(eight_loss, rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], eight[name], atol=1e-6, rtol=1e-4)


@pytest.mark.invariant
@pytest.mark.parametrize("rounds", [1, 2])
def test_resumed_training_is_the_uninterrupted_one(tiny_model, plan, rows, tmp_path, tiny_tokenizer, rounds):
    options = {"max_steps": 6, "removal_rounds": rounds, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tiny_model("llama"), plan, rows, tmp_path / "whole", tiny_tokenizer, **options)
    whole.train()
    resumed = make_trainer(tiny_model("llama"), plan, rows, tmp_path / "resumed", tiny_tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-5)
    expected, actual = adapters_of(whole), adapters_of(resumed)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_finished_training_is_not_trained_further(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    whole.train()
    again = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 3
    expected, actual = adapters_of(whole), adapters_of(again)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_checkpoints_hold_adapters_and_plan_but_not_the_dense_weights(
    tiny_llama, plan, rows, tmp_path, tiny_tokenizer
):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert PruningPlan.from_pretrained(checkpoint) == plan
    assert (checkpoint / "prefill" / "adapter_model.safetensors").is_file()
    assert (checkpoint / "decode" / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("model*.safetensors"))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4


def test_rounds_are_logged(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, removal_rounds=2, removal_fraction=1.0)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["decode_blocks"] for entry in entries] == [5, 5, 4, 4]
    assert [entry["prefill_blocks"] for entry in entries] == [5, 5, 5, 5]


def test_options_of_the_loss_are_read(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    def first_loss(**options):
        trainer = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
        return trainer.evaluate()["eval_loss"]

    default = first_loss()
    assert first_loss(distillation_loss="reverse_kl") != pytest.approx(default, rel=1e-3)
    assert first_loss(distillation_temperature=3.0) != pytest.approx(default, rel=1e-3)
    assert first_loss(token_aware_distillation=False) != pytest.approx(default, rel=1e-4)


def test_layers_that_are_fitted_have_a_rank_of_their_own(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    options = {"local_distillation_tokens": 384, "local_distillation_rank": 7, "lora_rank": 4}
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, **options)
    down_proj = trainer.model.base_model.model.model.layers[1].mlp.down_proj
    assert down_proj.r == {"prefill": 7, "decode": 7}
    assert trainer.model.base_model.model.model.layers[1].mlp.up_proj.r == {"prefill": 4, "decode": 4}


@pytest.mark.parametrize("tokens", [0, 384])
def test_training_starts_from_the_closed_form_where_it_is_asked_for(
    tiny_llama, plan, rows, tmp_path, tiny_tokenizer, tokens
):
    options = {"local_distillation_tokens": tokens, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, **options)
    trainer.train()
    changed = [name for name, p in adapters_of(trainer).items() if "lora_B" in name and p.abs().sum() > 0]
    assert bool(changed) == bool(tokens)
    assert all(".down_proj." in name for name in changed)


def test_lora_options_are_read(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, lora_rank=3, lora_alpha=7)
    config = trainer.model.peft_config["decode"]
    assert (config.r, config.lora_alpha) == (3, 7)


def test_plain_text_and_prompt_completion_rows(tiny_model, plan, tmp_path, tiny_tokenizer):
    text = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog " * 3}] * 4)
    pairs = Dataset.from_list([{"prompt": "the quick brown", "completion": " fox jumps"}] * 4)
    for rows in (text, pairs):
        trainer = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] > 0
    packed = make_trainer(
        tiny_model("llama"),
        plan,
        text,
        tmp_path,
        tiny_tokenizer,
        packing=True,
        packing_strategy="wrapped",
        max_length=32,
    )
    assert {len(row["input_ids"]) for row in packed.train_dataset} <= {32} | set(range(2, 32))


def test_plan_of_another_model_is_refused(tiny_model, rows, tmp_path, tiny_tokenizer):
    other = PruningPlan("other", "llama", 12)
    with pytest.raises(ValueError, match="12 blocks"):
        make_trainer(tiny_model("llama"), other, rows, tmp_path, tiny_tokenizer)


@pytest.mark.parametrize("max_length", [None, 100000])
def test_rows_are_cut_to_the_context(tiny_model, plan, tmp_path, tiny_tokenizer, max_length):
    model = tiny_model("llama", max_position_embeddings=32)
    rows = Dataset.from_list([{"input_ids": list(range(3, 80))}] * 2)
    trainer = make_trainer(model, plan, rows, tmp_path, tiny_tokenizer, max_length=max_length)
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [32, 32]
