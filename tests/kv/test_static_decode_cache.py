import gc
import shutil
from dataclasses import replace

import pytest
import torch
from masked_reference import random_prompts
from tiny_configs import ARCHITECTURES
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import DynamicCache

from hf_pdprune.blocks import get_blocks
from hf_pdprune.evaluation import handing_over_all_tokens
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.kv import StaticDecodeCache, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


KV = KVPlan((0, 1, 3, 5), 2, 4, block_windows=((3, 1, 7),))
LENGTHS = [16, 3, 9]
SLIDING = ("mistral", "gemma2", "gemma3_text")


def plan_of(model, kv=KV, missing=(2,)):
    return PruningPlan.empty(model, decode=StagePlan(missing), kv=kv)


def hand_over(model, plan, lengths=LENGTHS, **kwargs):
    ids, mask = (tensor.to(model.device) for tensor in random_prompts(lengths))
    return PrefillStage(model, plan)(ids, mask, **kwargs)


def after_prompt(model, plan, lengths=LENGTHS):
    """A cache that has read a prompt, and what generate goes on with."""
    ids, mask = (tensor.to(model.device) for tensor in random_prompts(lengths))
    cache = TokenAwareCache(plan, model)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]
    token = logits.argmax(dim=-1)
    return cache, torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)


def steps(model, forward, cache, ids, mask, number=6):
    """The logits of some decode steps, as generate calls the model."""
    logits = []
    with torch.no_grad():
        for _ in range(number):
            positions = mask.sum(-1, keepdim=True) - 1
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, past_key_values=cache, attention_mask=mask, position_ids=positions
            )
            logits.append(forward(**inputs).logits[:, -1].clone())
            token = logits[-1].argmax(dim=-1, keepdim=True)
            ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("architecture", "token_choice", "lengths"),
    [(name, choice, LENGTHS) for name in ARCHITECTURES if name not in SLIDING for choice in TOKEN_CHOICES]
    + [("llama", choice, [12, 12]) for choice in TOKEN_CHOICES],
)
def test_answers_are_the_same(tiny_model, architecture, token_choice, lengths):
    model = tiny_model(architecture, initializer_range=0.2)
    plan = plan_of(model, replace(KV, token_choice=token_choice))
    stages = [DecodeStage(model, plan, static_shapes=static) for static in (False, True)]
    for first_token in ("prefill", "decode"):
        payload = hand_over(model, plan, lengths, first_token=first_token)
        for settings in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
            answers = []
            for stage in stages:
                torch.manual_seed(0)
                answers.append(stage.generate(payload, **{"max_new_tokens": 9, "do_sample": False, **settings}))
            assert torch.equal(*answers), (first_token, settings)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_a_decode_step_is_compiled_once(tiny_model, architecture):
    model = tiny_model(architecture, initializer_range=0.2)
    plan = plan_of(model, missing=())
    cache, ids, mask = after_prompt(model, plan)
    with cache:
        expected = steps(model, model, cache, ids, mask)
    counter = CompileCounter()
    # One graph for the whole of the model, or an error.
    compiled = torch.compile(model.__call__, backend=counter, fullgraph=True)
    cache, ids, mask = after_prompt(model, plan)
    static = StaticDecodeCache(cache, model, 6)
    torch.testing.assert_close(steps(model, compiled, static, ids, mask), expected, atol=1e-5, rtol=1e-4)
    # Other prompts, padded otherwise and of other lengths, in the same memory and with the same code.
    for lengths in ([14, 5, 11], [9, 9, 9], [19, 2, 18]):
        cache, ids, mask = after_prompt(model, plan, lengths)
        with cache:
            expected = steps(model, model, cache, ids, mask)
        cache, ids, mask = after_prompt(model, plan, lengths)
        assert static.has_room_for(cache, 6)
        static.fill(cache)
        torch.testing.assert_close(steps(model, compiled, static, ids, mask), expected, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_a_stage_keeps_it_for_the_next_prompts(tiny_llama):
    plan = plan_of(tiny_llama, missing=())
    plain, stage = DecodeStage(tiny_llama, plan), DecodeStage(tiny_llama, plan, static_shapes=True)
    caches = []
    for lengths, new_tokens in (([16, 3], 9), ([4, 11], 9), ([20, 20], 5), ([16, 3], 200), ([16, 3, 5], 200)):
        payload = hand_over(tiny_llama, plan, lengths)
        settings = {"max_new_tokens": new_tokens, "do_sample": False}
        assert torch.equal(stage.generate(payload, **settings), plain.generate(payload, **settings))
        caches.append(stage._static_cache)
    assert caches[0] is caches[1] is caches[2]
    assert caches[2] is not caches[3]  # more tokens than there is room for
    assert caches[3] is not caches[4]  # other rows
    del caches, payload
    gc.collect()
    assert sum(len(block._forward_pre_hooks) for block in get_blocks(tiny_llama)) == 4  # of the last one


def test_memory_is_that_of_the_window_and_the_answer(tiny_llama):
    cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, KVPlan((0, 3), 2, 4), missing=()), [16, 16])
    with StaticDecodeCache(cache, tiny_llama, 10) as static:
        slots = [layer.keys.shape[-2] for layer in static.layers]
        assert slots == [6 + 10, 128, 128, 6 + 10, 128, 128]
        config = tiny_llama.config
        per_token = 2 * 2 * config.num_key_value_heads * config.head_dim * 4
        assert static.nbytes_allocated == sum(slots) * per_token
        assert int(static.get_seq_length()) == 16
        assert static.get_mask_sizes(1, 0) == (128, 0)
        assert static.is_compileable


