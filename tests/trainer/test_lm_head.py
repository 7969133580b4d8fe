import pytest
import torch

from hf_pdprune.trainer.decoder_forward import DecoderForward
from hf_pdprune.trainer.lm_head import LMHead


def test_decoder_and_head_make_the_logits_of_every_architecture(tiny_model, architecture):
    model = tiny_model(architecture, num_hidden_layers=3)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        hidden = DecoderForward(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        actual = LMHead(model)(hidden.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_model_is_restored_also_after_an_error(tiny_llama):
    decoder = tiny_llama.model
    with pytest.raises(RuntimeError):
        LMHead(tiny_llama)(torch.zeros(3, 7))  # not the hidden size
    assert tiny_llama.model is decoder


def test_gradient_flows_through_the_head(tiny_llama):
    hidden = torch.randn(4, 64, requires_grad=True)
    LMHead(tiny_llama)(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, tiny_llama.lm_head.weight.sum(0).expand(4, -1))
