import pytest
import torch
from test_kv_payload import assert_equal_payloads, make_payload

from hf_pdprune.kv import KVPayload, PayloadError, PayloadReader, PayloadWriter


def frames_of(payload, quantization=None, order=None):
    """The frames of a payload, and the payload that the writer returns."""
    frames = []
    writer = PayloadWriter(frames.append, payload.plan_digest, payload.model_fingerprint, quantization)
    for block in order or payload.entries:
        writer.send_block(block, *payload.entries[block])
    return frames, writer.finish(payload)


def read(frames, **settings):
    reader = PayloadReader(**settings)
    *before, last = [reader.feed(frame) for frame in frames]
    assert before == [None] * len(before)
    return last


@pytest.mark.parametrize("first", [None, "token", "log_probs"])
@pytest.mark.parametrize("quantization", [None, "fp8", "int8", "int4"])
def test_a_stream_is_the_payload(quantization, first):
    payload = make_payload(blocks=(0, 3, 5), head_dim=4, first=first)
    frames, sent = frames_of(payload, quantization, order=[3, 0, 5])
    assert len(frames) == 4
    received = read(frames, plan_digest=payload.plan_digest)
    whole = payload if quantization is None else payload.quantized(quantization)
    assert received.to_bytes() == sent.to_bytes() == whole.to_bytes()


def test_blocks_may_arrive_in_any_order():
    payload = make_payload(blocks=(0, 3, 5))
    frames, _ = frames_of(payload)
    assert_equal_payloads(read([frames[2], frames[0], frames[1], frames[3]]), payload)


def test_damage():
    payload = make_payload(blocks=(0, 3))
    frames, _ = frames_of(payload)
    others, _ = frames_of(payload)
    with pytest.raises(PayloadError, match="ends with blocks 0; it announces 0,3"):
        read([frames[0], frames[2]])
    with pytest.raises(PayloadError, match="ends with blocks none; it announces 0,3"):
        read([frames[2]])
    with pytest.raises(PayloadError, match=r"has keys\.0 twice"):
        read([frames[0], frames[0], frames[2]])
    with pytest.raises(PayloadError, match="another stream"):
        read([frames[0], others[1], frames[2]])
    with pytest.raises(PayloadError, match="belongs to no stream"):
        read([payload.to_bytes()])
    with pytest.raises(PayloadError, match="is of plan"):
        read(frames, plan_digest="0" * 32)
    for frame in frames:
        for position in range(0, len(frame), 7):
            damaged = bytearray(frame)
            damaged[position] ^= 1
            with pytest.raises(PayloadError):
                PayloadReader().feed(damaged)
        with pytest.raises(PayloadError):
            PayloadReader().feed(frame[:-1])


def test_a_frame_is_no_payload():
    frames, _ = frames_of(make_payload())
    with pytest.raises(PayloadError, match="nbytes_dense"):
        KVPayload.from_bytes(frames[0])


def test_rows_of_another_batch():
    frames, _ = frames_of(make_payload(rows=2))
    reader = PayloadReader()
    reader.feed(frames[0])
    forged = make_payload(rows=3, blocks=(2,))
    stream = PayloadWriter(lambda frame: None, forged.plan_digest, forged.model_fingerprint)
    stream._common = reader._common
    sent = []
    stream.send = sent.append
    stream.send_block(2, *forged.entries[2])
    reader.feed(sent[0])
    with pytest.raises(PayloadError, match="block 2.*2 prompts"):
        reader.feed(frames[-1])


def test_each_block_is_sent_when_it_is_done(tiny_llama):
    from hf_pdprune.blocks import get_blocks
    from hf_pdprune.inference import PrefillStage
    from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan

    plan = PruningPlan.empty(tiny_llama, decode=StagePlan((2,)), kv=KVPlan((0, 3), 2, 4, block_windows=((3, 1, 7),)))
    events = []
    for number, block in enumerate(get_blocks(tiny_llama)):
        block.register_forward_pre_hook(lambda *_, number=number: events.append(f"block {number}"))
    frames = []

    def send(frame):
        frames.append(frame)
        events.append("frame")

    prompt = torch.arange(3, 19)[None]
    for quantization in (None, "int4"):
        frames.clear()
        stage = PrefillStage(tiny_llama, plan, quantization=quantization)
        sent = stage(prompt, do_sample=False, send=send)
        assert read(frames).to_bytes() == sent.to_bytes() == stage(prompt, do_sample=False).to_bytes()
    expected = ["block 0", "frame", "block 1", "frame", "block 2", "block 3", "frame", "block 4", "frame"]
    assert events[:12] == [*expected, "block 5", "frame", "frame"]


@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
def test_a_prompt_that_is_read_in_chunks_is_sent_once(tiny_llama, token_choice):
    from hf_pdprune.inference import PrefillStage
    from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan

    kv = KVPlan((0, 3), 2, 4, token_choice=token_choice)
    stage = PrefillStage(tiny_llama, PruningPlan.empty(tiny_llama, decode=StagePlan((2,)), kv=kv))
    frames = []
    sent = stage(torch.arange(3, 19)[None], do_sample=False, send=frames.append, prefill_chunk_size=5)
    assert len(frames) == 5 + 1
    assert read(frames).to_bytes() == sent.to_bytes()