def test_the_hooks_go_with_the_cache(tiny_llama):
    blocks = get_blocks(tiny_llama)
    cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
    with StaticDecodeCache(cache, tiny_llama, 4):
        assert sum(len(block._forward_pre_hooks) for block in blocks) == 4  # none of the cache that it comes from
    assert not any(block._forward_pre_hooks for block in blocks)
    cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
    static = StaticDecodeCache(cache, tiny_llama, 4)
    del static
    gc.collect()
    assert not any(block._forward_pre_hooks for block in blocks)


def test_forwards_with_another_cache_are_left_alone(tiny_llama):
    ids, mask = random_prompts([8, 8])
    expected = tiny_llama(input_ids=ids, attention_mask=mask).logits
    cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
    with StaticDecodeCache(cache, tiny_llama, 4):
        for other in (None, DynamicCache(), DynamicCache(config=tiny_llama.config)):
            output = tiny_llama(input_ids=ids, attention_mask=mask, past_key_values=other)
            torch.testing.assert_close(output.logits, expected)


def test_what_a_cache_is_not_filled_from(tiny_llama, tiny_model):
    static = StaticDecodeCache(after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))[0], tiny_llama, 8)
    other_windows = replace(KV, block_windows=())
    caches = {
        "other windows": after_prompt(tiny_llama, plan_of(tiny_llama, other_windows, ())),
        "none at all": after_prompt(tiny_llama, plan_of(tiny_llama, KVPlan(), ())),
        "other rows": after_prompt(tiny_llama, plan_of(tiny_llama, missing=()), [16, 3]),
    }
    for name, (cache, _, _) in caches.items():
        assert not static.has_room_for(cache, 8), name
    double = tiny_model("llama").double()
    assert not static.has_room_for(after_prompt(double, plan_of(double, missing=()))[0], 8)
    same, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()), [9, 9, 4])
    assert static.has_room_for(same, 8) and not static.has_room_for(same, 200)
    # Short prompts do not go over what a long one has left.
    long = StaticDecodeCache(after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))[0], tiny_llama, 400)
    assert not long.has_room_for(same, 8) and long.has_room_for(same, 300)


def test_handing_over_all_tokens_with_the_stage_that_did_not(tiny_llama):
    plan = plan_of(tiny_llama, missing=())
    stages = [PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan, static_shapes=True)]
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids, mask = random_prompts(LENGTHS)
    stages[1].generate(stages[0](ids, mask), max_new_tokens=30, do_sample=False)
    prefill, decode = map(handing_over_all_tokens, stages)
    expected = tiny_llama.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(decode.generate(prefill(ids, mask), **settings), expected)


