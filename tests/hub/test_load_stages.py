import json
import shutil

import pytest
import torch

from hf_pdprune.hub import export_stages, load_stages
from hf_pdprune.plan import PruningPlan, StagePlan


def plan_of(model, prefill=(2,), decode=(2, 4)):
    return PruningPlan.empty(model, "tiny", prefill=StagePlan(prefill), decode=StagePlan(decode))


@pytest.fixture
def pair(tiny_llama, tmp_path):
    return export_stages(tiny_llama, plan_of(tiny_llama), tmp_path / "pair", max_shard_size="150KB")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["../../other.safetensors", "/elsewhere/other.safetensors", "model.bin", 3, ""])
def test_file_names_of_an_index_stay_in_the_folder(pair, name):
    edit(pair / "decode" / "model.safetensors.index.json", lambda data: data["weight_map"].update({"x": name}))
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        load_stages(pair)


def test_pickled_weights_are_not_read(pair):
    for path in (pair / "decode").glob("*.safetensors*"):
        path.unlink()
    torch.save({}, pair / "decode" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_stages(pair)


def test_what_would_run_code_is_refused(pair):
    with pytest.raises(ValueError, match="trust_remote_code is for a dense model"):
        load_stages(pair, trust_remote_code=True)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        load_stages(pair, use_safetensors=False)


def test_remote_code_is_not_run(pair):
    (pair / "decode" / "evil.py").write_text("raise SystemExit('ran')")
    edit(pair / "decode" / "config.json", lambda data: data.update(auto_map={"AutoConfig": "evil.C"}))
    load_stages(pair)  # the architecture's own class


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["pdprune"].update(extra=1), "unknown key 'extra'"),
        (lambda data: data["pdprune"]["plan"].update(num_hidden_layers="6"), "num_hidden_layers"),
        (lambda data: data.update(num_hidden_layers=5), "blocks"),
    ],
)
def test_configs_are_checked_before_weights_are_read(pair, change, message):
    edit(pair / "decode" / "config.json", change)
    for path in (pair / "decode").glob("*.safetensors"):
        path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=message):
        load_stages(pair)


def test_no_pair_on_the_hub_either(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no repos me/x-prefill and me/x-decode.*\(.*cached files"):
        load_stages("me/x", local_files_only=True)  # which says why: the Hub was not even asked


def test_stages_of_different_exports_are_refused(tiny_model, tmp_path):
    for seed in (0, 1):
        model = tiny_model("llama", seed=seed)
        export_stages(model, plan_of(model), tmp_path / str(seed))
    shutil.rmtree(tmp_path / "0" / "decode")
    with pytest.raises(FileNotFoundError, match="no decode stage"):
        load_stages(tmp_path / "0")
    shutil.copytree(tmp_path / "1" / "decode", tmp_path / "0" / "decode")
    with pytest.raises(ValueError, match="not of one pair"):
        load_stages(tmp_path / "0")


def test_stages_that_do_not_fit_the_plan_are_refused(tiny_llama, tmp_path):
    export_stages(tiny_llama, plan_of(tiny_llama), tmp_path)
    plan_of(tiny_llama, (1,), (1, 3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="exported with another plan"):
        load_stages(tmp_path)


def test_what_is_no_stage_checkpoint_is_refused(tiny_llama, tmp_path):
    export_stages(tiny_llama, plan_of(tiny_llama), tmp_path)
    shutil.rmtree(tmp_path / "decode")
    shutil.copytree(tmp_path / "prefill", tmp_path / "decode")
    with pytest.raises(ValueError, match="holds a prefill stage"):
        load_stages(tmp_path)
    shutil.rmtree(tmp_path / "decode")
    tiny_llama.save_pretrained(tmp_path / "decode")
    with pytest.raises(ValueError, match="not a stage checkpoint"):
        load_stages(tmp_path)
    with pytest.raises(FileNotFoundError, match="pruning_plan.json"):
        load_stages(tmp_path / "nothing")
