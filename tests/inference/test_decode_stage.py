from dataclasses import replace

import pytest
import torch
from masked_reference import masked_generate, random_prompts
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.kv import QUANTIZATIONS, KVPayload, PayloadError, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


KV = KVPlan((0, 1, 3, 5), 2, 4, block_windows=((3, 1, 7),))


@pytest.fixture
def plan(model):
    return PruningPlan.empty(model, kv=KV)


@pytest.fixture
def prompts():
    return random_prompts([16, 3, 9, 6])


def hand_over(model, plan, prompts, **settings):
    return DecodeStage(model, plan).generate(PrefillStage(model, plan)(*prompts, **settings), **settings)


class TestGenerate:
    """What decode returns is what one process returns that masks the dropped tokens."""

    def check(self, model, plan, prompts, **settings):
        expected = masked_generate(
            model, plan, prompts[1], input_ids=prompts[0], attention_mask=prompts[1], **settings
        )
        assert torch.equal(hand_over(model, plan, prompts, **settings), expected)
        return expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"max_new_tokens": 1},
            {"max_new_tokens": 2},
            {"max_new_tokens": 9},
            {"max_length": 17},
            {"max_length": 18},
            {"max_length": 25},
            {},
            {"max_new_tokens": 9, "min_new_tokens": 1},
            {"max_new_tokens": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
    def test_lengths(self, model, plan, prompts, settings):
        self.check(model, plan, prompts, do_sample=False, **settings)
        model.generation_config.update(**settings)
        self.check(model, plan, prompts)

    @pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
    def test_without_a_length_the_models_context_is_the_limit(self, tiny_model):
        for architecture in ("llama", "opt"):
            model = tiny_model(architecture, max_position_embeddings=30)
            plan, (input_ids, mask) = PruningPlan.empty(model), random_prompts([20])
            for first in ("prefill", "decode"):
                payload = PrefillStage(model, plan)(input_ids, mask, do_sample=False, first_token=first)
                sequences = DecodeStage(model, plan).generate(payload, do_sample=False, eos_token_id=None)
                assert sequences.shape == (1, 30)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_length": 16}, "leaves 0 tokens to generate"),
            ({"max_length": 10}, "leaves -6 tokens to generate"),
            ({"max_new_tokens": 0}, "leaves 0 tokens to generate"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("first", ["prefill", "decode"])
    def test_what_cannot_be_generated(self, model, plan, prompts, settings, message, first):
        payload = PrefillStage(model, plan)(*prompts, first_token=first)
        with pytest.raises(ValueError, match=message):
            DecodeStage(model, plan).generate(payload, **settings)

    def test_a_generation_config_of_the_callers_own(self, model, plan, prompts):
        self.check(model, plan, prompts, generation_config=GenerationConfig(max_new_tokens=6, do_sample=False))

    @pytest.mark.parametrize("ends", [[0], [1, 3], [0, 1, 2], [0, 1, 2, 3]], ids=str)
    @pytest.mark.parametrize("pad", [0, 7, None])
    def test_rows_that_end_with_the_first_token(self, model, plan, prompts, ends, pad):
        first = PrefillStage(model, plan)(*prompts).first_token[:, 0].tolist()
        assert len(set(first)) == 4
        eos = [first[row] for row in ends]
        sequences = self.check(model, plan, prompts, max_new_tokens=6, eos_token_id=eos, pad_token_id=pad)
        assert sequences.shape[1] == (17 if len(ends) == 4 else 22)

    def test_rows_that_end_one_after_the_other(self, model, plan, prompts):
        free = hand_over(model, plan, prompts, max_new_tokens=12)
        # All of the rows that did not end with the first token end before the length is reached.
        eos = [int(free[row, 16 + row]) for row in range(4)]
        sequences = self.check(model, plan, prompts, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
        assert sequences.shape[1] < 28

    def test_least_lengths(self, model, plan, prompts):
        free = hand_over(model, plan, prompts, max_new_tokens=12)
        eos = free[:, 16:].unique().tolist()  # it would end at once
        for least in ({"min_new_tokens": 4}, {"min_length": 20}):
            sequences = self.check(model, plan, prompts, max_new_tokens=6, eos_token_id=eos, pad_token_id=0, **least)
            assert not torch.isin(sequences[:, 16:20], torch.tensor(eos)).any()

    @pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
    @pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]], ids=str)
    def test_beams_go_on_from_the_first_token(self, model, plan, prompts, settings, rows):
        prompts = [tensor[rows] for tensor in prompts]
        payload = PrefillStage(model, plan)(*prompts)
        ids = torch.cat([payload.prompt_ids, payload.first_token], dim=1)
        mask = torch.nn.functional.pad(prompts[1], (0, 1), value=1)
        expected = masked_generate(
            model, plan, prompts[1], input_ids=ids, attention_mask=mask, max_new_tokens=6, **settings
        )
        assert torch.equal(hand_over(model, plan, prompts, max_new_tokens=7, **settings), expected)

    def test_several_sequences_of_a_prompt(self, model, plan, prompts):
        settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8}
        first = PrefillStage(model, plan)(*prompts, do_sample=False).first_token
        payload = PrefillStage(model, plan)(*prompts, do_sample=False)
        sequences = DecodeStage(model, plan).generate(payload, **settings)
        assert sequences.shape == (12, 24)
        assert torch.equal(sequences[:, :17], torch.cat([prompts[0], first], dim=1).repeat_interleave(3, dim=0))
        assert len({tuple(row) for row in sequences[:3].tolist()}) == 3
        # The same with rows that ended: they come back as often, and filled up.
        eos = int(first[1])
        sequences = DecodeStage(model, plan).generate(payload, eos_token_id=eos, pad_token_id=9, **settings)
        assert torch.equal(sequences[:, :17], torch.cat([prompts[0], first], dim=1).repeat_interleave(3, dim=0))
        assert (sequences[3:6, 17:] == 9).all()

    @pytest.mark.parametrize("helper", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=str)
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
    def test_assisted(self, model, plan, tiny_model, helper, max_new_tokens):
        pattern, _ = random_prompts([5])
        prompts = pattern.repeat(1, 4), torch.ones(1, 20, dtype=torch.long)
        helper = {key: value or tiny_model("llama", num_hidden_layers=2) for key, value in helper.items()}
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
        expected = masked_generate(
            model, plan, prompts[1], input_ids=prompts[0], attention_mask=prompts[1], **settings
        )
        assert torch.equal(hand_over(model, plan, prompts, **settings, **helper), expected)

    @pytest.mark.parametrize("ends", [False, True])
    def test_streamer(self, model, plan, ends):
        class Collector(BaseStreamer):
            tokens, ended = (), False

            def put(self, value):
                self.tokens += tuple(value.flatten().tolist())

            def end(self):
                self.ended = True

        prompts, streamer = random_prompts([16]), Collector()
        payload = PrefillStage(model, plan)(*prompts)
        eos = int(payload.first_token) if ends else None
        sequences = DecodeStage(model, plan).generate(payload, max_new_tokens=5, eos_token_id=eos, streamer=streamer)
        assert streamer.ended
        assert [list(streamer.tokens)] == sequences.tolist()

    def test_a_payload_can_be_used_again(self, model, plan, prompts):
        payload = PrefillStage(model, plan)(*prompts)
        before = payload.to_bytes()
        decode = DecodeStage(model, plan)
        sequences = decode.generate(payload, max_new_tokens=5)
        assert payload.to_bytes() == before
        assert torch.equal(decode.generate(payload, max_new_tokens=5), sequences)

    def test_returns_a_tensor_in_any_case(self, model, plan, prompts):
        payload = PrefillStage(model, plan)(*prompts)
        sequences = DecodeStage(model, plan).generate(payload, max_new_tokens=5, return_dict_in_generate=True)
        assert torch.equal(sequences, DecodeStage(model, plan).generate(payload, max_new_tokens=5))

    def test_leaves_no_hooks_and_no_bypass(self, model, prompts):
        plan = PruningPlan.empty(model, decode=StagePlan((1,)), kv=KV)
        modules = list(model.modules())
        hand_over(model, plan, prompts, max_new_tokens=3)
        assert list(model.modules()) == modules
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


