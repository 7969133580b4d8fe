import hashlib
import json
import tracemalloc
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import filled_cache, random_prompts
from safetensors.torch import load

from hf_pdprune.kv import QUANTIZATIONS, KVPayload, PayloadError, QuantizedStates, TokenAwareCache
from hf_pdprune.kv.wire_format import _NO_DIGEST
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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


def tampered(data, change):
    """The payload with its header changed by `change`, and a header digest that fits again: what a forger can do."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["header_sha256"] = _NO_DIGEST
    encoded = json.dumps(header).encode()
    encoded = encoded.replace(_NO_DIGEST.encode(), hashlib.sha256(encoded).hexdigest().encode(), 1)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


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


class TestDamage:
    """Whatever comes in, a `PayloadError` says what is wrong, and nothing else is raised."""

    @pytest.mark.parametrize("first", [None, "log_probs"])
    def test_every_truncation(self, first):
        data = make_payload(rows=1, tokens=2, blocks=(0,), heads=1, first=first).to_bytes()
        for length in range(len(data)):
            with pytest.raises(PayloadError):
                KVPayload.from_bytes(data[:length])
        with pytest.raises(PayloadError, match="too long"):
            KVPayload.from_bytes(data + b"\0")

    @pytest.mark.parametrize("kind", [None, "int4"])
    def test_every_flipped_byte(self, kind):
        payload = make_payload(rows=1, tokens=2, blocks=(0,), heads=1, head_dim=2)
        data = (payload if kind is None else payload.quantized(kind)).to_bytes()
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises(PayloadError):
                KVPayload.from_bytes(bytes(damaged))

    def test_every_missing_byte(self):
        data = make_payload(rows=1, tokens=2, blocks=(0,), heads=1, head_dim=2).to_bytes()
        for position in range(len(data)):
            with pytest.raises(PayloadError):
                KVPayload.from_bytes(data[:position] + data[position + 1 :])

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_any_changed_bytes(self, draw):
        data = bytearray(make_payload(first=draw.draw(st.sampled_from([None, "log_probs"]))).to_bytes())
        header_end = 8 + int.from_bytes(data[:8], "little")
        places = st.integers(0, len(data) - 1) | st.integers(0, header_end) | st.integers(0, 7)
        changed = draw.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=4))
        for position, difference in changed.items():
            data[position] ^= difference
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(bytes(data))

    @settings(deadline=None, max_examples=200)
    @given(st.binary(max_size=200), st.booleans())
    def test_random_bytes(self, data, fitting_length):
        if fitting_length:
            data = len(data).to_bytes(8, "little") + data
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(data)

    @settings(deadline=None, max_examples=50)
    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda j: st.dictionaries(st.text(), j)))
    def test_any_json_as_header(self, header):
        encoded = json.dumps({"__metadata__": header}).encode()
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(len(encoded).to_bytes(8, "little") + encoded)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h: h["__metadata__"].update(format_version="1"), "format '1'"),
            (lambda h: h["__metadata__"].update(format_version=2), "format 2"),
            (lambda h: h["__metadata__"].pop("format_version"), "no payload metadata"),
            (lambda h: h.update(__metadata__=[]), "no payload metadata"),
            (lambda h: h["__metadata__"].pop("plan_digest"), "plan_digest"),
            (lambda h: h["__metadata__"].update(model_fingerprint=7), "model_fingerprint"),
            (lambda h: h["__metadata__"].update(nbytes_dense="-1"), "nbytes_dense"),
            (lambda h: h["__metadata__"].update(nbytes_dense="9" * 5000), "nbytes_dense"),
            (lambda h: h["keys.0"].update(data_offsets=[0, float("inf")]), "does not describe"),
            (lambda h: h["keys.0"].update(data_offsets=[0]), "does not describe"),
            (lambda h: h["keys.0"].update(data_offsets=[0, 10**12]), "truncated or too long"),
            (lambda h: h["keys.0"].update(shape=[2, 2, 1, 10**6]), "does not fit its data"),
            (lambda h: h["keys.0"].update(dtype="X9"), "does not fit its data"),
            (lambda h: h.update({"keys.zero": h.pop("keys.0")}), "unexpected tensor 'keys.zero'"),
            (lambda h: h.update({"keys.00": h.pop("keys.0")}), "unexpected tensor 'keys.00'"),
            (lambda h: h.update({"values.1": h.pop("values.0")}), "unexpected tensor 'keys.0'"),
            (lambda h: h.update({"queries.0": h.pop("keys.0")}), "unexpected tensor"),
            (lambda h: h.update({"first_log_probs": h.pop("first_token")}), "first_log_probs is torch.int32"),
            (lambda h: [h[name].update(dtype="I32") for name in ("keys.0", "values.0")], "block 0"),
            (lambda h: h["keys.0"].update(dtype="I32"), "block 0"),
            (lambda h: h["first_token"].update(shape=[1, 2]), "first_token"),
            (lambda h: h["prompt_mask"].update(shape=[5, 2]), "prompt_mask"),
            (lambda h: h["keys.0"].update(shape=[1, 2, 2, 3]), "block 0"),
            (lambda h: h["values.2"].update(shape=[2, 3, 2, 2]), "block 2"),
        ],
    )
    def test_forged_headers(self, change, message):
        with pytest.raises(PayloadError, match=message):
            KVPayload.from_bytes(tampered(make_payload().to_bytes(), change))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h: h["__metadata__"].update(quantization="int2"), "quantised to 'int2'"),
            (lambda h: h["__metadata__"].update(dtype="I32"), "from 'I32'"),
            (lambda h: h["__metadata__"].pop("dtype"), "from None"),
            (lambda h: h["__metadata__"].pop("quantization"), "unexpected tensor"),
            (lambda h: h["__metadata__"].update(quantization="int8"), "block 0"),
            (lambda h: h["keys.0.codes"].update(dtype="I8"), "block 0"),
            (lambda h: h["keys.0.scales"].update(dtype="F16"), "block 0"),
            (lambda h: h["keys.0.scales"].update(shape=[2, 1, 2, 1]), "block 0"),
            (lambda h: h["values.0.codes"].update(shape=[2, 1, 2, 1]), "block 0"),
            (lambda h: h.update({"keys.0.zeros": h.pop("keys.0.offsets")}), "unexpected tensor 'keys.0.zeros'"),
            (lambda h: h.update({"keys.1.offsets": h.pop("keys.0.offsets")}), "block 0"),
            (lambda h: h["keys.0.codes"].update(shape=[2, 0, 1, 2]), "has shape"),
            (lambda h: h["keys.0.codes"].update(shape=[2, 2, 1, -2]), "has shape"),
            (lambda h: h["keys.0.codes"].update(shape=[True, 2, 1, 2]), "has shape"),
            (lambda h: h["keys.0.codes"].update(data_offsets=[0, 4]), "does not fit its data"),
        ],
    )
    def test_forged_headers_of_quantised_payloads(self, change, message):
        data = make_payload(head_dim=4).quantized("int4").to_bytes()
        with pytest.raises(PayloadError, match=message):
            KVPayload.from_bytes(tampered(data, change))

    def test_nothing_is_allocated_for_what_is_only_claimed(self):
        data = make_payload().to_bytes()
        forged = [
            (1 << 62).to_bytes(8, "little") + data[8:],
            tampered(data, lambda h: h["keys.0"].update(shape=[10**6, 10**6, 10**6, 10**6])),
            tampered(data, lambda h: h["keys.0"].update(shape=[2**40, 0, 1, 3], data_offsets=[0, 0])),
        ]
        tracemalloc.start()
        for payload in forged:
            with pytest.raises(PayloadError):
                KVPayload.from_bytes(payload)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000

    def test_headers_are_bounded(self):
        encoded = b'{"__metadata__":{' + b" " * (1 << 20)
        with pytest.raises(PayloadError, match="a header of"):
            KVPayload.from_bytes(len(encoded).to_bytes(8, "little") + encoded)

    @pytest.mark.parametrize("name", ["prompt_ids", "prompt_mask"])
    def test_missing_prompt(self, name):
        def remove(header):
            header[f"keys.{9 if name == 'prompt_ids' else 8}"] = header.pop(name)

        with pytest.raises(PayloadError, match=name):
            KVPayload.from_bytes(tampered(make_payload().to_bytes(), remove))

    def test_no_tensors_at_all(self):
        metadata = {"format_version": "2", "plan_digest": "", "model_fingerprint": "", "nbytes_dense": "0"}
        header = {"__metadata__": metadata | {"data_crc32": "00000000", "header_sha256": ""}}
        encoded = json.dumps(header).encode()
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(tampered(len(encoded).to_bytes(8, "little") + encoded, lambda header: None))

    def test_surrogates_in_the_digest(self):
        encoded = b'{"__metadata__":{"format_version":"2","header_sha256":"\\ud800"}}'
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(len(encoded).to_bytes(8, "little") + encoded)

    def test_deeply_nested_header(self):
        encoded = b"[" * 100_000
        with pytest.raises(PayloadError):
            KVPayload.from_bytes(len(encoded).to_bytes(8, "little") + encoded)


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