def test_what_is_kept_is_part_of_no_graph_and_no_inference_mode(tiny_llama):
    plan = plan_of(tiny_llama, missing=())
    ids, mask = random_prompts([8, 8])
    cache = TokenAwareCache(plan, tiny_llama)
    tiny_llama(input_ids=ids, attention_mask=mask, past_key_values=cache)  # with a graph
    static = StaticDecodeCache(cache, tiny_llama, 4)
    assert not any(layer.keys.requires_grad for layer in static.layers)
    stage = DecodeStage(tiny_llama, plan, static_shapes=True)
    answers = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            answers.append(stage.generate(hand_over(tiny_llama, plan), max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.gpu
class TestOnAnAccelerator:
    @pytest.fixture(autouse=True)
    def nothing_compiled(self):
        torch.compiler.reset()
        counters.clear()
        yield
        torch.compiler.reset()

    @pytest.fixture
    def model(self, tiny_model, accelerator):
        model = tiny_model("llama", num_hidden_layers=2, initializer_range=0.2).to(accelerator)
        model.generation_config.eos_token_id = None
        return model

    @pytest.mark.parametrize("backend", ["cudagraphs", "inductor"])
    def test_a_compiled_step_gives_the_eager_tokens(self, model, backend):
        check_compiler(backend)
        plan = plan_of(model, KVPlan((0,), 2, 4), missing=())
        compiled, static = torch.compile(model.__call__, backend=backend, fullgraph=True), None
        for lengths in (LENGTHS, [14, 5, 11], [9, 9, 9]):
            cache, ids, mask = after_prompt(model, plan, lengths)
            with cache:
                expected = steps(model, model, cache, ids, mask)
            cache, ids, mask = after_prompt(model, plan, lengths)
            if static is None:
                static = StaticDecodeCache(cache, model, 6)
            else:
                static.fill(cache)
            actual = steps(model, compiled, static, ids, mask)
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
            assert torch.equal(actual.argmax(-1), expected.argmax(-1))
        assert counters["stats"]["unique_graphs"] == 1

    def test_generate_compiles_its_steps(self, model):
        check_compiler("inductor")
        plan = plan_of(model, KVPlan((0,), 2, 4, "attention"), missing=())
        plain, stage = DecodeStage(model, plan), DecodeStage(model, plan, static_shapes=True)
        for lengths in (LENGTHS, [14, 5, 11]):
            payload = hand_over(model, plan, lengths, do_sample=False)
            settings = {"max_new_tokens": 9, "do_sample": False}
            assert torch.equal(stage.generate(payload, **settings), plain.generate(payload, **settings))
        assert counters["stats"]["unique_graphs"] > 0


def check_compiler(backend):
    if backend == "inductor" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("inductor needs a C compiler")


class TestErrors:
    def test_more_tokens_than_there_is_room_for(self, tiny_llama):
        cache, ids, mask = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
        with StaticDecodeCache(cache, tiny_llama, 3) as static:
            steps(tiny_llama, tiny_llama, static, ids, mask, number=3)
        cache, ids, mask = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
        with StaticDecodeCache(cache, tiny_llama, 3) as static:
            with pytest.raises(ValueError, match="full: make it with a larger max_new_tokens"):
                steps(tiny_llama, tiny_llama, static, ids, mask, number=4)

    def test_attention_by_distance(self, tiny_model):
        model = tiny_model("falcon", alibi=True, new_decoder_architecture=False)
        cache, _, _ = after_prompt(model, plan_of(model, KVPlan(), ()))
        with pytest.raises(ValueError, match="ALiBi"):
            StaticDecodeCache(cache, model, 4)

    @pytest.mark.parametrize("architecture", SLIDING)
    def test_sliding_windows(self, tiny_model, architecture):
        model = tiny_model(architecture)
        plan = plan_of(model)
        with pytest.raises(ValueError, match="sliding window"):
            DecodeStage(model, plan, static_shapes=True).generate(hand_over(model, plan), max_new_tokens=4)

    def test_before_the_end_of_the_prompt(self, tiny_llama):
        cache = TokenAwareCache(plan_of(tiny_llama), tiny_llama)
        with pytest.raises(ValueError, match="read to its end"):
            StaticDecodeCache(cache, tiny_llama, 4)

    def test_no_room_at_all(self, tiny_llama):
        cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
        with pytest.raises(ValueError, match="at least 1"):
            StaticDecodeCache(cache, tiny_llama, 0)

    def test_going_back_and_starting_anew(self, tiny_llama):
        cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
        static = StaticDecodeCache(cache, tiny_llama, 4)
        with pytest.raises(ValueError, match="does not go back"):
            static.crop(-1)
        with pytest.raises(ValueError, match="does not read prompts"):
            static.reset()

    def test_flash_attention(self, tiny_llama, monkeypatch):
        cache, _, _ = after_prompt(tiny_llama, plan_of(tiny_llama, missing=()))
        monkeypatch.setattr(tiny_llama.config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="not flash attention"):
            StaticDecodeCache(cache, tiny_llama, 4)
