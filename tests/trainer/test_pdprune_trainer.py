import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from hf_pdprune.hub import load_stages
from hf_pdprune.inference import disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer import DivergenceError, PDPruneConfig, PDPruneTrainer


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


def check_saved_stages(trainer, rows, folder):
    """What is saved does what the trained stages do."""
    trainer.save_model(str(folder))
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.model.eval()
    with torch.no_grad():
        expected = disaggregated_forward(*trainer.stages(), batch)
        actual = disaggregated_forward(*load_stages(folder), batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


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
    # Fitted layers are not trained on, but have been changed by the fit.
    changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    for stage in ("prefill", "decode"):
        # B learns in the first step (A's gradient is zero as long as B is).
        assert {n for n in before if f"lora_B.{stage}." in n} <= changed, stage


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"hidden_matching_weight": 0.5}], ids=str)
def test_prefill_may_project_blocks_that_decode_keeps(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, options):
    relaxed = replace(plan, prefill=StagePlan((3,), (), (1, 5)))
    trainer = make_trainer(
        tiny_llama,
        relaxed,
        rows,
        tmp_path / "run",
        tiny_tokenizer,
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


def test_saved_stages_are_what_was_trained(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path / "run", tiny_tokenizer)
    trainer.train()
    check_saved_stages(trainer, rows, tmp_path / "stages")
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
    layers = trainer.model.base_model.model.model.layers  # block 3 is missing in both stages, 2 in decode only
    assert layers[1].mlp.up_proj.r == {"prefill": 4, "decode": 7}
    assert layers[2].mlp.down_proj.r == {"prefill": 7}
    assert layers[1].self_attn.o_proj.r == {"prefill": 4, "decode": 4}


@pytest.mark.parametrize("tokens", [0, 384])
def test_training_starts_from_the_closed_form_where_it_is_asked_for(
    tiny_llama, plan, rows, tmp_path, tiny_tokenizer, tokens
):
    options = {"local_distillation_tokens": tokens, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, **options)
    trainer.train()
    parameters = trainer.model.named_parameters()
    changed = [name for name, p in parameters if "lora_B" in name and p.abs().sum() > 0]
    assert bool(changed) == bool(tokens)
    assert all(".mlp." in name for name in changed)


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


# Resume


@pytest.mark.invariant
@pytest.mark.parametrize("options", [{}, {"removal_fade_steps": 2}, {"search_in_rounds": True}])
def test_resumed_in_the_middle_of_a_round_is_uninterrupted(tiny_model, plan, rows, tmp_path, tiny_tokenizer, options):
    options = {
        "max_steps": 8,
        "removal_rounds": 2,
        "removal_fraction": 1.0,
        "save_strategy": "steps",
        "save_steps": 5,
        "shuffle_dataset": True,
        "local_distillation_tokens": 0,
    } | options
    whole = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    whole.train()
    again = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(again)[5:] == pytest.approx(losses(whole)[5:], rel=1e-5)
    assert again.plan == whole.plan and again.removal.is_complete
    expected, actual = adapters_of(whole), adapters_of(again)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


def test_resume_takes_the_last_complete_checkpoint(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # as a kill leaves it
    again = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    again.train(resume_from_checkpoint=True)
    assert len(losses(again)) == 4 and (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


def test_checkpoint_whose_adapters_do_not_fit_is_refused(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    make_trainer(
        tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, save_strategy="steps", save_steps=2
    ).train()
    other = make_trainer(tiny_model("llama"), plan, rows, tmp_path / "other", tiny_tokenizer, lora_rank=5)
    with pytest.raises(ValueError, match="not that of this model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_divergence_names_the_step_and_the_last_good_checkpoint(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(
        tiny_llama, plan, rows, tmp_path, tiny_tokenizer, max_steps=6, save_strategy="steps", save_steps=2
    )
    trainer.add_callback(Poison())
    with pytest.raises(DivergenceError, match=r"step 4: the loss is nan; the last good checkpoint is .*checkpoint-2"):
        trainer.train()


# Stages


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("full", [False, True])
def test_one_stage_learns_and_the_other_stays(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, stage, full):
    options = {"stage": stage, "full_finetuning": full, "max_steps": 12, "learning_rate": 1e-3 if full else 5e-3}
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path / "run", tiny_tokenizer, **options)
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


def test_unified_stages_share_one_adapter(tiny_model, plan, rows, tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="unified"):
        make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, stage="unified")
    model = tiny_model("llama")
    same = PruningPlan.empty(model, prefill=StagePlan((2, 3)), decode=StagePlan((2, 3)), kv=plan.kv)
    trainer = make_trainer(model, same, rows, tmp_path, tiny_tokenizer, stage="unified", max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert list(trainer.model.peft_config) == ["unified"]
    assert trainer.evaluate()["eval_loss"] < before
    assert_exports_one_model(trainer, rows, tmp_path / "stages")


def test_exported_configs_are_the_dense_models(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    before = tiny_llama.config.to_dict()
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "stages"))
    for stage in ("prefill", "decode"):
        exported = json.loads((tmp_path / "stages" / stage / "config.json").read_text())
        changed = {key for key, value in exported.items() if before.get(key) != value}
        # A config that has never been saved names no class.
        assert changed - {"architectures"} == {"num_hidden_layers", "pdprune"}
        assert exported["architectures"] == ["LlamaForCausalLM"]


def test_unified_stages_share_all_weights(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    same = replace(plan, prefill=plan.decode)
    trainer = make_trainer(
        tiny_llama, same, rows, tmp_path, tiny_tokenizer, stage="unified", full_finetuning=True, learning_rate=1e-3
    )
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


def test_adapters_of_an_earlier_training_go_on(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    first = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, stage="prefill")
    first.train()
    expected = adapters_of(first)
    second = make_trainer(first.model, plan, rows, tmp_path, tiny_tokenizer, stage="decode")
    assert [stage.adapter for stage in second.stages()] == ["prefill", "decode"]
    second.train()
    there = dict(second.model.named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(there[name], tensor) and not there[name].requires_grad


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
        {"removal_fade_steps": 1},
    ],
    ids=lambda options: "+".join(options),
)
def test_more_options_of_the_loss_are_read(tiny_model, plan, rows, tmp_path, tiny_tokenizer, options):
    def first_loss(**options):
        trainer = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
        return trainer.evaluate()["eval_loss"]

    without_last = dict(list(options.items())[:-1])
    assert first_loss(**options) != pytest.approx(first_loss(**without_last), rel=1e-4)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"logits_chunk_tokens": 3}])
