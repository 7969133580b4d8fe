import pytest
import torch

from hf_pdprune.blocks import bypass_blocks
from hf_pdprune.kv.prompt_attention import PromptAttention
from hf_pdprune.kv.token_choice import heavy_hitters, observed, select_per_head


def test_heavy_hitters():
    attention = torch.tensor([[[0.0, 9, 1, 8, 0, 0, 0, 7], [5.0, 0, 0, 0, 4, 3, 9, 9]]])
    assert heavy_hitters(attention, 4).tolist() == [[[1, 3, 6, 7], [0, 4, 6, 7]]]
    assert heavy_hitters(attention, 8).tolist() == [[list(range(8))] * 2]


def test_observed_keeps_neighbours_together():
    attention = torch.zeros(1, 1, 20)
    attention[..., 6] = 1.0
    assert observed(attention, 7, 2, kernel=5).tolist() == [[[4, 5, 6, 7, 8, 18, 19]]]
    assert observed(attention, 3, 2, kernel=1).tolist() == [[[6, 18, 19]]]
    assert observed(attention, 2, 32).tolist() == [[[18, 19]]]


def test_what_the_last_tokens_get_of_each_other_does_not_spill_over():
    attention = torch.zeros(1, 1, 10)
    attention[..., 2], attention[..., 8:] = 0.1, 9.0
    assert observed(attention, 3, 2, kernel=3).tolist() == [[[1, 8, 9]]]


def test_padding_is_kept_last_and_in_every_head_alike():
    attention = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 5 + [1] * 3, [0] * 2 + [1] * 6, [1] * 8])
    short, enough, whole = observed(attention * mask[:, None], 5, 2, mask).tolist()
    assert short == [[0, 1, 5, 6, 7]] * 2
    assert all(len(set(head) & {0, 1}) == 0 for head in enough)
    assert enough[0][-2:] == whole[1][-2:] == [6, 7]


@pytest.mark.parametrize("kept", [0, 9])
def test_impossible_numbers(kept):
    with pytest.raises(ValueError, match=f"{kept} of 8 tokens"):
        heavy_hitters(torch.zeros(1, 1, 8), kept)


def test_selection_is_per_head():
    states = torch.arange(2 * 3 * 5 * 2.0).view(2, 3, 5, 2)
    columns = torch.tensor([[[0, 4], [1, 2], [3, 4]]]).expand(2, -1, -1)
    selected = select_per_head(states, columns)
    assert torch.equal(selected[1, 1], states[1, 1, 1:3])
    assert torch.equal(selected[0, 2], states[0, 2, 3:])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_attention_is_recorded_and_the_model_restored(tiny_model, architecture):
    model, ids = tiny_model(architecture), torch.arange(3, 15)[None]
    heads = getattr(model.config, "num_key_value_heads", 4)
    implementation = model.config._attn_implementation
    attention = PromptAttention(recent_queries=1)
    with bypass_blocks(model, (2,)), attention.recording(model, heads):
        output = model(ids, output_attentions=True)
    assert model.config._attn_implementation == implementation
    assert sorted(attention.accumulated) == [0, 1, 3, 4, 5]
    weights = output.attentions[0].unflatten(1, (heads, -1)).mean(dim=2)
    torch.testing.assert_close(attention.recent[0], weights[:, :, -1])
    torch.testing.assert_close(attention.accumulated[0], weights.sum(dim=2))
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any("PromptAttention" in hook.__qualname__ for hook in hooks if hasattr(hook, "__qualname__"))


def test_a_model_that_shows_nothing(tiny_llama):
    with pytest.raises(ValueError, match="does not show"), PromptAttention().recording(tiny_llama, 2):
        pass
