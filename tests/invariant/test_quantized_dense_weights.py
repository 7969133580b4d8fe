"""QLoRA: dense weights of 4 or 8 bits, and stages that are ordinary checkpoints all the same."""

from dataclasses import replace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_pdprune.adapters import active_adapter, dense_weight, merged_state_dict
from hf_pdprune.hub import load_stages
from hf_pdprune.inference import disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.search.gap_fit import GapFit
from hf_pdprune.search.gap_regression import GapRegression, Gaps
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer
from hf_pdprune.trainer.adapted_model import learning_copy
from hf_pdprune.trainer.sharding import check_fsdp


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.invariant

QUANTIZATIONS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4 bits, scales too": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


@pytest.fixture
def quantized(tiny_model, tmp_path):
    def make(architecture="llama", quantization="4 bits"):
        tiny_model(architecture).save_pretrained(tmp_path / "dense")
        config = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", dtype=torch.float32, quantization_config=config
        ).eval()

    return make


@torch.no_grad()
def logits_of(model):
    input_ids, mask = random_prompts([12, 5])
    return model(input_ids=input_ids, attention_mask=mask).logits[mask.bool()]


def adapted(model, **options):
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options), "decode")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # without and with biases
def test_merging_gives_what_is_applied(quantized, tiny_model, architecture, quantization):
    model = adapted(quantized(architecture, quantization))
    for adapter in ("decode", None):
        with active_adapter(model, adapter):
            applied = logits_of(model)
        plain = tiny_model(architecture, seed=1)
        plain.load_state_dict(merged_state_dict(model, adapter))
        torch.testing.assert_close(logits_of(plain), applied, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged_says_so(quantized):
    model = adapted(quantized(), use_dora=True)
    with pytest.raises(ValueError, match=r"'decode' cannot be merged into the quantised weight .*q_proj"):
        merged_state_dict(model, "decode")


def test_8_bits_have_the_dtype_of_the_model(tiny_model, tmp_path):
    # Their layers quantise what they read, too: no equality, as with 4 bits.
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    merged = merged_state_dict(adapted(model), "decode")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    plain = tiny_model("llama")
    for name, tensor in merged_state_dict(model, None).items():
        original = plain.state_dict()[name]
        assert (tensor.float() - original).abs().max() < 0.02 * original.abs().max(), name


def test_weights_that_are_packed_for_a_forward_on_a_cpu(quantized):
    # bitsandbytes does that where the CPU has bfloat16 instructions.
    layer = quantized().model.layers[0].self_attn.q_proj
    before = dense_weight(layer)
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    torch.testing.assert_close(dense_weight(layer).float(), before, atol=0, rtol=0.01)  # scales in bfloat16


def test_what_cannot_be_quantised_says_so(quantized):
    model = quantized()
    with pytest.raises(ValueError, match="full_finetuning needs weights that can learn"):
        learning_copy(model)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    with pytest.raises(ValueError, match="not sharded by FSDP"):
        check_fsdp(plugin, model)


def test_a_fit_is_that_of_the_dequantised_model(quantized, tiny_model):
    model, plain = quantized(), tiny_model("llama")
    plain.load_state_dict(merged_state_dict(model, None))
    generator = torch.Generator().manual_seed(0)
    input_ids = [torch.randint(3, 240, (4, 48), generator=generator) for _ in range(4)]
    fits = [GapRegression(m, input_ids).fit(2, Gaps((), (3,)), 64) for m in (model, plain)]
    assert all(isinstance(fit, GapFit) and fit.neurons is not None for fit in fits)
    assert torch.equal(fits[0].neurons.chosen, fits[1].neurons.chosen)
    results = []
    for m, fit in zip((model, plain), fits, strict=True):
        with fit.active(m.model.layers, 2):
            results.append(logits_of(m))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits_of(model), logits_of(plain), atol=1e-4, rtol=1e-4)  # as before


@pytest.mark.parametrize("projected", [(), (1,)], ids=["strict", "relaxed"])
def test_trained_stages_are_exported_as_ordinary_checkpoints(quantized, tmp_path, tiny_tokenizer, projected):
    model = quantized()
    plan = PruningPlan.empty(model, "tiny", decode=StagePlan((2, 3)), kv=KVPlan((4,), 2, 4))
    plan = replace(plan, prefill=StagePlan((3,), (), projected))
    generator = torch.Generator().manual_seed(0)
    rows = Dataset.from_list(
        [{"input_ids": torch.randint(3, 240, (24,), generator=generator).tolist()} for _ in range(8)]
    )
    before = dense_weight(model.model.layers[0].mlp.down_proj).clone()
    trainer = PDPruneTrainer(
        model,
        plan,
        args=PDPruneConfig(
            str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lora_rank=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            local_distillation_tokens=192,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer,
    )
    unhealed = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.9 * unhealed
    assert torch.equal(dense_weight(trainer.model.get_base_model().model.layers[0].mlp.down_proj), before)
    # trl has adapters of quantised models learn in bfloat16, in which they compute, too, until they are merged.
    for parameter in trainer.model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    trainer.save_model(str(tmp_path / "pair"))
    stages = load_stages(tmp_path / "pair")
    for stage in stages:
        assert not hasattr(stage.model.config, "quantization_config")
        assert {parameter.dtype for parameter in stage.model.parameters()} == {torch.float32}
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.model.eval()
    with torch.no_grad():
        expected = disaggregated_forward(*trainer.stages(), batch)
        actual = disaggregated_forward(*stages, batch)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
