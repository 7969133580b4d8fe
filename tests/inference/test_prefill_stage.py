import gc
from dataclasses import replace

import pytest
import torch
from masked_reference import random_prompts

from hf_pdprune.blocks import bypass_blocks
from hf_pdprune.inference import PrefillStage
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.kv import KVPayload, PayloadReader
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


@pytest.fixture
def plan(tiny_llama):
    return PruningPlan.empty(tiny_llama, prefill=StagePlan((1,)), decode=StagePlan((1, 4)), kv=KVPlan((0, 2), 2, 4))


@pytest.fixture
def prompts():
    return random_prompts([16, 3, 9, 6])


def next_logits(model, input_ids, mask):
    with bypass_blocks(model, (1,)), torch.no_grad():
        return model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, -1]


class TestCall:
    def test_the_choice_of_tokens_changes_no_shape(self, tiny_llama, plan, prompts):
        by_attention = replace(plan, kv=replace(plan.kv, token_choice="attention"))
        ends, chosen = (PrefillStage(tiny_llama, p)(*prompts, do_sample=False) for p in (plan, by_attention))
        assert (chosen.nbytes, chosen.plan_digest) == (ends.nbytes, by_attention.digest)
        for block in ends.entries:
            (keys, values), (other_keys, other_values) = ends.entries[block], chosen.entries[block]
            assert (keys.shape, values.shape) == (other_keys.shape, other_values.shape)
            assert torch.equal(keys, other_keys) == (block not in plan.kv.token_aware_blocks)

    def test_payload_holds_what_decode_needs(self, tiny_llama, plan, prompts):
        payload = PrefillStage(tiny_llama, plan)(*prompts)
        assert list(payload.entries) == [0, 2, 3, 5]
        for block, (keys, values) in payload.entries.items():
            assert keys.shape == values.shape == (4, 2, plan.kept_prompt_tokens(block, 16), 16)
            assert not keys.requires_grad
        assert torch.equal(payload.prompt_ids, prompts[0])
        assert torch.equal(payload.prompt_mask, prompts[1])
        assert payload.plan_digest == plan.digest
        assert payload.first_logits is None
        assert payload.first_log_probs is None
        received = KVPayload.from_bytes(payload.to_bytes())
        assert torch.equal(received.first_token, payload.first_token)

    def test_first_token_and_its_log_probabilities(self, tiny_llama, plan, prompts):
        logits = next_logits(tiny_llama, *prompts)
        payload = PrefillStage(tiny_llama, plan)(*prompts, return_log_probs=True, do_sample=False)
        assert torch.equal(payload.first_token, logits.argmax(-1, keepdim=True))
        torch.testing.assert_close(payload.first_log_probs, logits.log_softmax(-1), atol=1e-4, rtol=0)

    def test_without_a_mask(self, tiny_llama, plan):
        input_ids, mask = random_prompts([16, 16])
        stage = PrefillStage(tiny_llama, plan)
        assert stage(input_ids).to_bytes() == stage(input_ids, mask).to_bytes()

    @pytest.mark.parametrize("token_choice", ["first_last", "attention"])
    @pytest.mark.parametrize("chunk", [1, 5])
    def test_prompt_in_chunks(self, tiny_llama, plan, prompts, chunk, token_choice):
        plan = replace(plan, kv=replace(plan.kv, token_choice=token_choice))
        stage = PrefillStage(tiny_llama, plan)
        whole, chunked = stage(*prompts), stage(*prompts, prefill_chunk_size=chunk)
        assert torch.equal(whole.first_token, chunked.first_token)
        for block, pair in whole.entries.items():
            for tensor, other in zip(pair, chunked.entries[block], strict=True):
                # Padding fills shorter rows; what it holds is nobody's.
                if block in plan.kv.token_aware_blocks:
                    tensor, other = tensor[0], other[0]
                else:
                    tensor, other = (t.transpose(1, 2)[prompts[1].bool()] for t in (tensor, other))
                torch.testing.assert_close(tensor, other, atol=2e-5, rtol=0)

    def test_samples_as_generate_does(self, tiny_llama, prompts):
        settings = {"do_sample": True, "temperature": 2.0, "top_k": 0}
        torch.manual_seed(0)
        sequences = tiny_llama.generate(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=1, **settings)
        torch.manual_seed(0)
        payload = PrefillStage(tiny_llama, PruningPlan.empty(tiny_llama))(*prompts, **settings)
        assert torch.equal(payload.first_token, sequences[:, -1:])

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2},
            {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
            {"max_new_tokens": 50},
            {"max_length": 17},
            {"max_length": 5},
            {"prompt_lookup_num_tokens": 3},
            {"return_dict_in_generate": False},
        ],
        ids=str,
    )
    def test_what_decode_will_do_does_not_matter(self, tiny_llama, plan, prompts, settings):
        stage = PrefillStage(tiny_llama, plan)
        assert stage(*prompts, **settings).to_bytes() == stage(*prompts).to_bytes()
        tiny_llama.generation_config.update(num_beams=2, num_return_sequences=2)
        assert stage(*prompts, **settings).to_bytes() == stage(*prompts).to_bytes()

    @pytest.mark.parametrize("least", [{"min_new_tokens": 1}, {"min_new_tokens": 4}, {"min_length": 17}], ids=str)
    def test_a_least_length_forbids_to_end_at_once(self, tiny_llama, plan, prompts, least):
        eos = int(PrefillStage(tiny_llama, plan)(*prompts).first_token[0])
        for where in ("argument", "config"):
            if where == "config":
                tiny_llama.generation_config.update(**least)
                least = {}
            payload = PrefillStage(tiny_llama, plan)(*prompts, eos_token_id=eos, **least)
            assert eos not in payload.first_token
        tiny_llama.generation_config.update(min_new_tokens=None, min_length=16)
        assert eos in PrefillStage(tiny_llama, plan)(*prompts, eos_token_id=eos).first_token

    def test_too_long_prompts(self, tiny_llama, plan):
        padded_right = torch.tensor([[1] * 16, [1] * 9 + [0] * 7])
        for first_token in ("prefill", "decode"):
            with pytest.raises(ValueError, match="padded on the left: one ends with padding"):
                PrefillStage(tiny_llama, plan)(torch.full((2, 16), 5), padded_right, first_token=first_token)
        with pytest.raises(ValueError, match="the prompt has 513 tokens, the model's context is 512"):
            PrefillStage(tiny_llama, plan)(torch.ones(1, 513, dtype=torch.long))

    def test_a_stage_checkpoint_sends_the_same(self, tiny_llama, plan, prompts, exported):
        view = PrefillStage(tiny_llama, plan)(*prompts)
        checkpoint = PrefillStage(exported(tiny_llama, plan, "prefill"), plan)(*prompts)
        assert view.to_bytes() == checkpoint.to_bytes()


