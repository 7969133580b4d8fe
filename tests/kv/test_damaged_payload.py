import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_payloads import make_payload

from hf_pdprune.kv import KVPayload, PayloadError
from hf_pdprune.kv.wire_format import _NO_DIGEST


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
