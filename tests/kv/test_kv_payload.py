import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import filled_cache, random_prompts
from random_payloads import assert_equal_payloads, make_payload
from safetensors.torch import load

from hf_pdprune.kv import QUANTIZATIONS, KVPayload, PayloadError, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class TestRoundTrip:
    @settings(deadline=None, max_examples=60)
    @given(
        rows=st.integers(1, 4),
        tokens=st.integers(1, 9),
        blocks=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
        heads=st.integers(1, 3),
        head_dim=st.integers(1, 5),
        dtype=st.sampled_from(DTYPES),
        first=st.sampled_from([None, "token", "log_probs", "last"]),
        seed=st.integers(0, 2**16),
    )
    def test_nothing_is_lost(self, **shape):
        payload = make_payload(**shape)
        data = payload.to_bytes()
        assert payload.nbytes == len(data)
        received = KVPayload.from_bytes(data)
        assert_equal_payloads(received, payload)
        assert received.to_bytes() == data
        assert received.nbytes_kv == sum(t.nbytes for pair in payload.entries.values() for t in pair)

    @settings(deadline=None, max_examples=40)
    @given(
        kind=st.sampled_from(QUANTIZATIONS),
        rows=st.integers(1, 3),
        tokens=st.integers(1, 9),
        blocks=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
        heads=st.integers(1, 3),
        half=st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
        first=st.sampled_from([None, "token", "log_probs", "last"]),
        seed=st.integers(0, 2**16),
    )
    def test_of_quantised_payloads(self, kind, half, **shape):
        payload = make_payload(head_dim=2 * half, **shape)
        quantized = payload.quantized(kind)
        data = quantized.to_bytes()
        assert quantized.nbytes == len(data)
        assert quantized.nbytes_kv == sum(states.nbytes for pair in quantized.entries.values() for states in pair)
        received = KVPayload.from_bytes(data)
        assert_equal_payloads(received, quantized)
        for block, pair in payload.entries.items():
            for states, other in zip(received.entries_of(block), pair, strict=True):
                assert states.dtype == other.dtype
                assert states.shape == other.shape
                assert torch.isfinite(states).all()

    def test_quantised_twice(self):
        with pytest.raises(ValueError, match="quantised to int8 already"):
            make_payload(head_dim=4).quantized("int8").quantized("int4")

    def test_nothing_is_copied(self):
        # from_bytes gives views of the bytes; of its own it allocates the prompt's ids, and no more.
        payload = make_payload(rows=1, tokens=200, blocks=(190, 191), heads=4, head_dim=64)
        data = bytearray(payload.to_bytes())
        begin = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        received = KVPayload.from_bytes(data)
        for pair in received.entries.values():
            for states in pair:
                assert begin <= states.data_ptr() < begin + len(data)
        tracemalloc.start()
        KVPayload.from_bytes(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 30_000 < len(data) / 10

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_kind_of_bytes(self, kind):
        payload = make_payload()
        assert_equal_payloads(KVPayload.from_bytes(kind(payload.to_bytes())), payload)

    def test_special_values_and_views(self):
        payload = make_payload()
        keys = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, 1.0])
        keys = keys.view(2, 1, 4, 1).transpose(1, 2).transpose(1, 2).expand(2, 2, 4, 3)  # not contiguous
        payload.entries[0] = (keys, keys[..., ::2])
        received = KVPayload.from_bytes(payload.to_bytes())
        for tensor, other in zip(received.entries[0], payload.entries[0], strict=True):
            assert tensor.equal(other) or torch.equal(tensor.view(torch.int32), other.contiguous().view(torch.int32))

    def test_gradients_do_not_travel(self):
        payload = make_payload()
        payload.entries[0] = tuple(tensor.requires_grad_() * 1 for tensor in payload.entries[0])
        payload.first_logits = torch.zeros(2, 7, requires_grad=True)
        received = KVPayload.from_bytes(payload.to_bytes())
        assert not received.entries[0][0].requires_grad
        assert received.first_logits is None

    def test_it_is_a_safetensors_file(self):
        payload = make_payload()
        tensors = load(payload.to_bytes())
        assert torch.equal(tensors["keys.2"], payload.entries[2][0])
        assert set(tensors) == {"keys.0", "values.0", "keys.2", "values.2", "prompt_ids", "prompt_mask", "first_token"}


