import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cache_states import KV, hooks_of, repetitive_prompt
from masked_reference import (
    cached_logits,
    filled_cache,
    masked_generate,
    masked_logits,
    random_prompts,
    with_completion,
)
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.kv import TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


class TestGenerate:
    """Every way to call generate gives what it gives with the dropped tokens masked and no cache."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": False},
            {"do_sample": True, "temperature": 0.7, "top_k": 0},
            {"do_sample": True, "num_return_sequences": 3},
            {"num_beams": 2},
            {"num_beams": 3, "num_return_sequences": 2},
            {"num_beams": 2, "do_sample": True},
            {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ],
        ids=str,
    )
    def test_left_padded_batch(self, model, plan, settings):
        input_ids, mask = random_prompts([16, 3, 9, 6])
        settings = settings | {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 8}
        torch.manual_seed(3)
        expected = masked_generate(model, plan, mask, **settings)
        torch.manual_seed(3)
        with TokenAwareCache(plan, model) as cache:
            actual = model.generate(past_key_values=cache, **settings)
        assert torch.equal(actual, expected)

    def test_rows_that_end_early(self, llama):
        plan = PruningPlan.empty(llama, kv=KV)
        input_ids, mask = random_prompts([16, 3, 9, 6])
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        free = masked_generate(llama, plan, mask, **settings)
        settings |= {"eos_token_id": [int(free[0, 18]), int(free[2, 21])], "pad_token_id": 0}
        expected = masked_generate(llama, plan, mask, **settings)
        assert (expected == 0).sum() > (input_ids == 0).sum()
        with TokenAwareCache(plan, llama) as cache:
            assert torch.equal(llama.generate(past_key_values=cache, **settings), expected)

    @pytest.mark.parametrize("chunk", [1, 5, 16, 50])
    def test_prompt_in_chunks(self, model, plan, chunk):
        input_ids, mask = random_prompts([16, 3, 9, 6])
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        expected = masked_generate(model, plan, mask, **settings)
        with TokenAwareCache(plan, model, prompt_tokens=16) as cache:
            assert torch.equal(model.generate(past_key_values=cache, prefill_chunk_size=chunk, **settings), expected)

    @pytest.mark.parametrize("assistant", ["prompt lookup", "model", "same model"])
    def test_assisted(self, model, plan, tiny_model, assistant):
        input_ids, mask = repetitive_prompt()
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        expected = masked_generate(model, plan, mask, **settings)
        helper = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "model": {"assistant_model": tiny_model("llama", num_hidden_layers=2, seed=1)},
            "same model": {"assistant_model": model},  # many candidates are accepted
        }[assistant]
        with TokenAwareCache(plan, model, prompt_tokens=input_ids.shape[1]) as cache:
            assert torch.equal(model.generate(past_key_values=cache, **helper, **settings), expected)

    @pytest.mark.parametrize("helper", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=str)
    def test_assisted_without_the_prompts_length_is_refused(self, llama, helper):
        input_ids, mask = repetitive_prompt()
        helper = {key: value or llama for key, value in helper.items()}
        with TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama) as cache:
            with pytest.raises(ValueError, match="prompt_tokens"):
                llama.generate(
                    input_ids=input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **helper
                )

    @pytest.mark.parametrize(
        "helper", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 1, "do_sample": True}], ids=str
    )
    def test_further_turns(self, model, plan, helper):
        # What later turns bring is kept, like generated tokens; only the first prompt is shortened.
        input_ids, prompt_mask = repetitive_prompt()
        sequence, mask = input_ids, prompt_mask
        with TokenAwareCache(plan, model, prompt_tokens=input_ids.shape[1]) as cache:
            for turn in range(3):
                settings = {"input_ids": sequence, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
                plain = {key: value for key, value in helper.items() if key != "prompt_lookup_num_tokens"}
                torch.manual_seed(turn)
                expected = masked_generate(model, plan, prompt_mask, **(settings | plain))
                torch.manual_seed(turn)
                sequence = model.generate(past_key_values=cache, **(settings | helper))
                assert torch.equal(sequence, expected)
                sequence, mask = with_completion(sequence, torch.ones_like(sequence), 7, seed=turn)

    def test_further_turns_of_a_padded_batch(self, model, plan):
        input_ids, prompt_mask = random_prompts([16, 3, 9, 6])
        sequence, mask = input_ids, prompt_mask
        with TokenAwareCache(plan, model) as cache:
            for turn in range(3):
                settings = {"input_ids": sequence, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
                expected = masked_generate(model, plan, prompt_mask, **settings)
                sequence = model.generate(past_key_values=cache, **settings)
                assert torch.equal(sequence, expected)
                mask = torch.nn.functional.pad(mask, (0, 5), value=1)
                sequence, mask = with_completion(sequence, mask, 4, seed=turn)

    def test_streamer_gets_the_tokens(self, llama):
        class Collector(BaseStreamer):
            def __init__(self):
                self.tokens, self.ended = [], False

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.ended = True

        plan, streamer = PruningPlan.empty(llama, kv=KV), Collector()
        input_ids, mask = random_prompts([16])
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        with TokenAwareCache(plan, llama) as cache:
            llama.generate(past_key_values=cache, streamer=streamer, **settings)
        assert streamer.ended
        assert [streamer.tokens] == masked_generate(llama, plan, mask, **settings).tolist()

    def test_stopping_criteria(self, llama):
        class AfterTokens(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

        plan = PruningPlan.empty(llama, kv=KV)
        input_ids, mask = random_prompts([16, 5])
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        settings["stopping_criteria"] = [AfterTokens()]
        with TokenAwareCache(plan, llama) as cache:
            actual = llama.generate(past_key_values=cache, **settings)
        assert actual.shape == (2, 20)
        assert torch.equal(actual, masked_generate(llama, plan, mask, **settings))

    def test_inputs_embeds(self, llama):
        plan = PruningPlan.empty(llama, kv=KV)
        input_ids, mask = random_prompts([16, 5])
        settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        expected = masked_generate(llama, plan, mask, input_ids=input_ids, **settings)[:, 16:]
        embeddings = llama.get_input_embeddings()(input_ids)
        with TokenAwareCache(plan, llama) as cache:
            assert torch.equal(llama.generate(inputs_embeds=embeddings, past_key_values=cache, **settings), expected)


def test_two_threads_with_a_cache_each_do_not_meet(model, plan):
    """Prompts of other lengths and paddings, on one model, whose hooks all see all forwards."""
    prompts = [random_prompts([30, 11], seed=1), random_prompts([24, 24], seed=2)]
    requests = [{"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6} for ids, mask in prompts]
    expected = [masked_generate(model, plan, mask, **r) for r, (_, mask) in zip(requests, prompts, strict=True)]

    def answer(request):
        with TokenAwareCache(plan, model) as cache:
            return model.generate(past_key_values=cache, **request)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for actual, wanted in zip(pool.map(answer, requests), expected, strict=True):
                assert torch.equal(actual, wanted)


class TestLifetime:
    def test_hooks_go_with_close_context_and_garbage_collection(self, llama):
        plan = PruningPlan.empty(llama, kv=KV)
        assert hooks_of(llama) == 0
        cache = TokenAwareCache(plan, llama)
        assert hooks_of(llama) > 0
        cache.close()
        cache.close()
        assert hooks_of(llama) == 0
        with pytest.raises(KeyError), TokenAwareCache(plan, llama):
            raise KeyError
        assert hooks_of(llama) == 0
        cache, *_ = filled_cache(plan, llama, *random_prompts([16, 3]), completion_tokens=2)
        assert hooks_of(llama) > 0
        del cache
        gc.collect()
        assert hooks_of(llama) == 0

    def test_two_caches_and_a_plain_one_at_once(self, model):
        plans = [PruningPlan.empty(model, kv=KVPlan(blocks, 1, 3)) for blocks in ((0, 1, 3, 5), (1, 4, 5))]
        prompts = [random_prompts([16, 3], seed=1), random_prompts([12, 12], seed=2), random_prompts([9, 14], seed=3)]
        caches = [TokenAwareCache(plan, model) for plan in plans] + [DynamicCache(config=model.config)]
        plans.append(PruningPlan.empty(model))
        prompts = [with_completion(*prompt, 6) for prompt in prompts]
        expected = [
            masked_logits(model, plan, *prompt, prompt[0].shape[1] - 6)
            for plan, prompt in zip(plans, prompts, strict=True)
        ]
        actual = [[], [], []]
        for size in (0, 1, 3, 2):  # 0: the prompt
            for cache, (input_ids, mask), logits in zip(caches, prompts, actual, strict=True):
                logits.append(cached_logits(model, cache, input_ids, mask, [size or input_ids.shape[1] - 6]))
        for logits, reference, (_, mask) in zip(actual, expected, prompts, strict=True):
            real = mask.bool()
            torch.testing.assert_close(torch.cat(logits, dim=1)[real], reference[real], atol=5e-5, rtol=0)

    def test_model_without_a_cache_is_undisturbed(self, model, plan):
        prompt = with_completion(*random_prompts([16, 3]), 6)
        expected = masked_logits(model, PruningPlan.empty(model), *prompt, 16)
        cache, *_ = filled_cache(plan, model, *random_prompts([16, 3]), completion_tokens=6)
        assert torch.equal(masked_logits(model, PruningPlan.empty(model), *prompt, 16), expected)
        assert cache.get_seq_length() == 22

    @pytest.mark.parametrize("moment", ["prompt", "completion"])
    def test_exception_inside_a_forward(self, model, plan, moment):
        input_ids, mask = with_completion(*random_prompts([16, 3]), 6)
        expected = masked_logits(model, plan, input_ids, mask, 16)
        dense = masked_logits(model, PruningPlan.empty(model), input_ids, mask, 16)
        cache = TokenAwareCache(plan, model)
        if moment == "completion":
            cached_logits(model, cache, input_ids, mask, [16])

        def fail(*args):
            raise KeyError("out of memory, say")

        handle = get_blocks(model)[3].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            cached_logits(model, cache, input_ids, mask, [16 if moment == "prompt" else 3])
        handle.remove()
        assert torch.equal(masked_logits(model, PruningPlan.empty(model), input_ids, mask, 16), dense)
        # A block called by itself gets the mask that it is given: no forward with the cache is under way.
        assert not cache._hooks.is_active
        cache.reset()
        real = mask.bool()
        actual = cached_logits(model, cache, input_ids, mask, [16, 6])
        torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)

    def test_reset_takes_a_new_prompt_of_other_shape(self, model, plan):
        cache, *_ = filled_cache(plan, model, *random_prompts([16, 3]), completion_tokens=2)
        cache.reset()
        assert (cache.get_seq_length(), cache.nbytes, cache.batch_rows) == (0, 0, 0)
        # Not 7: its three tokens before the observed ones would all have the same neighbours, and attention no choice.
        input_ids, mask = with_completion(*random_prompts([8, 11, 4], seed=4), 5)
        real = mask.bool()
        actual = cached_logits(model, cache, input_ids, mask, [11, 2, 3])
        expected = masked_logits(model, plan, input_ids, mask, 11)
        torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)

    def test_copy_goes_its_own_way(self, model, plan):
        # Several answers to one prompt from copies of the cache that has read it.
        cache, *_ = filled_cache(plan, model, *random_prompts([16, 3]), completion_tokens=0)
        for seed in (1, 2):
            duplicate = copy.deepcopy(cache)
            input_ids, mask = with_completion(*random_prompts([16, 3]), 6, seed=seed)
            actual = cached_logits(model, duplicate, input_ids, mask, [1, 3, 2])
            expected = masked_logits(model, plan, input_ids, mask, 16)[:, 16:]
            torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)
            assert cache.get_seq_length() == 16


class TestMemory:
    @pytest.mark.parametrize("lengths", [[16], [16, 16], [9, 3], [5, 2]], ids=str)
    def test_held_bytes_are_what_the_plan_says(self, model, plan, lengths):
        cache, *_ = filled_cache(plan, model, *random_prompts(lengths), completion_tokens=5)
        prompt_tokens = max(lengths)
        held = 0
        for block, layer in enumerate(cache.layers):
            tokens = plan.kept_prompt_tokens(block, prompt_tokens) + 5
            if layer.is_sliding:
                tokens = min(prompt_tokens + 5, layer.sliding_window - 1)
            assert layer.keys.shape[-2] == layer.values.shape[-2] == tokens
            held += 2 * len(lengths) * layer.keys.shape[1] * tokens * layer.keys.shape[3] * 4
        assert cache.nbytes == held

    def test_no_full_length_copy_survives_the_prompt(self, llama):
        plan = PruningPlan.empty(llama, kv=KVPlan(tuple(range(6)), 2, 4))
        for lengths in ([16, 16], [16, 3]):
            cache, *_ = filled_cache(plan, llama, *random_prompts(lengths), completion_tokens=0)
            for layer in cache.layers:
                for states in (layer.keys, layer.values):
                    assert states.untyped_storage().nbytes() == 2 * 2 * 6 * 16 * 4

    @pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
    @pytest.mark.parametrize("sizes", [[20], [9, 11]], ids=str)
    def test_sliding_windows_hold_no_more_than_themselves(self, tiny_model, architecture, sizes):
        model = tiny_model(architecture)
        cache = TokenAwareCache(PruningPlan.empty(model, kv=KVPlan(tuple(range(6)), 1, 1)), model, prompt_tokens=20)
        plain = DynamicCache(config=model.config)
        prompts = random_prompts([20, 20])
        assert torch.equal(*(cached_logits(model, held, *prompts, sizes) for held in (cache, plain)))
        sliding = [number for number, is_sliding in enumerate(cache.is_sliding) if is_sliding]
        assert sliding == [number for number, is_sliding in enumerate(plain.is_sliding) if is_sliding] != []
        for number in sliding:
            for name in ("keys", "values"):
                held, expected = (getattr(which.layers[number], name) for which in (cache, plain))
                assert torch.equal(held, expected)
                assert held.untyped_storage().nbytes() == 2 * 2 * 7 * 16 * 4  # no prompt behind it
        if architecture == "mistral":
            assert cache.token_aware_layers == []


class TestBypassedBlocks:
    @pytest.mark.parametrize("bypassed", [(0,), (0, 1, 2), (2, 5)])
    def test_cache_of_the_running_blocks(self, model, bypassed):
        plan = PruningPlan.empty(model, kv=KV, decode=StagePlan(bypassed))
        running = plan.kept_blocks("decode")
        input_ids, mask = with_completion(*random_prompts([16, 3]), 6)
        with bypass_blocks(model, bypassed):
            with TokenAwareCache(plan, model, running_blocks=running) as cache:
                actual = cached_logits(model, cache, input_ids, mask, [16, 1, 3, 2])
                assert cache.get_seq_length() == 22
            expected = masked_logits(model, plan, input_ids, mask, 16)
        real = mask.bool()
        torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)
        assert all(cache.layers[block].get_seq_length() == 0 for block in bypassed)


@pytest.mark.gpu
class TestMemoryOfAnAccelerator:
    PROMPT_TOKENS = 2048
    # What is kept beside keys and values, and up to 512 bytes of rounding for each tensor. Keys of a whole prompt take
    # 512 KiB.
    MOST_BESIDE = 128 * 1024

    @pytest.fixture
    def long_model(self, tiny_model, accelerator):
        return tiny_model("llama", max_position_embeddings=4096).to(accelerator)

    @staticmethod
    def allocated(device):
        gc.collect()
        torch.accelerator.synchronize(device)
        return torch.accelerator.memory_allocated(device)

    @pytest.mark.parametrize("token_choice", TOKEN_CHOICES)
    def test_it_is_that_of_the_kept_tokens_and_steps_copy_none(self, long_model, accelerator, token_choice):
        plan = PruningPlan.empty(long_model, kv=KVPlan((0, 1, 3, 5), 16, 112, token_choice))
        prompts = random_prompts([self.PROMPT_TOKENS, self.PROMPT_TOKENS - 100])
        ids, mask = (tensor.to(accelerator) for tensor in with_completion(*prompts, 31))
        for _ in range(2):  # the first time, libraries allocate what they need for themselves
            before = self.allocated(accelerator)
            cache = TokenAwareCache(plan, long_model)
            cached_logits(long_model, cache, ids, mask, [self.PROMPT_TOKENS])
            grown = self.allocated(accelerator) - before
            held = cache.nbytes
            cached_logits(long_model, cache, ids, mask, [1])
            pointers, begun = self.pointers(cache), self.allocated(accelerator) - before
            for _ in range(30):
                cached_logits(long_model, cache, ids, mask, [1])
                assert self.pointers(cache) == pointers
            ended, reserved = self.allocated(accelerator) - before, cache.nbytes_allocated
            cache.close()
            del cache
        per_token = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, head_dim, bytes
        assert held == per_token * (2 * self.PROMPT_TOKENS + 4 * 128)
        assert held <= grown < held + self.MOST_BESIDE
        assert reserved <= begun < reserved + self.MOST_BESIDE
        assert reserved <= ended < reserved + self.MOST_BESIDE

    @staticmethod
    def pointers(cache):
        return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
