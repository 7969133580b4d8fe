import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.evaluation.pair_source import PairSource
from hf_pdprune.hub import export_stages
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import PruningPlan, StagePlan


def plan_of(model, decode=(2, 4)):
    return PruningPlan.empty(model, "tiny", prefill=StagePlan((2,)), decode=StagePlan(decode))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    export_stages(tiny_llama, plan_of(tiny_llama), tmp_path / "pair")
    return tmp_path


def first_logits(stages, device="cpu"):
    prompt = torch.arange(3, 20)[None]
    with torch.no_grad():
        payload = stages[0].forward(prompt, torch.ones_like(prompt))
        return torch.cat(
            [payload.first_logits[:, None], stages[1].forward(payload, prompt, torch.ones_like(prompt))], 1
        )


def test_the_three_ways_give_the_same_pair(tiny_llama, folder):
    pair, dense = folder / "pair", str(folder / "dense")
    sources = [
        PairSource(str(pair)),
        PairSource(prefill=str(pair / "prefill"), decode=str(pair / "decode")),
        PairSource(dense, plan=str(pair)),
        PairSource(dense, plan=plan_of(tiny_llama)),
    ]
    expected = first_logits(
        (PrefillStage(tiny_llama, plan_of(tiny_llama)), DecodeStage(tiny_llama, plan_of(tiny_llama)))
    )
    for source in sources:
        torch.testing.assert_close(first_logits(source.load()), expected, atol=1e-5, rtol=1e-5)
    assert [source.tokenizer.name for source in sources] == [f"{pair}/prefill"] * 2 + [dense] * 2


def test_a_unified_model(tiny_llama, folder):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2,)))
    export_stages(tiny_llama, plan, folder / "one", layout=("unified",))
    unified = str(folder / "one" / "unified")
    expected = first_logits((PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan)))
    for source in (PairSource(str(folder / "one")), PairSource(prefill=unified, decode=unified)):
        prefill, decode = source.load()
        assert prefill.model is decode.model and source.tokenizer.name == unified
        torch.testing.assert_close(first_logits((prefill, decode)), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_unpickled(tiny_llama, folder):
    for path in (folder / "pair" / "decode").glob("*.safetensors"):
        path.unlink()
    torch.save(tiny_llama.state_dict(), folder / "pair" / "decode" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PairSource(prefill=str(folder / "pair" / "prefill"), decode=str(folder / "pair" / "decode")).load()


def test_file_names_of_an_index_stay_in_the_folder(folder):
    prefill, decode = folder / "pair" / "prefill", folder / "pair" / "decode"
    (decode / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../other.safetensors"}}
    (decode / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (PairSource(str(folder / "pair")), PairSource(prefill=str(prefill), decode=str(decode))):
        with pytest.raises(ValueError, match="no safetensors file beside it"):
            source.load()


def test_the_empty_plan_is_the_dense_model(tiny_llama, folder):
    prefill, decode = PairSource(str(folder / "dense"), plan="empty").load()
    assert prefill.model is decode.model and not prefill.bypassed and not decode.bypassed


def test_adapters_are_applied_by_stage(tiny_llama, folder):
    peft_model = get_peft_model(tiny_llama, LoraConfig(init_lora_weights=False, r=2), adapter_name="prefill")
    peft_model.add_adapter("decode", LoraConfig(init_lora_weights=False, r=2))
    peft_model.save_pretrained(folder / "adapters")
    plan = plan_of(tiny_llama)
    model = peft_model.get_base_model()
    expected = first_logits((PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode")))
    source = PairSource(str(folder / "dense"), plan=plan, adapters=str(folder / "adapters"))
    torch.testing.assert_close(first_logits(source.load()), expected, atol=1e-5, rtol=1e-5)
    without = first_logits(PairSource(str(folder / "dense"), plan=plan).load())
    assert (without - expected).abs().max() > 1e-3
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        PairSource(str(folder / "dense"), plan=plan, adapters=str(folder)).load()


def test_stages_that_do_not_belong_together_are_refused(tiny_llama, tiny_model, folder):
    prefill, decode = str(folder / "pair" / "prefill"), str(folder / "pair" / "decode")
    export_stages(tiny_llama, plan_of(tiny_llama, (2, 3)), folder / "other_plan")
    export_stages(tiny_model("llama", seed=1), plan_of(tiny_llama), folder / "other_model")
    for other, message in (("other_plan", "different plans"), ("other_model", "not of one pair")):
        with pytest.raises(ValueError, match=message):
            PairSource(prefill=prefill, decode=str(folder / other / "decode")).load()
    with pytest.raises(ValueError, match="is a decode stage"):
        PairSource(prefill=decode, decode=decode).load()
    with pytest.raises(ValueError, match="no stage checkpoint"):
        PairSource(prefill=str(folder / "dense"), decode=decode).load()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        PairSource(prefill=prefill, decode=str(folder / "nothing")).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either pretrained"),
        ({"prefill": "a"}, "decode= is missing"),
        ({"pretrained": "a", "prefill": "b", "decode": "c"}, "give either"),
        ({"prefill": "a", "decode": "b", "plan": "c"}, "goes with a dense model"),
        ({"pretrained": "a", "adapters": "b"}, "go with a dense model"),
    ],
)
def test_what_is_no_way_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PairSource(**values)