KV = KVPlan((0, 1, 3, 5), 2, 4)


class TestFromCache:
    def test_entries_and_bytes_are_what_the_plan_says(self, tiny_model):
        model = tiny_model("llama")
        plan = PruningPlan.empty(model, kv=KV, prefill=StagePlan(), decode=StagePlan((2, 3)))
        input_ids, mask = random_prompts([16, 16])
        cache, *_ = filled_cache(plan, model, input_ids, mask, completion_tokens=0)
        payload = KVPayload.from_cache(cache, input_ids, mask, "f" * 32)
        assert list(payload.entries) == [0, 1, 4, 5]
        per_token = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, head_dim, bytes
        assert payload.nbytes_kv == per_token * sum(plan.kept_prompt_tokens(block, 16) for block in range(6))
        assert payload.nbytes_dense == per_token * 6 * 16
        assert payload.nbytes_dense / payload.nbytes_kv == pytest.approx(plan.kv_reduction(16)["total"])

    def test_dense_bytes_where_windows_slide(self, tiny_model):
        # The dense model would not send what its sliding windows have forgotten.
        model = tiny_model("gemma2")
        plan = PruningPlan.empty(model)
        input_ids, mask = random_prompts([16, 9])
        cache, *_ = filled_cache(plan, model, input_ids, mask, completion_tokens=0)
        payload = KVPayload.from_cache(cache, input_ids, mask, "f" * 32)
        assert payload.nbytes_dense == payload.nbytes_kv == cache.nbytes


class TestForeign:
    @pytest.fixture
    def sent(self, tiny_llama):
        plan = PruningPlan.empty(tiny_llama, kv=KV)
        input_ids, mask = random_prompts([16, 9])
        cache, *_ = filled_cache(plan, tiny_llama, input_ids, mask, completion_tokens=0)
        return plan, KVPayload.from_cache(cache, input_ids, mask, "f" * 32)

    def test_its_own_plan_and_model(self, sent, tiny_llama):
        plan, payload = sent
        payload.check_plan(replace(plan, provenance={"seed": 1}))
        payload.check_model("f" * 32)
        TokenAwareCache.from_payload(payload, plan, tiny_llama).close()

    def test_plan(self, sent, tiny_llama):
        plan, payload = sent
        other = replace(plan, kv=replace(plan.kv, last_tokens=5))
        with pytest.raises(PayloadError, match=f"plan {plan.digest[:8]}, decode runs plan {other.digest[:8]}"):
            TokenAwareCache.from_payload(payload, other, tiny_llama)

    def test_model(self, sent):
        with pytest.raises(PayloadError, match="another model"):
            sent[1].check_model("e" * 32)

    def test_missing_block(self, sent, tiny_llama):
        plan, payload = sent
        del payload.entries[4]
        with pytest.raises(PayloadError, match="no KV entries of block 4"):
            TokenAwareCache.from_payload(payload, plan, tiny_llama)

    @pytest.mark.parametrize("block", [1, 4])
    def test_wrong_length(self, sent, tiny_llama, block):
        plan, payload = sent
        payload.entries[block] = tuple(states[..., 1:, :] for states in payload.entries[block])
        with pytest.raises(PayloadError, match=f"block {block}: the payload holds"):
            TokenAwareCache.from_payload(payload, plan, tiny_llama)

    def test_a_refused_payload_leaves_no_hooks(self, sent, tiny_llama):
        plan, payload = sent
        del payload.entries[4]
        with pytest.raises(PayloadError):
            TokenAwareCache.from_payload(payload, plan, tiny_llama)
        assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [None, "token", "log_probs", "last"])
def test_bytes_from_an_accelerator_are_those_of_the_cpu(accelerator, dtype, first):
    payload = make_payload(rows=3, tokens=40, heads=2, head_dim=64, dtype=dtype, first=first)
    there = payload.prompt_to(accelerator)
    there.entries = {block: tuple(s.to(accelerator) for s in pair) for block, pair in payload.entries.items()}
    wire = there.to_bytes()
    assert wire == payload.to_bytes() and there.nbytes == len(wire)
    received = KVPayload.from_bytes(wire)
    assert_equal_payloads(received, payload)
    for block, pair in there.entries.items():
        for states, sent in zip(received.entries_of(block, accelerator), pair, strict=True):
            assert states.device == accelerator
            assert torch.equal(states, sent)
