from dataclasses import replace

import pytest
import torch
from masked_reference import cached_logits, is_sliding, masked_logits, random_prompts, with_completion

from hf_pdprune.kv import TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan


pytestmark = pytest.mark.invariant

PROMPT_TOKENS, COMPLETION_TOKENS = 16, 12
# Rows without padding, shorter than the window, as long as it, and between.
LENGTHS = [PROMPT_TOKENS, 3, 6, 11]

# name: (tokens of each forward, whether the cache is told the prompt's length)
WAYS = {
    "token by token": ([PROMPT_TOKENS] + [1] * COMPLETION_TOKENS, False),
    "several tokens per forward": ([PROMPT_TOKENS, 3, 5, 4], False),
    "prompt in chunks": ([5, 5, 6, 1, 1, 4, 6], True),
    "prompt and completion at once": ([PROMPT_TOKENS + COMPLETION_TOKENS], True),
    "forward across the prompt's end": ([7, 12, 1, 8], True),
}
WINDOWS = {
    "all blocks": KVPlan(tuple(range(6)), 2, 4),
    "first block": KVPlan((0,), 2, 4),
    "last block": KVPlan((5,), 1, 1),
    "windows of blocks": KVPlan((0, 2, 3, 5), 2, 4, block_windows=((0, 1, 3), (3, 4, 5), (5, 9, 9))),
    "no first tokens": KVPlan((0, 2, 5), 0, 5),
    "one token is dropped": KVPlan((0, 2, 5), 7, 8),
    "window as long as the prompt": KVPlan((0, 2, 5), 8, 8),
    "window longer than the prompt": KVPlan((0, 2, 5), 16, 112),
}
CHOICES = ["first_last", "attention"]


def check(model, kv, lengths, sizes, tells_length):
    plan = PruningPlan.empty(model, kv=kv)
    input_ids, mask = with_completion(*random_prompts(lengths), COMPLETION_TOKENS)
    real = mask.bool()
    with TokenAwareCache(plan, model, prompt_tokens=max(lengths) if tells_length else None) as cache:
        actual = cached_logits(model, cache, input_ids, mask, sizes)[real]
    expected = masked_logits(model, plan, input_ids, mask, max(lengths))[real]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    dense = masked_logits(model, PruningPlan.empty(model), input_ids, mask, max(lengths))[real]
    drops = max(lengths) > kv.first_tokens + kv.last_tokens
    drops = drops and not all(is_sliding(model, block) for block in kv.token_aware_blocks)
    # What is dropped must matter, or the comparison shows nothing.
    assert ((dense - expected).abs().max() > 1e-2) == drops


def with_attention(tiny_model, architecture, attention):
    model = tiny_model(architecture, initializer_range=0.1)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{architecture} has no sdpa attention")
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture(tiny_model, architecture, attention, choice, way):
    model = with_attention(tiny_model, architecture, attention)
    check(model, KVPlan((0, 1, 3, 5), 2, 4, choice, ((1, 0, 4), (3, 1, 7))), LENGTHS, *WAYS[way])


@pytest.mark.parametrize("lengths", [LENGTHS, [PROMPT_TOKENS], [PROMPT_TOKENS] * 3], ids=["padded", "one", "equal"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_every_window(tiny_model, architecture, choice, window, lengths):
    model = with_attention(tiny_model, architecture, "eager")
    kv = replace(WINDOWS[window], token_choice=choice)
    if choice == "attention" and window == "last block":
        kv = replace(kv, first_tokens=3)  # where there are four tokens to choose from, two have the same neighbours
    check(model, kv, lengths, *WAYS["several tokens per forward"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_padding(tiny_model, attention, choice, way):
    # sdpa gets no mask at all here where it can do without.
    model = with_attention(tiny_model, "llama", attention)
    check(model, KVPlan((0, 1, 3, 5), 2, 4, choice, ((1, 0, 4), (3, 1, 7))), [PROMPT_TOKENS] * 2, *WAYS[way])
