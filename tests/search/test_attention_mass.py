import pytest
import torch

from hf_pdprune.search.attention_mass import AttentionMass


@torch.no_grad()
def test_it_is_the_attention_that_the_model_reports(tiny_model, calibration):
    model = tiny_model("llama")
    data = calibration(model, batch_size=1, prompt_tokens=(20, 30))  # one row a batch: no padding
    expected, queries = torch.zeros(6, dtype=torch.float64), 0
    model.set_attn_implementation("eager")
    for tensors in data.batches:
        width = tensors["prompt_ids"].shape[1]
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1)
        attentions = model(input_ids=ids, output_attentions=True).attentions
        for number, weights in enumerate(attentions):
            expected[number] += weights[0, :, width:, 2 : width - 5].sum(-1).mean(0).sum().double()
        queries += ids.shape[1] - width
    model.set_attn_implementation("sdpa")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    mass = AttentionMass.measure(model, data, 2, 5)
    assert mass.shares == pytest.approx((expected / queries).tolist(), abs=1e-6)
    padded = AttentionMass.measure(model, calibration(model, batch_size=4, prompt_tokens=(20, 30)), 2, 5)
    assert padded.shares == pytest.approx(mass.shares, abs=1e-5)
    assert model.config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_every_architecture_shows_its_attention(tiny_model, architecture, calibration):
    model = tiny_model(architecture)
    if architecture == "falcon":  # its eager attention cannot be switched on later
        with pytest.raises(ValueError, match="does not show all attention weights"):
            AttentionMass.measure(model, calibration(model), 1, 4)
        return
    shares = AttentionMass.measure(model, calibration(model, prompt_tokens=(20, 30)), 1, 4).shares
    sliding = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [False] * 6]
    assert all(0 < share < 1 for share, slides in zip(shares, sliding, strict=True) if not slides)


@torch.no_grad()
def test_an_attention_within_another_module_counts_once(tiny_model, calibration):
    model = tiny_model("llama", model_type="gpt_neo", attention_types=[[["global"], 6]])
    model.set_attn_implementation("eager")
    data = calibration(model, batch_size=1, count=2, prompt_tokens=(20, 21), completion_tokens=(40, 41))
    expected = torch.zeros(6)
    for tensors in data.batches:
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1)
        attentions = model(input_ids=ids, output_attentions=True).attentions
        expected += torch.stack([weights[0, :, 20:, 2:15].sum(-1).mean() for weights in attentions]) / 2
    assert AttentionMass.measure(model, data, 2, 5).shares == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_window_as_long_as_the_prompt_leaves_nothing_outside(tiny_llama, calibration):
    assert AttentionMass.measure(tiny_llama, calibration(tiny_llama), 16, 112).shares == (0,) * 6
