from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, KasaConfig, LoftQConfig, LoraConfig

from hf_pdprune.adapters import adapter_layers, name_without_adapters
from hf_pdprune.blocks import get_blocks
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.search import MergedPairs
from hf_pdprune.trainer import PDPruneConfig
from hf_pdprune.trainer.adapted_model import add_adapters, learning_copy


@pytest.fixture
def options(tmp_path):
    return lambda **given: PDPruneConfig(str(tmp_path), use_cpu=True, report_to="none", **{"lora_rank": 4} | given)


def lora(**given):
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **given)


@pytest.mark.parametrize(
    "rewriting",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
        {"kasa_config": KasaConfig()},
    ],
    ids=lambda given: str(list(given.values())[0]),
)
def test_an_adapter_that_rewrites_the_dense_weights_is_refused(tiny_llama, plan, options, rewriting):
    with pytest.raises(ValueError, match=f"{list(rewriting)[0]}.* rewrites the dense weights"):
        add_adapters(tiny_llama, plan, options(), lora(**rewriting))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_other_initialisations_leave_the_dense_weights(tiny_llama, plan, options, init):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    model = add_adapters(tiny_llama, plan, options(), lora(init_lora_weights=init))
    layers = adapter_layers(tiny_llama)
    after = {name_without_adapters(name, layers): tensor for name, tensor in tiny_llama.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(model.peft_config) == {"prefill", "decode"}


def test_adalora_is_not_fitted_in_closed_form(tiny_model, plan, options):
    config = AdaLoraConfig(target_modules=["down_proj"], total_step=4)
    with pytest.raises(ValueError, match="AdaLoRA and the like.* local_distillation_tokens=0"):
        add_adapters(tiny_model("llama"), plan, options(stage="decode"), config)
    assert add_adapters(tiny_model("llama"), plan, options(stage="decode", local_distillation_tokens=0), config)


def test_adapters_that_no_export_could_merge_are_refused(tiny_model, plan, options):
    with pytest.raises(ValueError, match="alora_invocation_tokens .* cannot be merged"):
        add_adapters(tiny_model("llama"), plan, options(), lora(alora_invocation_tokens=[5]))
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="embeddings are tied to its LM head"):
        add_adapters(tiny_model("llama", tie_word_embeddings=True), plan, options(), config)
    assert add_adapters(tiny_model("llama", tie_word_embeddings=False), plan, options(), config)


def test_all_weights_of_a_model_with_adapters_do_not_learn(tiny_llama, adapted):
    with pytest.raises(ValueError, match="full_finetuning needs the dense model itself"):
        learning_copy(adapted(tiny_llama))


def test_dora_is_not_fitted_in_closed_form(tiny_model, plan, options):
    with pytest.raises(ValueError, match="local_distillation_tokens=0"):
        add_adapters(tiny_model("llama"), plan, options(), lora(use_dora=True))
    assert add_adapters(tiny_model("llama"), plan, options(local_distillation_tokens=0), lora(use_dora=True))


def test_biases_of_the_dense_model_do_not_learn(tiny_llama, plan, options):
    with pytest.raises(ValueError, match="peft_config: bias='lora_only' trains biases of the dense model"):
        add_adapters(tiny_llama, plan, options(stage="decode"), lora(bias="lora_only"))


def test_a_bias_that_no_layer_can_take_is_refused(tiny_llama, tiny_model, plan, options):
    with pytest.raises(ValueError, match="lora_bias=True has no bias to be merged into"):
        add_adapters(tiny_llama, plan, options(), lora(lora_bias=True))
    model = tiny_model("qwen2")  # its queries have one
    plan = PruningPlan.empty(model, prefill=plan.prefill, decode=plan.decode)
    assert add_adapters(model, plan, options(), LoraConfig(target_modules=["q_proj"], lora_bias=True))


def test_an_adapter_that_is_there_must_be_what_is_asked_for(tiny_model, plan, options):
    def adapted(config=None, other_plan=None):
        return add_adapters(tiny_model("llama"), other_plan or plan, options(), config)

    add_adapters(adapted(), plan, options(), None)
    add_adapters(adapted(lora()), plan, options(), lora())
    with pytest.raises(ValueError, match="'prefill' leaves out 25 of the layers .* self_attn.k_proj of block 0"):
        add_adapters(adapted(lora()), plan, options(), None)
    with pytest.raises(ValueError, match="made by IA3Config, not by LoraConfig"):
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        add_adapters(adapted(config), plan, options(), None)
    shorter = replace(plan, decode=StagePlan((1, 2, 3)))  # block 1 of decode has no adapter then
    with pytest.raises(ValueError, match="'decode' leaves out 7 of the layers .* of block 1: .* another plan"):
        add_adapters(adapted(other_plan=shorter), plan, options(), None)
    model = adapted()
    assert set(add_adapters(model, shorter, options(), None).peft_config) == {"prefill", "decode"}
    assert not any("what_a_config_means" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("local_distillation_tokens", [0, 384])
def test_adapters_can_hold_what_a_merged_block_does(tiny_llama, options, local_distillation_tokens):
    text = list(torch.randint(3, 250, (16, 32), generator=torch.Generator().manual_seed(0)).split(8))
    pairs = MergedPairs.distil(tiny_llama, text, (2,), rank=4)
    plan = PruningPlan.empty(tiny_llama, decode=StagePlan(merged_blocks=((1, 2),)))
    model = add_adapters(tiny_llama, plan, options(local_distillation_tokens=local_distillation_tokens), None)
    ranks = [block.mlp.down_proj.r["decode"] for number, block in enumerate(get_blocks(model)) if number != 2]
    assert ranks == [4, tiny_llama.config.hidden_size, tiny_llama.config.hidden_size, 4, 4]  # 1 and 3 are beside 2
    pairs.start_adapter(model, "decode", plan.decode.merged_blocks)
    assert get_blocks(model)[1].mlp.gate_proj.get_delta_weight("decode").any()
