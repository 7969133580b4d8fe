from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import get_blocks
from hf_pdprune.search.mlp_neurons import MLPNeurons, linear_layers, mlp_path, neuron_rows


IDS = torch.arange(3, 15).view(1, 12)


def neurons_of(model, number):
    with torch.no_grad(), active_adapter(model, None):
        return MLPNeurons.find(get_blocks(model)[number], partial(model, input_ids=IDS, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"])
def test_neurons_are_found(tiny_model, name):
    model = tiny_model(name)
    block, neurons = get_blocks(model)[1], neurons_of(model, 1)
    hidden = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        features = neurons.features(hidden)
        expected = block.mlp(block.post_attention_layernorm(hidden))
    torch.testing.assert_close(features @ neurons.columns, expected)
    parts = 2 if name == "phi3" else 1
    for layer in neurons.input_layers.values():
        rows = neuron_rows(layer, len(neurons.columns))
        assert rows.shape == (parts, len(neurons.columns), model.config.hidden_size)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_layers_with_bias_are_refused(tiny_model, name):
    assert neurons_of(tiny_model(name), 1) is None


def test_an_mlp_that_is_given_the_residual_stream_too_is_refused(tiny_model):
    model = tiny_model("gpt2", model_type="mpt", d_model=64, n_heads=4, max_seq_len=64, expansion_ratio=2)
    assert neurons_of(model, 1) is None


def test_features_that_are_not_made_one_by_one_are_refused(tiny_llama):
    mlp = tiny_llama.model.layers[1].mlp
    mlp.act_fn = torch.nn.Softmax(dim=-1)
    mlp.act_fn.forward = lambda hidden: hidden.softmax(-1).cumsum(-1)
    assert neurons_of(tiny_llama, 1) is None


def test_an_adapted_block_gives_its_dense_neurons(tiny_llama):
    dense = neurons_of(tiny_llama, 1).columns.clone()
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_llama, config, adapter_name="stage").eval()
    neurons = neurons_of(model, 1)
    assert torch.equal(neurons.columns, dense)
    assert set(neurons.input_layers) == {"mlp.gate_proj", "mlp.up_proj"}


def test_scale_is_what_norms_differ_in(tiny_llama):
    own, other = neurons_of(tiny_llama, 1), neurons_of(tiny_llama, 2)
    own.norm.weight.data.uniform_(0.5, 2.0)
    other.norm.weight.data.uniform_(0.5, 2.0)
    hidden = torch.randn(1, 7, 64)
    with torch.no_grad():
        scale = other.scale_from(own, hidden)
        torch.testing.assert_close(scale, other.norm.weight / own.norm.weight)
        rows = neuron_rows(other.input_layers["mlp.up_proj"], len(other.columns))[0] * scale
        torch.testing.assert_close(
            own.norm(hidden) @ rows.T, other.norm(hidden) @ tiny_llama.model.layers[2].mlp.up_proj.weight.T
        )


def test_norms_of_other_kinds_have_no_scale(tiny_llama):
    own, other = neurons_of(tiny_llama, 1), neurons_of(tiny_llama, 2)
    other.norm = torch.nn.LayerNorm(64)
    with torch.no_grad():
        assert other.scale_from(own, torch.randn(1, 7, 64)) is None


def test_names_of_layers(tiny_model):
    assert list(linear_layers(get_blocks(tiny_model("llama"))[0]))[-1] == "mlp.down_proj"
    assert mlp_path(get_blocks(tiny_model("llama"))[0]) == "mlp"
    assert mlp_path(get_blocks(tiny_model("opt"))[0]) == ""
