import pytest
import torch
from masked_reference import masked_generate, random_prompts

from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.kv import KVPayload
from hf_pdprune.plan import KVPlan, PruningPlan


pytestmark = pytest.mark.invariant


def hand_over(prefill_model, decode_model, plan, input_ids, mask, **generate_kwargs):
    payload = PrefillStage(prefill_model, plan)(input_ids, mask, **generate_kwargs)
    return DecodeStage(decode_model, plan).generate(KVPayload.from_bytes(payload.to_bytes()), **generate_kwargs)


@pytest.mark.parametrize("kv", [KVPlan(), KVPlan(tuple(range(6)), 8, 8)], ids=["empty plan", "window of all tokens"])
def test_payload_that_keeps_every_token(tiny_model, architecture, kv):
    model = tiny_model(architecture)
    plan = PruningPlan.empty(model, kv=kv)
    input_ids, mask = random_prompts([16, 3, 9, 6])
    settings = {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(input_ids=input_ids, attention_mask=mask, **settings)
    actual = hand_over(model, model, plan, input_ids, mask, **settings)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
def test_payload_of_a_window(tiny_model, architecture, token_choice):
    # The same with fewer tokens: what one process does with the dropped tokens masked.
    model = tiny_model(architecture)
    plan = PruningPlan.empty(model, kv=KVPlan((0, 1, 3, 5), 2, 4, token_choice))
    input_ids, mask = random_prompts([16, 3, 9, 6])
    settings = {"max_new_tokens": 10, "do_sample": False}
    expected = masked_generate(model, plan, mask, input_ids=input_ids, attention_mask=mask, **settings)
    assert torch.equal(hand_over(model, model, plan, input_ids, mask, **settings), expected)
