from dataclasses import replace

import pytest
import torch
from cache_states import KV, assert_same_states, states_of
from masked_reference import (
    cached_logits,
    filled_cache,
    masked_logits,
    random_prompts,
    with_completion,
)

from hf_pdprune.kv import TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan


class TestCrop:
    PROMPTS = [16, 3, 9]

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # sliding windows: below, and in assisted decoding
    def test_back_to_an_earlier_length_equals_never_having_gone_on(self, tiny_model, architecture):
        model = tiny_model(architecture)
        plan = PruningPlan.empty(model, kv=KV)
        cache, input_ids, mask = filled_cache(plan, model, *random_prompts(self.PROMPTS), completion_tokens=6)
        for length in (20, 16):
            cache.crop(length - cache.get_seq_length())
            untouched, *_ = filled_cache(plan, model, *random_prompts(self.PROMPTS), completion_tokens=length - 16)
            assert cache.get_seq_length() == untouched.get_seq_length() == length
            for layer, other in zip(cache.layers, untouched.layers, strict=True):
                torch.testing.assert_close(layer.keys, other.keys, atol=2e-5, rtol=0)
        expected = masked_logits(model, plan, input_ids, mask, 16)[:, 16:]
        torch.testing.assert_close(
            cached_logits(model, cache, input_ids, mask, [2, 3, 1]), expected, atol=5e-5, rtol=0
        )

    @pytest.mark.parametrize("tokens", [7, 12, 21, 22, 100])
    def test_into_dropped_tokens_is_refused_and_changes_nothing(self, model, tokens):
        plan = PruningPlan.empty(model, kv=KVPlan((3,), 2, 4))  # after blocks that could be cropped
        cache, *_ = filled_cache(plan, model, *random_prompts(self.PROMPTS), completion_tokens=6)
        before = states_of(cache)
        with pytest.raises((ValueError, RuntimeError)):
            cache.crop(-tokens)
        assert_same_states(before, states_of(cache))

    def test_message_says_what_is_held(self, llama):
        plan = PruningPlan.empty(llama, kv=KV)
        cache, *_ = filled_cache(plan, llama, *random_prompts(self.PROMPTS), completion_tokens=6)
        with pytest.raises(ValueError, match=r"cannot crop 7 of 22 tokens.*prompt \(16 tokens\)"):
            cache.crop(-7)

    @pytest.mark.parametrize("read", [11, 13, 16])
    def test_of_a_prompt_that_is_observed(self, llama, read):
        # The last four tokens are observed, and what they attended to is not taken back.
        plan = PruningPlan.empty(llama, kv=replace(KV, token_choice="attention"))
        input_ids, mask = with_completion(*random_prompts([16, 9]), 4)
        cache = TokenAwareCache(plan, llama, prompt_tokens=16)
        cached_logits(llama, cache, input_ids, mask, [read])
        before = states_of(cache)
        if read > 12:
            with pytest.raises(ValueError, match=f"cannot crop 2 of {read} tokens"):
                cache.crop(-2)
            assert_same_states(before, states_of(cache))
        else:
            cache.crop(-2)
        actual = cached_logits(llama, cache, input_ids, mask, [20 - cache.get_seq_length()])[:, -4:]
        expected = masked_logits(llama, plan, input_ids, mask, 16)[:, -4:]
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)

    def test_where_another_block_cannot_be_cropped_nothing_changes(self, tiny_model):
        # Sliding windows do not record their past outside of assisted decoding, and say so; here they come last.
        model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
        plan = PruningPlan.empty(model, kv=KV)
        cache, *_ = filled_cache(plan, model, *random_prompts(self.PROMPTS), completion_tokens=6)
        before = states_of(cache)
        with pytest.raises(RuntimeError, match="past"):
            cache.crop(-2)
        assert_same_states(before, states_of(cache))

    def test_positive_numbers_are_refused(self, llama):
        plan = PruningPlan.empty(llama, kv=KV)
        cache, *_ = filled_cache(plan, llama, *random_prompts(self.PROMPTS), completion_tokens=6)
        before = states_of(cache)
        with pytest.raises(ValueError):
            cache.crop(4)
        assert_same_states(before, states_of(cache))

    def test_into_a_prompt_that_is_held_whole(self, llama):
        plan = PruningPlan.empty(llama, kv=KVPlan((0, 1, 3, 5), 8, 8))
        cache, input_ids, mask = filled_cache(plan, llama, *random_prompts(self.PROMPTS), completion_tokens=6)
        cache.crop(-12)
        assert cache.get_seq_length() == 10
        expected = masked_logits(llama, plan, input_ids, mask, 16)[:, 10:]
        actual = cached_logits(llama, cache, input_ids, mask, [12])
        real = mask[:, 10:].bool()
        torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)

    def test_before_the_first_forward(self, llama):
        cache = TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama)
        cache.crop(-3)
        assert cache.get_seq_length() == 0
        input_ids, mask = with_completion(*random_prompts(self.PROMPTS), 4)
        actual = cached_logits(llama, cache, input_ids, mask, [16, 4])
        expected = masked_logits(llama, cache.plan, input_ids, mask, 16)
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=5e-5, rtol=0)
