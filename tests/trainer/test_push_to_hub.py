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
    values |= {"should_save": should_save, "hub_revision": None} | args
    return SimpleNamespace(args=SimpleNamespace(**values), save_model=lambda folder: calls.append(folder))


def test_exports_and_pushes_both_stages(calls):
    args = {"hub_model_id": "me/tiny", "hub_private_repo": True, "hub_token": "secret", "hub_revision": "v1"}
    urls = PDPruneTrainer.push_to_hub(trainer(calls, **args), "done", collection=True)
    assert urls == {"prefill": "url"}
    expected = {"private": True, "revision": "v1", "commit_message": "done", "token": "secret", "collection": True}
    assert calls == ["outputs/mine", (("outputs/mine", "me/tiny"), expected)]


def test_arguments_of_the_call_come_first(calls):
    PDPruneTrainer.push_to_hub(trainer(calls, hub_revision="v1", hub_token="a"), token="b", revision="v2")
    assert calls[1][0][1] == "mine"
    assert (calls[1][1]["token"], calls[1][1]["revision"]) == ("b", "v2")


def test_one_rank_pushes(calls):
    assert PDPruneTrainer.push_to_hub(trainer(calls, should_save=False)) is None
    assert calls == ["outputs/mine"]  # every rank takes part in the export


def test_not_in_the_background(calls):
    with pytest.raises(ValueError, match="blocking"):
        PDPruneTrainer.push_to_hub(trainer(calls), blocking=False)
    assert calls == []
