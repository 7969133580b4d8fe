"""Payloads of any shape, and what two of them have in common."""

from dataclasses import fields

import torch

from hf_pdprune.kv import KVPayload, QuantizedStates
from hf_pdprune.plan import PruningPlan


_FIRST = ("token", "log_probs")


def make_payload(rows=2, tokens=5, blocks=(0, 2), heads=2, head_dim=3, dtype=torch.float32, first="token", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    return KVPayload(
        entries={
            # Blocks hold different numbers of tokens, and values may be of another width than keys.
            block: (random(rows, heads, 1 + block % tokens, head_dim), random(rows, heads, 1 + block % tokens, 2))
            for block in blocks
        },
        prompt_ids=torch.randint(0, 2**31 - 1, (rows, tokens), generator=generator),
        prompt_mask=(torch.arange(tokens) >= tokens - lengths).long(),
        plan_digest=PruningPlan("some/model", "llama", 8).digest,
        model_fingerprint="f" * 32,
        nbytes_dense=123456,
        first_token=torch.randint(0, 2**31 - 1, (rows, 1), generator=generator) if first in _FIRST else None,
        last_token=torch.randint(0, 2**31 - 1, (rows, 1), generator=generator) if first == "last" else None,
        first_log_probs=random(rows, 7).float() if first == "log_probs" else None,
    )


def assert_equal_states(actual, expected):
    if isinstance(expected, QuantizedStates):
        assert actual.dtype == expected.dtype
        parts = zip(actual.tensors().items(), expected.tensors().items(), strict=True)
        assert all(
            name == other and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for (name, a), (other, b) in parts
        )
    else:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def assert_equal_payloads(actual, expected):
    assert actual.entries.keys() == expected.entries.keys()
    for block, pair in expected.entries.items():
        for states, other in zip(actual.entries[block], pair, strict=True):
            assert_equal_states(states, other)
    for field in fields(KVPayload):
        value, other = getattr(actual, field.name), getattr(expected, field.name)
        if torch.is_tensor(other):
            assert value.dtype == other.dtype
            assert torch.equal(value, other)
        elif field.name != "entries":
            assert value == other
