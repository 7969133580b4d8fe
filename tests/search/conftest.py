import random

import pytest
import torch

from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES
from hf_pdprune.search import BlockStatistics, Calibration


def make_examples(count=8, prompt_tokens=(9, 30), completion_tokens=(8, 20), vocab_size=256, seed=0):
    """Random examples of different lengths, in the form that `tokenize_examples` gives."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        prompt, completion = (
            [rng.randrange(3, vocab_size) for _ in range(rng.randrange(*lengths))]
            for lengths in (prompt_tokens, completion_tokens)
        )
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return examples


@pytest.fixture
def examples():
    """Factory of random examples."""
    return make_examples


@pytest.fixture
def calibration():
    """Factory: `calibration(model, batch_size=2, **example_options)`."""

    def make(model, batch_size=2, teacher_dtype=torch.float32, first_token="prefill", **options):
        examples = make_examples(**options)
        return Calibration(model, examples, 0, batch_size, teacher_dtype, "random tokens", first_token)

    return make


@pytest.fixture
def random_plan():
    """Factory: a random plan for a model, drawn from `rng`."""

    def make(model, rng, token_aware=True):
        total = model.config.num_hidden_layers
        decode = rng.sample(range(total), rng.randint(0, total - 2))
        prefill = [block for block in decode if rng.random() < 0.5]
        blocks = tuple(block for block in range(total) if token_aware and rng.random() < 0.5)
        kv = KVPlan(blocks, rng.randint(0, 3), rng.randint(1, 6), rng.choice(TOKEN_CHOICES))
        own = {block: (rng.randint(0, 3), rng.randint(6, 9)) for block in blocks if rng.random() < 0.3}
        kv = kv.with_windows(kv.windows | own)
        silent = blocks if kv.observed_tokens else ()  # these choose tokens, so they cannot be projected
        kept = [block for block in range(total) if block not in decode and block not in silent]
        projected = tuple(block for block in kept[1:] if rng.random() < 0.3)
        return PruningPlan.empty(
            model, prefill=StagePlan(tuple(prefill), (), projected), decode=StagePlan(tuple(decode)), kv=kv
        )

    return make


@pytest.fixture
def statistics():
    """Factory: `statistics([0.9, 0.99, ...])` for a llama with that redundancy."""

    def make(redundancy):
        made = BlockStatistics("tiny", "llama", len(redundancy))
        made.num_tokens = 1
        made._sums = torch.tensor(redundancy, dtype=torch.float64)
        return made

    return make
