import pytest
import torch

from hf_pdprune.blocks import bypass_blocks
from hf_pdprune.trainer.decoder_forward import DecoderForward


@pytest.fixture
def inputs():
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@torch.no_grad()
def test_last_tokens_are_kept(tiny_llama, inputs):
    hidden = DecoderForward(tiny_llama)(**inputs).logits
    assert hidden.shape == (2, 9, 64)
    assert torch.equal(DecoderForward(tiny_llama)(**inputs, logits_to_keep=2).logits, hidden[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "gpt_neox"])
def test_scale_goes_from_the_block_to_its_absence(tiny_model, inputs, architecture):
    model = tiny_model(architecture)
    whole = DecoderForward(model)(**inputs).logits
    with bypass_blocks(model, [2]):
        without = DecoderForward(model)(**inputs).logits
    torch.testing.assert_close(DecoderForward(model, scales={2: 1.0})(**inputs).logits, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(DecoderForward(model, scales={2: 0.0})(**inputs).logits, without, atol=1e-5, rtol=1e-5)
    half = DecoderForward(model, scales={2: 0.5})(**inputs).logits
    assert 0.05 < (half - without).norm() / (whole - without).norm() < 0.95


@torch.no_grad()
def test_outputs_of_blocks_are_recorded(tiny_llama, inputs):
    forward = DecoderForward(tiny_llama, record=[1, 4])
    forward(**inputs)
    assert not any(block._forward_hooks for block in tiny_llama.model.layers)
    states = tiny_llama(**inputs, output_hidden_states=True).hidden_states
    assert sorted(forward.recorded) == [1, 4]
    for block, recorded in forward.recorded.items():
        torch.testing.assert_close(recorded, states[block + 1])
