import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.hub import export_stages, load_adapters, load_stages, save_adapters
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained(tiny_model):
    """A model with two adapters, whose effect is large, and its plan."""
    dense = tiny_model("llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stages = {"prefill": StagePlan((2,)), "decode": StagePlan((2, 4)), "kv": KVPlan((0, 3), 2, 4)}
    plan = PruningPlan.empty(dense, "tiny", **stages)
    model = get_peft_model(dense, config, "prefill")
    model.add_adapter("decode", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), plan


@pytest.fixture
def folders(trained, tiny_model, tmp_path):
    """The dense model and the adapters, each in a folder."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    save_adapters(*trained, tmp_path / "adapters")
    return tmp_path / "dense", tmp_path / "adapters"


def generated(prefill, decode):
    payload = prefill(IDS, torch.ones_like(IDS), do_sample=False)
    return decode.generate(payload, max_new_tokens=8, do_sample=False)


def test_both_stages_from_one_copy_of_the_weights(trained, folders, tmp_path):
    model, plan = trained
    expected = generated(PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode"))
    prefill, decode = load_stages(*folders)
    assert prefill.model is decode.model
    assert torch.equal(generated(prefill, decode), expected)
    export_stages(model, plan, tmp_path / "pair", {"prefill": "prefill", "decode": "decode"})
    exported = load_stages(tmp_path / "pair")
    assert prefill.fingerprint == exported[0].fingerprint  # views and checkpoints can be mixed
    assert torch.equal(generated(prefill, exported[1]), expected)


def test_exported_elsewhere_from_adapters_and_base(trained, folders, tiny_model, tmp_path):
    model, plan = trained
    other, there, names = load_adapters(tiny_model("llama"), folders[1])
    assert there == plan and names == {"prefill": "prefill", "decode": "decode"}
    export_stages(model, plan, tmp_path / "here", names)
    export_stages(other, there, tmp_path / "there", names)
    for stage in names:
        files = [(tmp_path / where / stage / "model.safetensors").read_bytes() for where in ("here", "there")]
        assert files[0] == files[1]


def test_what_is_written(folders):
    dense, adapters = folders
    names = {str(path.relative_to(adapters)) for path in adapters.rglob("*") if path.is_file()}
    for stage in ("prefill", "decode"):
        assert {f"{stage}/adapter_config.json", f"{stage}/adapter_model.safetensors"} <= names
    assert "pruning_plan.json" in names and not [name for name in names if name.endswith((".bin", ".pt"))]


def test_weights_can_be_read_by_whom_the_config_can(folders):
    for stage in ("prefill", "decode"):
        assert len({path.stat().st_mode for path in (folders[1] / stage).iterdir()}) == 1


def test_stage_without_adapter(folders):
    shutil.rmtree(folders[1] / "prefill")
    prefill, decode = load_stages(*folders)
    assert (prefill.adapter, decode.adapter) == (None, "decode")
    shutil.rmtree(folders[1] / "decode")
    with pytest.raises(FileNotFoundError, match=r"no prefill/adapter_config.json or decode/adapter_config.json"):
        load_stages(*folders)


def test_one_adapter_for_both_stages(trained, folders, tmp_path):
    model, plan = trained
    same = replace(plan, prefill=plan.decode)
    save_adapters(model, same, folders[1], {"unified": "decode"})
    assert {path.name for path in folders[1].iterdir()} == {"unified", "pruning_plan.json"}
    prefill, decode = load_stages(*folders)
    assert prefill.model is decode.model and (prefill.adapter, decode.adapter) == ("unified", "unified")
    export_stages(model, same, tmp_path / "pair", {"unified": "decode"}, layout=("unified",))
    exported = load_stages(tmp_path / "pair")
    assert prefill.fingerprint == exported[0].fingerprint
    assert torch.equal(generated(prefill, decode), generated(*exported))
    with pytest.raises(ValueError, match="a unified model needs a plan"):
        save_adapters(model, plan, folders[1], {"unified": "decode"})
    with pytest.raises(ValueError, match="unified and prefill are both for the prefill stage"):
        save_adapters(model, same, folders[1], {"unified": "decode", "prefill": "prefill"})


def test_what_is_no_adapter_is_not_replaced(trained, tmp_path):
    model, plan = trained
    export_stages(model, plan, tmp_path)
    before = (tmp_path / "decode" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="prefill holds files but no adapter_config.json"):
        save_adapters(model, plan, tmp_path)
    assert (tmp_path / "decode" / "model.safetensors").read_bytes() == before


def test_of_another_model(tiny_model, folders):
    with pytest.raises(ValueError, match="the plan is for tiny"):
        load_adapters(tiny_model("llama", num_hidden_layers=5), folders[1])


def test_of_another_model_of_the_same_shape(trained, folders, tiny_model):
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="holds adapters of another dense model"):
        load_adapters(other, folders[1])
    load_adapters(tiny_model("llama").bfloat16(), folders[1])
    for stage in ("prefill", "decode"):  # as peft itself writes them
        trained[0].save_pretrained(folders[1], selected_adapters=[stage])
    load_adapters(other, folders[1])


def test_unknown_adapter(trained, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'x'"):
        save_adapters(*trained, tmp_path / "adapters", {"decode": "x"})
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping is not supported"),
    ],
)
def test_configs_are_checked(folders, entries, message):
    path = folders[1] / "decode" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(ValueError, match=message):
        load_stages(*folders)


def test_nothing_is_unpickled(folders):
    (folders[1] / "decode" / "adapter_model.safetensors").rename(folders[1] / "decode" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_stages(*folders)
