import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback


OF_STAGES = {f"{stage}_{what}" for stage in ("prefill", "decode") for what in ("kl", "perplexity", "blocks")}
OF_BOTH = {"loss", "kl", "perplexity", "top1_agreement"}


def test_a_loss_of_ones_own_is_refused(tiny_llama, make_trainer):
    with pytest.raises(ValueError, match="compute_loss_func is not supported"):
        make_trainer(tiny_llama, compute_loss_func=lambda *args, **kwargs: 0.0)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_padding_to_a_multiple_changes_no_loss(tiny_model, make_trainer, rows, first_token):
    options = {"local_distillation_tokens": 0, "hidden_matching_weight": 0.5, "first_token": first_token}
    plain = make_trainer(tiny_model("llama"), **options).evaluate()["eval_loss"]
    trainer = make_trainer(tiny_model("llama"), pad_to_multiple_of=16, **options)
    batch = trainer.data_collator([rows[0], rows[1]])
    assert all(tensor.shape[1] % 16 == 0 for tensor in batch.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


@pytest.fixture
def two_sets(rows):
    return {"a": rows.select(range(4)), "b": rows.select(range(4, 8))}


def test_each_evaluation_has_metrics_of_its_own_rows(tiny_llama, make_trainer, rows, two_sets):
    trainer = make_trainer(tiny_llama, eval_dataset=two_sets)
    alone = {name: trainer.evaluate(dataset)["eval_kl"] for name, dataset in two_sets.items()}
    assert alone["a"] != pytest.approx(alone["b"], rel=1e-3)
    predicted = trainer.predict(two_sets["b"]).metrics
    assert {f"test_{name}" for name in OF_STAGES | OF_BOTH} <= set(predicted)
    assert predicted["test_kl"] == pytest.approx(alone["b"])
    assert trainer.evaluate(two_sets["a"])["eval_kl"] == pytest.approx(alone["a"])
    both = trainer.evaluate()
    assert {f"eval_{dataset}_{name}" for dataset in "ab" for name in OF_STAGES | OF_BOTH} <= set(both)
    assert {name: both[f"eval_{name}_kl"] for name in "ab"} == pytest.approx(alone)
    assert trainer.evaluate(two_sets["a"], metric_key_prefix="held_out")["held_out_kl"] == pytest.approx(alone["a"])


def test_an_evaluation_that_was_cut_short_leaves_nothing(tiny_llama, make_trainer, two_sets, monkeypatch):
    trainer = make_trainer(tiny_llama)
    expected = trainer.evaluate(two_sets["a"])["eval_kl"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "gather_function", lambda losses: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(two_sets["b"])
    assert trainer.evaluate(two_sets["a"])["eval_kl"] == pytest.approx(expected)


def test_a_metric_of_one_set_can_choose_the_best_model(tiny_llama, make_trainer, two_sets):
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_kl", "local_distillation_tokens": 0}
    trainer = make_trainer(tiny_llama, eval_dataset=two_sets, max_steps=3, **often, **best)
    trainer.train()
    lowest = min(entry["eval_a_kl"] for entry in trainer.state.log_history if "eval_a_kl" in entry)
    assert trainer.evaluate()["eval_a_kl"] == pytest.approx(lowest, rel=1e-5) == trainer.state.best_metric


def test_predictions_are_of_the_rows_that_evaluation_takes_in_their_order(tiny_llama, make_trainer):
    texts = Dataset.from_list([{"prompt": "the quick", "completion": " fox" * n} for n in range(1, 5)])
    trainer = make_trainer(tiny_llama, train_dataset=texts, shuffle_dataset=True)
    predictions, labels, metrics = trainer.predict(texts)
    assert (labels != -100).sum(-1).tolist() == [4 * n + 1 for n in range(1, 5)]  # and the end of the text
    assert predictions.shape[:2] == labels.shape
    assert metrics["test_kl"] == pytest.approx(trainer.evaluate(texts)["eval_kl"], rel=1e-5)


def test_metrics_early_stopping_and_best_model(tiny_llama, make_trainer, rows):
    seen = []

    def compute_metrics(prediction):
        (logits, dense), labels = prediction
        mask = labels != -100
        seen.append(logits.shape)
        assert logits.shape == dense.shape and logits.shape[:2] == labels.shape
        return {"agreement": float((logits.argmax(-1) == dense.argmax(-1))[mask].mean())}

    trainer = make_trainer(
        tiny_llama,
        eval_dataset=rows.select(range(4)),
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=1e-3)],
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kl",
        greater_is_better=False,
        learning_rate=0.0,
        removal_rounds=2,
        include_for_metrics=["teacher"],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_kl" in entry]
    assert seen and all({"eval_agreement", "eval_prefill_kl", "eval_perplexity"} <= set(entry) for entry in entries)
    assert entries[-1]["eval_agreement"] == pytest.approx(entries[-1]["eval_top1_agreement"])
    # The evaluation before the last round (fewer blocks missing, so better) is not the best one.
    assert trainer.state.best_global_step == 4 and trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


def test_the_model_of_the_lowest_kl_is_loaded_at_the_end(tiny_llama, make_trainer):
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl"}
    trainer = make_trainer(tiny_llama, local_distillation_tokens=0, **often, **best)
    trainer.train()
    lowest = min(entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(lowest, rel=1e-5) == trainer.state.best_metric