class TestFirstTokenFromDecode:
    """Decode reads the prompt's last token: what one process does in which the window ends one token earlier."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"max_new_tokens": 1},
            {"max_new_tokens": 8, "repetition_penalty": 1.3},
            {"max_length": 20},
            {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
            {"max_new_tokens": 8, "min_new_tokens": 4, "eos_token_id": list(range(3, 200))},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]], ids=str)
    def test_equals_one_process(self, model, plan, prompts, settings, rows):
        prompts = [tensor[rows] for tensor in prompts]
        settings = {"do_sample": False, "pad_token_id": 0, **settings}
        payload = PrefillStage(model, plan)(*prompts, first_token="decode")
        actual = DecodeStage(model, plan).generate(KVPayload.from_bytes(payload.to_bytes()), **settings)
        expected = masked_generate(
            model, plan, prompts[1][:, :-1], input_ids=prompts[0], attention_mask=prompts[1], **settings
        )
        assert torch.equal(actual, expected)

    def test_returned_sequences_part_at_the_first_token(self, model, plan, prompts):
        payload = PrefillStage(model, plan)(*prompts, first_token="decode")
        torch.manual_seed(0)
        settings = {"num_return_sequences": 8, "do_sample": True, "max_new_tokens": 2, "temperature": 2.0}
        sequences = DecodeStage(model, plan).generate(payload, **settings)
        assert sequences.shape == (32, 18)
        assert len(set(sequences[:8, 16].tolist())) > 1

    def test_every_token_kept_equals_generate(self, model, prompts):
        plan = PruningPlan.empty(model)
        payload = PrefillStage(model, plan)(*prompts, first_token="decode")
        expected = model.generate(input_ids=prompts[0], attention_mask=prompts[1], max_new_tokens=8, do_sample=False)
        assert torch.equal(DecodeStage(model, plan).generate(payload, max_new_tokens=8, do_sample=False), expected)


class TestQuantized:
    def test_decodes_what_is_left_after_rounding(self, model, plan, prompts):
        payload = PrefillStage(model, plan, quantization="int8")(*prompts, do_sample=False)
        rounded = replace(
            payload, quantization=None, entries={block: payload.entries_of(block) for block in payload.entries}
        )
        decode = DecodeStage(model, plan)
        received = KVPayload.from_bytes(payload.to_bytes())
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(decode.generate(received, **settings), decode.generate(rounded, **settings))

    def test_more_bits_are_nearer(self, model, plan, batch):
        logits = {}
        with torch.no_grad():
            for kind in (None, "int8", "int4"):
                payload = PrefillStage(model, plan, quantization=kind).forward(
                    batch["prompt_ids"], batch["prompt_mask"]
                )
                logits[kind] = DecodeStage(model, plan).forward(
                    payload, batch["completion_ids"], batch["completion_mask"]
                )
        errors = [(logits[kind] - logits[None]).abs().mean() for kind in ("int8", "int4")]
        assert 0 < errors[0] < errors[1] / 4


class TestExportedPair:
    @pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
    def test_equals_the_views_of_the_dense_model(self, tiny_model, architecture, exported, batch):
        model = tiny_model(architecture)
        plan = PruningPlan.empty(model, prefill=StagePlan((1,)), decode=StagePlan((1, 4), ((2, 3),)), kv=KV)
        prefill, decode = (exported(model, plan, stage) for stage in ("prefill", "decode"))
        prompts = batch["prompt_ids"], batch["prompt_mask"]
        settings = {"max_new_tokens": 8, "do_sample": False}
        sent = PrefillStage(prefill, plan)(*prompts)
        wire = sent.to_bytes()
        sequences = DecodeStage(decode, plan).generate(KVPayload.from_bytes(wire), **settings)
        assert torch.equal(sequences, hand_over(model, plan, prompts, **settings))
        # One of them a view, the other a checkpoint.
        payload = PrefillStage(model, plan)(*prompts)
        assert torch.equal(DecodeStage(decode, plan).generate(payload, **settings), sequences)
        if architecture != "gemma2":  # how much of the dense model slides is more than its checkpoint knows
            assert payload.to_bytes() == wire
        for block, pair in payload.entries.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, sent.entries[block], strict=True))


class TestPlacement:
    """Entries go, block by block, to where the model is, in what it computes in."""

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
    def test_stages_of_different_dtypes(self, tiny_model, plan, prompts, dtypes):
        models = [tiny_model("llama").to(dtype) for dtype in dtypes]
        for stage_model in models:
            stage_model.generation_config.eos_token_id = None
        prefill, decode = PrefillStage(models[0], plan), DecodeStage(models[1], plan, fingerprint=None)
        decode.fingerprint = prefill.fingerprint
        payload = KVPayload.from_bytes(prefill(*prompts, do_sample=False).to_bytes())
        assert next(iter(payload.entries.values()))[0].dtype == dtypes[0]
        with TokenAwareCache.from_payload(payload, plan, models[1]) as cache:
            assert {states.dtype for layer in cache.layers for states in (layer.keys, layer.values)} == {dtypes[1]}
        assert decode.generate(payload, max_new_tokens=5, do_sample=False).shape == (4, 16 + 5)

    @pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
    def test_entries_are_moved_and_the_payload_stays(self, model, plan, prompts, quantization):
        payload = PrefillStage(model, plan, quantization=quantization)(*prompts)
        with TokenAwareCache.from_payload(payload, plan, model.to("meta")) as cache:
            devices = {states.device.type for layer in cache.layers for states in (layer.keys, layer.values)}
        assert devices == {"meta"}
        assert {keys.to("cpu").nbytes > 0 for keys, _ in payload.entries.values()} == {True}


@pytest.mark.gpu
class TestOnAnAccelerator:
    """Of prompts that are padded on the left, as `prompts` are."""

    @pytest.mark.parametrize("token_choice", TOKEN_CHOICES)
    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
    def test_tokens_are_those_of_the_cpu(self, model, plan, prompts, accelerator, token_choice, settings):
        plan = replace(plan, decode=StagePlan((2, 4)), kv=replace(KV, token_choice=token_choice))
        settings = settings | {"max_new_tokens": 12, "do_sample": False}
        expected = hand_over(model, plan, prompts, **settings)
        actual = hand_over(model.to(accelerator), plan, [tensor.to(accelerator) for tensor in prompts], **settings)
        assert actual.device == accelerator
        assert torch.equal(actual.cpu(), expected)

    @pytest.mark.parametrize("prefill_is_there", [True, False])
    def test_one_stage_there_and_the_other_on_the_cpu(
        self, model, plan, prompts, tiny_model, accelerator, prefill_is_there
    ):
        settings = {"max_new_tokens": 12, "do_sample": False}
        expected = hand_over(model, plan, prompts, **settings)
        there = tiny_model("llama").to(accelerator)
        there.generation_config.eos_token_id = None
        models = (there, model) if prefill_is_there else (model, there)
        payload = PrefillStage(models[0], plan)(*(tensor.to(models[0].device) for tensor in prompts), **settings)
        received = KVPayload.from_bytes(payload.to_bytes())
        assert torch.equal(DecodeStage(models[1], plan).generate(received, **settings).cpu(), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
    def test_the_wire_changes_no_token(self, model, plan, prompts, accelerator, dtype, quantization):
        model, prompts = model.to(accelerator, dtype), [tensor.to(accelerator) for tensor in prompts]
        settings = {"max_new_tokens": 12, "do_sample": False}
        payload = PrefillStage(model, plan, quantization=quantization)(*prompts, **settings)
        received = KVPayload.from_bytes(payload.to_bytes())
        assert received.device_of(0).type == "cpu" and payload.device_of(0) == accelerator
        for block in payload.entries:
            for sent, states in zip(payload.entries_of(block), received.entries_of(block, accelerator), strict=True):
                assert sent.dtype == states.dtype == dtype
                assert torch.equal(sent, states)
        decode = DecodeStage(model, plan)
        assert torch.equal(decode.generate(received, **settings), decode.generate(payload, **settings))


class TestForeignPayloads:
    def test_another_plan(self, model, plan, prompts, batch):
        other = PruningPlan.empty(model, kv=KVPlan((0, 1, 3, 5), 2, 5))
        payload = PrefillStage(model, other)(*prompts)
        with pytest.raises(PayloadError, match="decode runs plan"):
            DecodeStage(model, plan).generate(payload, max_new_tokens=3)
        with pytest.raises(PayloadError, match="decode runs plan"):
            DecodeStage(model, plan).forward(payload, batch["completion_ids"], batch["completion_mask"])

    def test_another_model(self, model, plan, prompts, batch, tiny_model):
        payload = PrefillStage(tiny_model("llama", seed=1), plan)(*prompts)
        with pytest.raises(PayloadError, match="another model"):
            DecodeStage(model, plan).generate(payload, max_new_tokens=3)
        with pytest.raises(PayloadError, match="another model"):
            DecodeStage(model, plan).forward(payload, batch["completion_ids"], batch["completion_mask"])

    def test_no_first_token(self, model, plan, prompts):
        payload = PrefillStage(model, plan).forward(*prompts)
        with pytest.raises(PayloadError, match="no first token"):
            DecodeStage(model, plan).generate(payload, max_new_tokens=3)

    def test_missing_block(self, model, plan, prompts):
        payload = PrefillStage(model, plan)(*prompts)
        del payload.entries[3]
        with pytest.raises(PayloadError, match="block 3"):
            DecodeStage(model, plan).generate(payload, max_new_tokens=3)
