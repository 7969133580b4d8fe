import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_pdprune.evaluation.dense_model_of_pair import check_dense_model, load_dense_model, load_tokenizer
from hf_pdprune.hub import export_stages
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer.learned_stages import export_learned_stages


def plan_of(model):
    return PruningPlan.empty(model, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    export_stages(tiny_llama, plan_of(tiny_llama), tmp_path / "pair")
    return tmp_path


def test_another_dense_model_is_told_from_the_pairs_own(tiny_llama, tiny_model, adapted, folder):
    adapters = {stage: stage for stage in ("prefill", "decode")}
    export_stages(adapted(tiny_llama), plan_of(tiny_llama), folder / "healed", adapters=adapters)
    own = AutoModelForCausalLM.from_pretrained(folder / "dense")
    finetuned = AutoModelForCausalLM.from_pretrained(folder / "dense")
    with torch.no_grad():
        finetuned.model.layers[3].mlp.up_proj.weight += 2e-2  # a tenth of what is there; the embeddings are the same
    for pair in ("pair", "healed"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_dense_model(own.to(dtype), "own", folder / pair)
        for other in (tiny_model("llama", seed=1), finetuned):
            with pytest.raises(ValueError, match="^some-8B is not the dense model of .*: its weights differ"):
                check_dense_model(other, "some-8B", folder / pair)


def test_a_stage_that_learned_as_a_whole_is_not_taken_for_the_dense_model(tiny_llama, tiny_model, folder):
    learned, plan = tiny_model("llama", seed=1), plan_of(tiny_llama)
    stages = PrefillStage(tiny_llama.requires_grad_(False), plan), DecodeStage(learned, plan)
    export_learned_stages(stages, plan, folder / "finetuned")
    check_dense_model(tiny_llama, "dense", folder / "finetuned")
    with pytest.raises(ValueError, match="its weights differ"):
        check_dense_model(learned, "learned", folder / "finetuned")


def test_what_does_not_say_from_which_model_it_was_made_is_accepted(tiny_llama, tiny_model, folder):
    other = tiny_model("llama", seed=1)
    plan_of(tiny_llama).save_pretrained(folder / "plan")
    check_dense_model(other, "other", folder / "plan")
    for stage in ("prefill", "decode"):  # as older versions have written it
        path = folder / "pair" / stage / "config.json"
        config = json.loads(path.read_text())
        del config["pdprune"]["dense_fingerprint"]
        path.write_text(json.dumps(config))
    check_dense_model(other, "other", folder / "pair")


def test_a_model_that_is_not_there_is_named(tmp_path):
    for load in (load_dense_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"model '{tmp_path}/none': "):
            load(f"{tmp_path}/none")
