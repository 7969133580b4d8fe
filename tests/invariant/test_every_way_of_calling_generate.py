"""
Every architecture of the matrix with every way of calling generate: what comes out is what comes out with the dropped
tokens masked and no cache, token for token, and where logits are to be had within 1e-5. The table in README.md is made
from this: `python tests/invariant/test_every_way_of_calling_generate.py` prints it, and a test compares.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from masked_reference import masked_generate, random_prompts, with_completion  # noqa: E402
from tiny_configs import ARCHITECTURES  # noqa: E402
from transformers import StoppingCriteria  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from hf_pdprune.inference import DecodeStage, PrefillStage  # noqa: E402
from hf_pdprune.kv import KVPayload, TokenAwareCache  # noqa: E402
from hf_pdprune.plan import KVPlan, PruningPlan  # noqa: E402
from hf_pdprune.plan_parts import TOKEN_CHOICES  # noqa: E402


pytestmark = pytest.mark.invariant

KV = KVPlan((0, 1, 3, 5), 2, 4, block_windows=((3, 1, 7),))
PADDED = [16, 3, 9, 6]
README = Path(__file__).parents[2] / "README.md"


def settings_for(prompts, **settings):
    return {"input_ids": prompts[0], "attention_mask": prompts[1], "do_sample": False, "max_new_tokens": 7, **settings}


def check(model, plan, prompts, prompt_tokens=None, helper=(), **settings):
    """One call with the cache against one without: tokens, and the logits they were chosen by."""
    settings = settings_for(prompts, output_logits=True, return_dict_in_generate=True, **settings)
    torch.manual_seed(3)
    expected = masked_generate(model, plan, prompts[1], **settings)
    torch.manual_seed(3)
    with TokenAwareCache(plan, model, prompt_tokens=prompt_tokens) as cache:
        actual = model.generate(past_key_values=cache, **settings, **dict(helper))
    assert torch.equal(actual.sequences, expected.sequences)
    for logits, other in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, other, atol=1e-5, rtol=0)


def repetitive_prompt(tokens=21, padding=3):
    """One padded prompt (transformers takes no more there) in which prompt lookup finds candidates from the start."""
    ids = random_prompts([5])[0].repeat(1, 5)[:, :tokens]
    return tuple(torch.nn.functional.pad(part, (padding, 0)) for part in (ids, torch.ones_like(ids)))


def greedy(model, plan):
    check(model, plan, random_prompts(PADDED))


def sampling(model, plan):
    check(model, plan, random_prompts(PADDED), do_sample=True, temperature=0.7, top_k=0)


def beams(model, plan):
    check(model, plan, random_prompts(PADDED), num_beams=3, num_return_sequences=2)


def returned_sequences(model, plan):
    check(model, plan, random_prompts(PADDED), do_sample=True, num_return_sequences=3)


def chunked_prefill(model, plan):
    check(model, plan, random_prompts(PADDED), prompt_tokens=16, helper={"prefill_chunk_size": 5})


def assisted(model, plan):
    check(model, plan, repetitive_prompt(), prompt_tokens=24, helper={"assistant_model": model})


def prompt_lookup(model, plan):
    check(model, plan, repetitive_prompt(), prompt_tokens=24, helper={"prompt_lookup_num_tokens": 3})


def three_turns(model, plan):
    sequence, mask = random_prompts(PADDED)
    prompt_mask = mask
    with TokenAwareCache(plan, model) as cache:
        for turn in range(3):
            settings = settings_for((sequence, mask), max_new_tokens=3)
            expected = masked_generate(model, plan, prompt_mask, **settings)
            sequence = model.generate(past_key_values=cache, **settings)
            assert torch.equal(sequence, expected)
            mask = torch.nn.functional.pad(mask, (0, 3), value=1)
            sequence, mask = with_completion(sequence, mask, 4, seed=turn)


def streamer(model, plan):
    class Collector(BaseStreamer):
        tokens, ended = (), False

        def put(self, value):
            self.tokens += tuple(value.flatten().tolist())

        def end(self):
            self.ended = True

    prompts, collector = repetitive_prompt(), Collector()
    expected = masked_generate(model, plan, prompts[1], **settings_for(prompts))
    with TokenAwareCache(plan, model) as cache:
        model.generate(past_key_values=cache, streamer=collector, **settings_for(prompts))
    assert collector.ended
    assert [list(collector.tokens)] == expected.tolist()


def stopping_criteria(model, plan):
    class AfterTokens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

    check(model, plan, random_prompts([16, 5]), stopping_criteria=[AfterTokens()])


def hand_over(model, plan):
    prompts = random_prompts(PADDED)
    payload = PrefillStage(model, plan)(*prompts, do_sample=False)
    decode = DecodeStage(model, plan)
    actual = decode.generate(KVPayload.from_bytes(payload.to_bytes()), max_new_tokens=7, do_sample=False)
    assert torch.equal(actual, masked_generate(model, plan, prompts[1], **settings_for(prompts)))


def beams_after_hand_over(model, plan):
    # Decode generates the first token: beams part at it, as in one process.
    prompts = random_prompts(PADDED)
    payload = PrefillStage(model, plan)(*prompts, first_token="decode")
    settings = {"max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 2}
    actual = DecodeStage(model, plan).generate(KVPayload.from_bytes(payload.to_bytes()), do_sample=False, **settings)
    expected = masked_generate(model, plan, prompts[1][:, :-1], **settings_for(prompts, **settings))
    assert torch.equal(actual, expected)


WAYS = {
    "greedy": greedy,
    "sampling": sampling,
    "beams": beams,
    "returned sequences": returned_sequences,
    "chunked prefill": chunked_prefill,
    "assisted": assisted,
    "prompt lookup": prompt_lookup,
    "three turns": three_turns,
    "streamer": streamer,
    "stopping criteria": stopping_criteria,
    "hand-over": hand_over,
    "beams after hand-over": beams_after_hand_over,
}


@pytest.mark.parametrize("token_choice", TOKEN_CHOICES)
@pytest.mark.parametrize("way", WAYS)
def test_every_architecture(tiny_model, architecture, way, token_choice):
    model = tiny_model(architecture, initializer_range=0.1)
    model.generation_config.eos_token_id = None  # random models would end here and there
    WAYS[way](model, PruningPlan.empty(model, kv=replace(KV, token_choice=token_choice)))


def table():
    """The table of README.md."""
    rows = [["", *WAYS], ["---", *[":-:"] * len(WAYS)]]
    rows += [[name.removesuffix("_text"), *["yes"] * len(WAYS)] for name in ARCHITECTURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_table_in_the_readme():
    assert table() in README.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
