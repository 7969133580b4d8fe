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
    plan = PruningPlan.empty(model, kv=KVPlan((0, 1, 3, 5), 2, 4, token_choice, ((3, 1, 7),)))
    input_ids, mask = random_prompts([16, 3, 9, 6])
    settings = {"max_new_tokens": 10, "do_sample": False}
    expected = masked_generate(model, plan, mask, input_ids=input_ids, attention_mask=mask, **settings)
    assert torch.equal(hand_over(model, model, plan, input_ids, mask, **settings), expected)


@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
@pytest.mark.parametrize("lengths", [[4, 3], [9, 3]], ids=str)
@pytest.mark.parametrize("padded_to", [10, 11, 32])
def test_prompts_with_more_padding_than_the_longest_needs(tiny_llama, padded_to, lengths, token_choice):
    # As pad_to_multiple_of gives them. The window of 10 holds either batch whole: only padding is dropped.
    plan = PruningPlan.empty(tiny_llama, kv=KVPlan((0, 1, 3, 5), 4, 6, token_choice))
    input_ids, mask = (torch.nn.functional.pad(t, (padded_to - t.shape[1], 0)) for t in random_prompts(lengths))
    settings = {"max_new_tokens": 10, "do_sample": False}
    expected = masked_generate(tiny_llama, plan, mask, input_ids=input_ids, attention_mask=mask, **settings)
    assert torch.equal(hand_over(tiny_llama, tiny_llama, plan, input_ids, mask, **settings), expected)
    payload = PrefillStage(tiny_llama, plan)(input_ids, mask, do_sample=False)
    kept = [payload.entries[block][0].shape[-2] for block in range(6)]
    assert kept == [max(lengths) if block in plan.kv.token_aware_blocks else padded_to for block in range(6)]