class TestForward:
    def test_equals_the_call(self, tiny_llama, plan, prompts):
        stage = PrefillStage(tiny_llama, plan)
        sent, kept = stage(*prompts), stage.forward(*prompts)
        torch.testing.assert_close(kept.first_logits, next_logits(tiny_llama, *prompts), atol=2e-5, rtol=0)
        for block, pair in sent.entries.items():
            for tensor, other in zip(pair, kept.entries[block], strict=True):
                torch.testing.assert_close(tensor, other, atol=2e-5, rtol=0)

    def test_the_wrapper_is_what_is_called(self, tiny_llama, plan, prompts):
        calls = []

        class Wrapper(torch.nn.Module):
            def forward(self, **kwargs):
                calls.append(sorted(kwargs))
                return tiny_llama(**kwargs)

        PrefillStage(tiny_llama, plan, module=Wrapper()).forward(*prompts)
        assert len(calls) == 1


class TestQuantization:
    @pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
    def test_multiplies_with_the_plan(self, tiny_llama, plan, prompts, kind):
        payload = PrefillStage(tiny_llama, plan)(*prompts, do_sample=False)
        quantized = PrefillStage(tiny_llama, plan, quantization=kind)(*prompts, do_sample=False)
        assert quantized.to_bytes() == payload.quantized(kind).to_bytes()
        numbers, scales = {"fp8": (16, 2), "int8": (16, 2), "int4": (8, 4)}[kind]  # bytes of a head of 16 numbers
        assert payload.nbytes_kv / quantized.nbytes_kv == pytest.approx(64 / (numbers + scales))
        assert payload.nbytes_dense == quantized.nbytes_dense

    def test_teacher_forced_too(self, tiny_llama, plan, prompts):
        with torch.no_grad():
            payload = PrefillStage(tiny_llama, plan, quantization="int8").forward(*prompts)
            expected = PrefillStage(tiny_llama, plan).forward(*prompts)
        assert payload.quantization == "int8"
        assert torch.equal(payload.first_logits, expected.first_logits)
        with pytest.raises(ValueError, match="has no gradient"):
            PrefillStage(tiny_llama, plan, quantization="int8").forward(*prompts)

    def test_unknown_kind(self, tiny_llama, plan):
        with pytest.raises(ValueError, match="quantization must be one of fp8, int8, int4, got 'int2'"):
            PrefillStage(tiny_llama, plan, quantization="int2")


