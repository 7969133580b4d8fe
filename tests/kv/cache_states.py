"""What a token-aware cache holds, and leaves on a model."""

import torch
from masked_reference import random_prompts

from hf_pdprune.plan import KVPlan


KV = KVPlan((0, 1, 3, 5), first_tokens=2, last_tokens=4, block_windows=((3, 1, 7),))


def repetitive_prompt(tokens=21):
    """A prompt in which prompt lookup finds candidates from the first step on."""
    pattern, _ = random_prompts([5])
    ids = pattern.repeat(1, tokens // 5 + 1)[:, :tokens]
    return ids, torch.ones_like(ids)


def hooks_of(model):
    modules = list(model.modules())
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)


def states_of(cache):
    return [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in cache.layers]


def assert_same_states(before, after):
    for (keys, values, length), (other_keys, other_values, other_length) in zip(before, after, strict=True):
        assert length == other_length
        assert torch.equal(keys, other_keys)
        assert torch.equal(values, other_values)
