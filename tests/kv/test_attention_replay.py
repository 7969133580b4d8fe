import pytest
import torch
from masked_reference import eager_copy, random_prompts
from torch import nn
from transformers import DynamicCache

from hf_pdprune.blocks import get_attention, get_blocks
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.kv.attention_replay import AttentionReplay
from hf_pdprune.kv.observed_attention import observing, visible_keys


TOKENS = slice(9, 14)


@torch.no_grad()
def replayed(model, input_ids, block=1):
    """What block 1 gives for the tokens when they are run once more, and what it gave."""
    cache, results = DynamicCache(config=model.config), []
    replay = AttentionReplay(get_blocks(model)[block])

    def hook(module, args, kwargs, output):
        keys, values = (
            states[:, :, : TOKENS.stop] for states in (cache.layers[block].keys, cache.layers[block].values)
        )
        visible = visible_keys(None, TOKENS.stop, TOKENS.stop - TOKENS.start, keys.device)
        results.append(output)
        results.append(replay(args, kwargs, TOKENS, TOKENS.start, keys, values, visible))

    handle = replay.module.register_forward_hook(hook, with_kwargs=True)
    model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    handle.remove()
    return results


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_and_output_are_the_models(tiny_model, architecture, implementation):
    # Full attention in all blocks: a sliding window is left as it is, and not replayed.
    full = {"sliding_window": 64} if architecture in ("mistral", "gemma2", "gemma3_text") else {}
    model = tiny_model(architecture, **full)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{architecture} has no sdpa attention")
    model.set_attn_implementation(implementation)
    input_ids, _ = random_prompts([16, 16])
    (output, *_), (again, weights) = replayed(model, input_ids)
    torch.testing.assert_close(again, output[:, TOKENS], atol=1e-5, rtol=0)
    (_, expected), _ = replayed(eager_copy(model), input_ids)
    torch.testing.assert_close(weights, expected[:, :, TOKENS, : TOKENS.stop], atol=1e-5, rtol=0)


def test_nothing_of_the_model_is_changed(tiny_llama):
    attention = get_attention(tiny_llama.model.layers[1])
    before = dict(vars(attention))
    replayed(tiny_llama, random_prompts([16])[0])
    assert vars(attention).keys() == before.keys()
    assert all(vars(attention)[name] is value for name, value in before.items())
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_padding_is_not_observed(tiny_llama):
    input_ids, mask = random_prompts([16, 6])
    cache = DynamicCache(config=tiny_llama.config)
    with torch.no_grad(), observing(tiny_llama, (1, 4), cache, mask, observed_tokens=8) as attention:
        tiny_llama(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
        )
    assert sorted(attention) == [1, 4]
    assert attention[1].shape == (2, 2, 16)
    torch.testing.assert_close(attention[1].sum(dim=-1), torch.tensor([[8.0, 8.0], [6.0, 6.0]]))
    assert attention[1][1, :, :10].abs().max() == 0
    hooks = [hook for module in tiny_llama.modules() for hook in module._forward_hooks]
    assert hooks == []


class Attention(nn.Module):
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        return hidden_states, None


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        for index in range(number):
            setattr(self, f"attention{index}", Attention())

    def forward(self, hidden_states, past_key_values=None):
        return hidden_states


@pytest.mark.parametrize("number", [0, 2])
def test_blocks_with_other_than_one_attention(number):
    with pytest.raises(ValueError, match=f"Block has {number} modules that take a KV cache.*first_last"):
        AttentionReplay(Block(number))


@pytest.mark.parametrize(
    ("more", "message"), [({}, "shows no attention weights"), ({"bias": torch.ones(3)}, "bias cannot be cut")]
)
def test_what_is_only_seen_when_it_runs(more, message):
    replay, states = AttentionReplay(Block(1)), torch.zeros(1, 1, 4, 2)
    visible = visible_keys(None, 4, 2, states.device)
    with pytest.raises(ValueError, match=message):
        replay((torch.zeros(1, 4, 2),), {"past_key_values": None, **more}, slice(2, 4), 2, states, states, visible)