def test_what_saves_memory_changes_no_step(tiny_model, plan, rows, tmp_path, tiny_tokenizer, options):
    runs = []
    for given in ({"logits_chunk_tokens": 0}, options):
        trainer = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, optim="sgd", **given)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_rounds_choose_with_what_is_healed(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    options = {"removal_rounds": 2, "search_in_rounds": True, "round_search_examples": 6, "max_steps": 6}
    trainer = make_trainer(tiny_llama, plan, rows, tmp_path, tiny_tokenizer, **options)
    trainer.train()
    first, last = trainer.removal.plans
    assert len(last.decode.removed_blocks) == 2 and set(first.decode.removed_blocks) < set(last.decode.removed_blocks)
    assert trainer.plan == last


# Data sets


def chat(n):
    roles = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": f"answer {n}"}]
    return {"messages": roles + [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no more"}]}


def test_messages_with_assistant_only_loss(tiny_llama, plan, tmp_path, tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    data = Dataset.from_list([chat(n) for n in range(4)])
    trainer = make_trainer(tiny_llama, plan, data, tmp_path, tiny_tokenizer, assistant_only_loss=True, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    said = tiny_tokenizer.decode(batch["completion_ids"][0][batch["labels"][0] != -100])
    assert said.startswith("answer") and said.endswith("no more<|im_end|>") and "and?" not in said
    assert "and?" in tiny_tokenizer.decode(batch["completion_ids"][0])
    trainer.train()
    assert losses(trainer)[0] > 0


def test_streaming(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    trainer = make_trainer(tiny_llama, plan, rows.to_iterable_dataset(), tmp_path, tiny_tokenizer, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": [5, 6, 7]}], "has 1 row"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}] * 3, "row 0 has no completion token"),
    ],
)
def test_bad_data_is_an_error_before_training(tiny_llama, plan, tmp_path, tiny_tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_llama, plan, Dataset.from_list(data), tmp_path, tiny_tokenizer)


def test_adapter_without_a_block_of_the_stage_is_an_error(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[3])
    with pytest.raises(ValueError, match="touches no block"):
        PDPruneTrainer(
            tiny_llama,
            plan,
            args=PDPruneConfig(str(tmp_path), use_cpu=True),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            peft_config=config,
        )


def test_padding_changes_nothing(tiny_llama, plan, tmp_path, tiny_tokenizer):
    generator = torch.Generator().manual_seed(1)
    data = [
        {
            "input_ids": (ids := torch.randint(3, 240, (n,), generator=generator).tolist()),
            "labels": [-100] * p + ids[p:],
        }
        for n, p in ((24, 16), (9, 2), (30, 29), (14, 12))
    ]
    trainer = make_trainer(tiny_llama, plan, Dataset.from_list(data), tmp_path, tiny_tokenizer)
    together = trainer.compute_loss(trainer.model, trainer.data_collator(data), num_items_in_batch=1)
    alone = sum(trainer.compute_loss(trainer.model, trainer.data_collator([r]), num_items_in_batch=1) for r in data)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# What people watch


def test_metrics_early_stopping_and_best_model(tiny_llama, plan, rows, tmp_path, tiny_tokenizer):
    seen = []

    def compute_metrics(prediction):
        (logits, dense), labels = prediction
        mask = labels != -100
        seen.append(logits.shape)
        assert logits.shape == dense.shape and logits.shape[:2] == labels.shape
        return {"agreement": float((logits.argmax(-1) == dense.argmax(-1))[mask].mean())}

    args = PDPruneConfig(
        str(tmp_path),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kl",
        greater_is_better=False,
        learning_rate=0.0,
        removal_rounds=2,
        report_to="none",
        use_cpu=True,
        lora_rank=4,
        include_for_metrics=["teacher"],
    )
    trainer = PDPruneTrainer(
        tiny_llama,
        plan,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tiny_tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=1e-3)],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_kl" in entry]
    assert seen and all({"eval_agreement", "eval_prefill_kl", "eval_perplexity"} <= set(entry) for entry in entries)
    assert entries[-1]["eval_agreement"] == pytest.approx(entries[-1]["eval_top1_agreement"])
    # The evaluation before the last round (fewer blocks missing, so better) is not the best one.
    assert trainer.state.best_global_step == 4 and trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize("trained", [False, True])
def test_fitted_layers_are_trained_on_only_where_asked_for(tiny_model, plan, rows, tmp_path, tiny_tokenizer, trained):
    def lora_of(trainer):
        return {name[name.index("layers.") :]: p for name, p in trainer.model.named_parameters() if "lora" in name}

    options = {"local_distillation_tokens": 384, "train_fitted_layers": trained}
    options |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    whole.train()
    fixed = {name for name, p in lora_of(whole).items() if not p.requires_grad}
    fitted = {
        f"layers.{block}.mlp.{name}_proj.lora_{part}.{stage}.weight"
        for block, stage in ((2, "prefill"), (4, "prefill"), (1, "decode"), (4, "decode"))
        for name in ("gate", "up", "down")
        for part in "AB"
    }
    assert fixed == (set() if trained else fitted)
    resumed = make_trainer(tiny_model("llama"), plan, rows, tmp_path, tiny_tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in lora_of(resumed).items():
        torch.testing.assert_close(parameter, lora_of(whole)[name], msg=name)
        assert parameter.requires_grad == (name not in fixed)