class TestFirstTokenFromDecode:
    def test_the_last_token_is_left_to_decode(self, tiny_llama, plan, prompts):
        payload = PrefillStage(tiny_llama, plan)(*prompts, first_token="decode")
        assert payload.first_token is None
        assert torch.equal(payload.last_token, prompts[0][:, -1:])
        assert payload.prompt_tokens == 15
        received = KVPayload.from_bytes(payload.to_bytes())
        assert torch.equal(received.last_token, payload.last_token)

    def test_bad_input(self, tiny_llama, plan, prompts):
        stage = PrefillStage(tiny_llama, plan)
        with pytest.raises(ValueError, match="first_token must be prefill or decode, got 'both'"):
            stage(*prompts, first_token="both")
        with pytest.raises(ValueError, match="a prompt of one token"):
            stage(prompts[0][:, -1:], first_token="decode")
        with pytest.raises(ValueError, match="return_log_probs"):
            stage(*prompts, first_token="decode", return_log_probs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("token_choice", TOKEN_CHOICES)
def test_of_a_prompt_only_the_payload_stays_in_an_accelerators_memory(tiny_model, plan, accelerator, token_choice):
    model = tiny_model("llama", max_position_embeddings=4096).to(accelerator)
    plan = replace(plan, kv=KVPlan((0, 2, 5), 16, 112, token_choice))
    stage, prompts = PrefillStage(model, plan), [tensor.to(accelerator) for tensor in random_prompts([2048, 1900])]
    stage(*prompts, do_sample=False)  # what libraries allocate for themselves is there from now on

    def allocated():
        gc.collect()
        torch.accelerator.synchronize(accelerator)
        return torch.accelerator.memory_allocated(accelerator)

    before = allocated()
    payload = stage(*prompts, do_sample=False)
    grown = allocated() - before
    per_token = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, head_dim, bytes
    kept = sum(plan.kept_prompt_tokens(block, 2048) for block in payload.entries)
    assert kept == 2048 + 3 * 128  # block 3, and 0, 2 and 5
    assert payload.nbytes_kv == kept * per_token
    # Beside it the tokens, and up to 512 bytes of rounding for each tensor; keys of a whole prompt take 512 KiB.
    assert payload.nbytes_kv <= grown < payload.nbytes_kv + 64 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_frames_that_an_accelerator_sends_are_its_payload(tiny_llama, plan, prompts, accelerator, quantization):
    stage = PrefillStage(tiny_llama.to(accelerator), plan, quantization=quantization)
    prompts, frames, reader = [tensor.to(accelerator) for tensor in prompts], [], PayloadReader()
    payload = stage(*prompts, do_sample=False, send=frames.append)
    *_, received = [reader.feed(frame) for frame in frames]
    assert received.to_bytes() == payload.to_bytes() == stage(*prompts, do_sample=False).to_bytes()
