from functools import partial
from types import SimpleNamespace

import pytest

from hf_pdprune.trainer import PDPruneTrainer, pdprune_trainer


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        pdprune_trainer,
        "push_stages_to_hub",
        lambda *args, **kwargs: calls.append((args, kwargs)) or {"prefill": "url"},
    )
    return calls


def trainer(calls, should_save=True, **args):
    values = {"output_dir": "outputs/mine", "hub_model_id": None, "hub_private_repo": None, "hub_token": None}
    values |= {"should_save": should_save, "hub_revision": None, "push_to_hub": False} | args
    made = SimpleNamespace(args=SimpleNamespace(**values), _export=calls.append)
    made._push = partial(PDPruneTrainer._push, made)
    return made


def test_exports_and_pushes_both_stages(calls):
    args = {"hub_model_id": "me/tiny", "hub_private_repo": True, "hub_token": "secret", "hub_revision": "v1"}
    urls = PDPruneTrainer.push_to_hub(trainer(calls, **args), "done", collection=True)
    assert urls == {"prefill": "url"}
    expected = {"private": True, "revision": "v1", "commit_message": "done", "token": "secret", "collection": True}
    assert calls == ["outputs/mine", (("outputs/mine", "me/tiny"), expected | {"tags": ()})]


def test_arguments_of_the_call_come_first(calls):
    args = {"hub_revision": "v1", "hub_token": "a", "hub_private_repo": True}
    PDPruneTrainer.push_to_hub(trainer(calls, **args), token="b", revision="v2", private=False)
    assert calls[1][0][1] == "mine" and calls[1][1]["commit_message"] == "End of training"
    assert (calls[1][1]["token"], calls[1][1]["revision"], calls[1][1]["private"]) == ("b", "v2", False)


def test_what_model_cards_say_can_be_given_as_to_any_trainer(calls):
    PDPruneTrainer.push_to_hub(trainer(calls), dataset_name="me/text", tags="mine")
    assert calls[1][1]["dataset_name"] == "me/text" and calls[1][1]["tags"] == ("mine",)


def test_one_rank_pushes(calls):
    assert PDPruneTrainer.push_to_hub(trainer(calls, should_save=False)) is None
    assert calls == ["outputs/mine"]  # every rank takes part in the export


def test_not_in_the_background(calls):
    with pytest.raises(ValueError, match="blocking"):
        PDPruneTrainer.push_to_hub(trainer(calls), blocking=False)
    assert calls == []


@pytest.mark.parametrize("option", [False, True])
def test_what_is_saved_goes_to_the_hub_where_the_option_says_so(calls, option):
    PDPruneTrainer.save_model(trainer(calls, push_to_hub=option), "outputs/stages")
    assert calls[0] == "outputs/stages" and len(calls) == 1 + option
    if option:
        assert calls[1][0] == ("outputs/stages", "mine") and calls[1][1]["commit_message"] == "Model save"


def test_training_itself_puts_nothing_on_the_hub(calls, make_trainer, tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: pytest.fail("Trainer asks the Hub"))
    own = make_trainer(tiny_llama, push_to_hub=True, max_steps=2, save_strategy="steps", save_steps=1)
    own.train()
    assert calls == [] and (tmp_path / "checkpoint-2").is_dir()
    own.save_model()
    assert [args for args, _ in calls] == [(str(tmp_path), tmp_path.name)]
