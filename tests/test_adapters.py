import pytest
import torch
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import active_adapter, adapter_layers, adapter_parameters, merged_state_dict


@pytest.fixture
def model(tiny_llama):
    """Two adapters that both learn and both do something; decode has none in block 2."""
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "prefill").eval()
    model.add_adapter("decode", LoraConfig(r=3, target_modules=r".*layers\.[01345]\..*(q_proj|up_proj)"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.requires_grad_(True)
    return model


def logits_of(model):
    input_ids, mask = random_prompts([10])
    return model(input_ids=input_ids, attention_mask=mask).logits


def state_of(model):
    layers = adapter_layers(model).values()
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [(layer.active_adapters, layer.disable_adapters) for layer in layers], grads


class TestActiveAdapter:
    def test_selects_the_adapter(self, model):
        seen = {}
        for adapter in ("prefill", "decode", None):
            with active_adapter(model, adapter):
                seen[adapter] = logits_of(model)
        assert all((seen[a] - seen[b]).abs().max() > 1e-2 for a, b in [("prefill", "decode"), ("prefill", None)])
        with model.disable_adapter():
            assert torch.equal(logits_of(model), seen[None])
        for adapter in ("prefill", "decode"):
            model.set_adapter(adapter)
            assert torch.equal(logits_of(model), seen[adapter])

    @pytest.mark.parametrize("adapter", ["prefill", "decode", None])
    def test_leaves_requires_grad_alone_and_restores(self, model, adapter):
        before = state_of(model)
        with active_adapter(model, adapter):
            assert state_of(model)[1] == before[1]
        assert state_of(model) == before
        with pytest.raises(KeyError), active_adapter(model, adapter):
            raise KeyError
        assert state_of(model) == before

    def test_contexts_nest(self, model):
        before = state_of(model)
        with active_adapter(model, "decode"):
            decode = logits_of(model)
            with active_adapter(model, None), active_adapter(model, "prefill"):
                assert not torch.equal(logits_of(model), decode)
            assert torch.equal(logits_of(model), decode)
        assert state_of(model) == before

    def test_both_adapters_learn_in_one_step(self, model):
        with active_adapter(model, "prefill"):
            loss = logits_of(model).sum()
        with active_adapter(model, "decode"):
            loss = loss + logits_of(model).sum()
        loss.backward()
        for adapter in ("prefill", "decode"):
            assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model, adapter).values())

    def test_unknown_adapters(self, model, tiny_model):
        before = state_of(model)
        with pytest.raises(ValueError, match="no adapter 'unified'"), active_adapter(model, "unified"):
            pytest.fail("the context was entered")
        assert state_of(model) == before
        dense = tiny_model("llama")
        with pytest.raises(ValueError, match="no adapter 'decode'"), active_adapter(dense, "decode"):
            pytest.fail("the context was entered")
        with active_adapter(dense, None):
            logits_of(dense)


class TestParts:
    def test_adapter_layers(self, model, tiny_model):
        names = [name.removeprefix("base_model.model.model.layers.") for name in adapter_layers(model)]
        assert names == [f"{block}.{name}" for block in range(6) for name in ("self_attn.q_proj", "mlp.up_proj")]
        assert adapter_layers(tiny_model("llama")) == {}

    def test_adapter_parameters(self, model):
        prefill, decode = adapter_parameters(model, "prefill"), adapter_parameters(model, "decode")
        assert (len(prefill), len(decode)) == (24, 20)
        assert not prefill.keys() & decode.keys()
        assert adapter_parameters(model, "pre") == {}

    def test_parameters_of_adapted_embeddings(self, tiny_llama):
        model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["embed_tokens"]), "decode")
        assert len(adapter_parameters(model, "decode")) == 2
        state_dict = merged_state_dict(model, "decode")
        assert list(state_dict) == list(merged_state_dict(model, None))

    @pytest.mark.parametrize("values", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=str)
    def test_what_is_no_adapter_of_a_layer_is_refused(self, tiny_llama, values):
        model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], **values), "decode")
        with pytest.raises(ValueError, match="modules_to_save and trainable_token_indices"):
            merged_state_dict(model, "decode")
        with pytest.raises(ValueError, match="modules_to_save"), active_adapter(model, None):
            pytest.fail("the context was entered")

    def test_dense_weights_with_an_adapter_merged_into_them_are_refused(self, model):
        before = merged_state_dict(model, "decode")
        model.merge_adapter(["prefill"])
        with pytest.raises(ValueError, match="adapter 'prefill' is merged into the dense weights"):
            merged_state_dict(model, "decode")
        with pytest.raises(ValueError, match="unmerge_adapter"), active_adapter(model, "decode"):
            pytest.fail("the context was entered")
        model.unmerge_adapter()
        for name, tensor in merged_state_dict(model, "decode").items():
            torch.testing.assert_close(tensor, before[name])


class TestMergedStateDict:
    def test_only_adapted_weights_are_new(self, model):
        dense = dict(model.get_base_model().named_parameters())
        for adapter, adapted in (("prefill", 12), ("decode", 10), (None, 0)):
            merged = merged_state_dict(model, adapter)
            new = [
                name
                for name, tensor in merged.items()
                if tensor.data_ptr() not in {parameter.data_ptr() for parameter in dense.values()}
            ]
            assert len(new) == adapted
            assert all(name.endswith(("q_proj.weight", "up_proj.weight")) for name in new)

    def test_weights_and_state_are_as_before(self, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state, logits = state_of(model), logits_of(model)
        merged_state_dict(model, "prefill")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert state_of(model) == state
        assert torch.equal(logits_of(model), logits)

    def test_of_the_wrapped_model_and_of_a_plain_one(self, model, tiny_model):
        for name, tensor in merged_state_dict(model.get_base_model(), "decode").items():
            assert torch.equal(tensor, merged_state_dict(model, "decode")[name])
        dense = tiny_model("llama")
        merged = merged_state_dict(dense, None)
        assert list(merged) == list(dense.state_dict())
        assert all(merged[name] is not None and torch.equal(merged[name], t) for name, t in dense.state_dict().items())
