from dataclasses import replace

import pytest
import torch
from cache_states import KV, hooks_of
from masked_reference import (
    cached_logits,
    masked_logits,
    random_prompts,
    with_completion,
)

from hf_pdprune.kv import TokenAwareCache
from hf_pdprune.plan import PruningPlan


class TestObservedPrompt:
    """Tokens that are chosen by attention."""

    KV = replace(KV, token_choice="attention")

    def test_the_prompt_is_read_as_ever(self, model):
        # Not only within a tolerance: nothing of the model is changed for it.
        plan, ends = (PruningPlan.empty(model, kv=kv) for kv in (self.KV, KV))
        logits = [
            cached_logits(model, TokenAwareCache(p, model), *random_prompts([16, 9]), [16]) for p in (plan, ends)
        ]
        assert torch.equal(*logits)

    def test_rows_between_chunks(self, llama):
        plan = PruningPlan.empty(llama, kv=self.KV)
        input_ids, mask = with_completion(*random_prompts([16, 9, 12]), 4)
        rows = torch.tensor([2, 0])
        cache = TokenAwareCache(plan, llama, prompt_tokens=16)
        cached_logits(llama, cache, input_ids, mask, [14])
        cache.batch_select_indices(rows)
        actual = cached_logits(llama, cache, input_ids[rows], mask[rows], [2, 4])[:, 2:]
        expected = masked_logits(llama, plan, input_ids[rows], mask[rows], 16)[:, 16:]
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)

    @pytest.mark.parametrize("sizes", [[10, 5], [4, 6, 5], [12, 3], [1] * 15], ids=str)
    def test_rows_that_are_all_padded_and_kept_whole(self, llama, sizes):
        # What is dropped is padding, and the block forgets it when the others forget tokens.
        plan = PruningPlan.empty(llama, kv=replace(KV, first_tokens=6, token_choice="attention"))
        input_ids, mask = (torch.nn.functional.pad(t, (6, 0)) for t in random_prompts([4, 3]))
        input_ids, mask = with_completion(input_ids, mask, 5)
        cache = TokenAwareCache(plan, llama, prompt_tokens=10)
        actual = cached_logits(llama, cache, input_ids, mask, sizes)
        real = mask.bool()
        expected = masked_logits(llama, plan, input_ids, mask, 10)
        torch.testing.assert_close(actual[real], expected[real], atol=5e-5, rtol=0)
        assert [layer.keys.shape[-2] for layer in cache.token_aware_layers] == [4 + 5] * 4

    def test_right_padding_is_refused(self, llama):
        input_ids, mask = random_prompts([16, 9])
        with TokenAwareCache(PruningPlan.empty(llama, kv=self.KV), llama) as cache:
            with pytest.raises(ValueError, match="padded on the left"):
                llama(input_ids=input_ids, attention_mask=mask.flip(1), past_key_values=cache)

    def test_no_attention_is_held_where_nothing_is_dropped(self, llama):
        plan = PruningPlan.empty(llama, kv=replace(self.KV, first_tokens=8, block_windows=()))
        cache = TokenAwareCache(plan, llama, prompt_tokens=12)
        for size in (10, 2):
            cached_logits(llama, cache, *random_prompts([12, 5]), [size])
            assert all(layer.attention is None and layer.columns is None for layer in cache.token_aware_layers)
        cache.crop(-6)
        assert cache.get_seq_length() == 6

    def test_attention_that_cannot_be_observed_is_refused_at_construction(self, llama, monkeypatch):
        def forward(self, hidden_states, rotations, attention_mask=None, past_key_values=None):
            pass

        monkeypatch.setattr(type(llama.model.layers[0].self_attn), "forward", forward)
        with pytest.raises(ValueError, match=r"\(rotations\); choose them by token_choice first_last"):
            TokenAwareCache(PruningPlan.empty(llama, kv=self.KV), llama)
        assert hooks_of(llama) == 0
