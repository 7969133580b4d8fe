import copy
import gc
from dataclasses import replace

import pytest
import torch
from masked_reference import (
    cached_logits,
    filled_cache,
    masked_generate,
    masked_logits,
    random_prompts,
    with_completion,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.kv import TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.plan_parts import TOKEN_CHOICES


KV = KVPlan((0, 1, 3, 5), first_tokens=2, last_tokens=4, block_windows=((3, 1, 7),))
ARCHITECTURES = ["llama", "gemma2", "gpt2"]


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    model = tiny_model(request.param)
    model.generation_config.eos_token_id = None  # random models would end here and there
    return model


@pytest.fixture(params=TOKEN_CHOICES)
def plan(request, model):
    return PruningPlan.empty(model, kv=replace(KV, token_choice=request.param))


@pytest.fixture
def llama(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama


def repetitive_prompt(tokens=21):
    """A prompt in which prompt lookup finds candidates from the first step on."""
    pattern, _ = random_prompts([5])
    ids = pattern.repeat(1, tokens // 5 + 1)[:, :tokens]
    return ids, torch.ones_like(ids)


def hooks_of(model):
    modules = list(model.modules())
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)


def states_of(cache):
    return [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in cache.layers]


def assert_same_states(before, after):
    for (keys, values, length), (other_keys, other_values, other_length) in zip(before, after, strict=True):
        assert length == other_length
        assert torch.equal(keys, other_keys)
        assert torch.equal(values, other_values)


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


class TestBadInput:
    def test_rows_must_stay_as_many(self, llama):
        cache, input_ids, mask = filled_cache(PruningPlan.empty(llama, kv=KV), llama, *random_prompts([16, 3]), 2)
        with pytest.raises(ValueError, match="holds 2 rows, this forward has 1"):
            llama(input_ids=input_ids[:1, :1], past_key_values=cache)

    @pytest.mark.parametrize("columns", [1, 16, 18, 20])
    def test_padding_mask_must_cover_all_tokens(self, llama, columns):
        cache, input_ids, _ = filled_cache(PruningPlan.empty(llama, kv=KV), llama, *random_prompts([16, 3]), 2)
        before = states_of(cache)
        with pytest.raises(ValueError, match=r"shape \(2, 19\), got"):
            llama(input_ids=input_ids[:, :1], attention_mask=torch.ones(2, columns), past_key_values=cache)
        assert_same_states(before, states_of(cache))

    def test_new_prompt_without_reset(self, llama):
        for lengths in ([10, 12], [24, 20], [24, 24]):  # shorter than what is held, longer, and not padded
            cache, *_ = filled_cache(PruningPlan.empty(llama, kv=KV), llama, *random_prompts([16, 3]), 2)
            before = states_of(cache)
            input_ids, mask = random_prompts(lengths)
            settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
            with pytest.raises(ValueError, match=r"for a new prompt, reset\(\) the cache"):
                llama.generate(past_key_values=cache, **settings)
            assert_same_states(before, states_of(cache))
            cache.reset()
            again = llama.generate(past_key_values=cache, **settings)
            with TokenAwareCache(cache.plan, llama) as fresh:
                assert torch.equal(again, llama.generate(past_key_values=fresh, **settings))

    @pytest.mark.parametrize("num_hidden_layers", [6, 8])
    def test_model_that_it_was_not_made_for(self, llama, tiny_model, num_hidden_layers):
        # Its hooks are on the other model: this one would keep all tokens, and not say so.
        other = tiny_model("llama", num_hidden_layers=num_hidden_layers)
        prompts = dict(zip(("input_ids", "attention_mask"), random_prompts([16, 3]), strict=True))
        with TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama) as cache:
            with pytest.raises(ValueError, match="made for another model, or has been closed"):
                other.generate(past_key_values=cache, max_new_tokens=2, **prompts)
            llama(past_key_values=cache, **prompts)
            with pytest.raises(ValueError, match="made for another model, or has been closed"):
                other(input_ids=prompts["input_ids"][:, :1], past_key_values=cache)

    def test_closed_cache(self, llama):
        cache, *_ = filled_cache(PruningPlan.empty(llama, kv=KV), llama, *random_prompts([16, 16]), 2)
        before = states_of(cache)
        cache.close()
        with pytest.raises(ValueError, match="made for another model, or has been closed"):
            llama(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
        assert_same_states(before, states_of(cache))

    def test_flash_attention_has_to_end_where_the_prompt_ends(self, llama):
        # Attention itself does not run: the hooks find out before it.
        llama.config._attn_implementation = "flash_attention_2"
        input_ids, mask = random_prompts([20, 18])
        with TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama, prompt_tokens=16) as cache:
            with pytest.raises(ValueError, match="a forward has to end where the prompt ends"):
                llama(input_ids=input_ids, attention_mask=mask, past_key_values=cache)

    def test_mask_of_four_dimensions(self, llama):
        input_ids, _ = random_prompts([16])
        with TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama) as cache:
            with pytest.raises(ValueError, match="padding mask"):
                llama(input_ids=input_ids, attention_mask=torch.ones(1, 1, 16, 16), past_key_values=cache)

    def test_model_of_another_plan(self, llama, tiny_model):
        with pytest.raises(ValueError, match="6 blocks"):
            TokenAwareCache(PruningPlan.empty(llama, kv=KV), tiny_model("llama", num_hidden_layers=5))
        with pytest.raises(ValueError, match="qwen2"):
            TokenAwareCache(PruningPlan.empty(llama, kv=KV), tiny_model("qwen2"))


LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 3}
SMALL = {"hidden_size": 64, "vocab_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}


class TestUnsupportedArchitectures:
    """What cannot be right says so before any work."""

    @pytest.mark.parametrize(
        ("architecture", "values", "reason"),
        [
            ("bloom", SMALL | {"n_head": 4}, "ALiBi"),
            ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 6, "vocab_size": 256}, "ALiBi"),
            ("falcon", SMALL | {"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
            (
                "gpt_neo",
                {
                    "hidden_size": 64,
                    "num_heads": 4,
                    "num_layers": 6,
                    "attention_types": [[["global", "local"], 3]],
                    "vocab_size": 256,
                },
                "local attention",
            ),
            ("openai-gpt", {"n_embd": 64, "n_head": 4, "n_layer": 6, "vocab_size": 256}, "takes no KV cache"),
            (
                "mamba",
                {"hidden_size": 64, "state_size": 4, "num_hidden_layers": 6, "vocab_size": 256},
                "LinearAttention",
            ),
            ("recurrent_gemma", SMALL | {"lru_width": 64, "intermediate_size": 96}, "LinearAttention"),
            (
                "qwen3_next",
                SMALL
                | LINEAR
                | {
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "num_experts": 2,
                    "num_experts_per_tok": 1,
                    "moe_intermediate_size": 32,
                    "shared_expert_intermediate_size": 32,
                    "intermediate_size": 96,
                    "linear_num_value_heads": 4,
                    "linear_num_key_heads": 2,
                    "linear_key_head_dim": 16,
                    "linear_value_head_dim": 16,
                },
                "block 0 in a LinearAttention",
            ),
            (
                "gemma3n_text",
                SMALL
                | {
                    "num_hidden_layers": 10,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "intermediate_size": 96,
                    "num_kv_shared_layers": 3,
                    "vocab_size_per_layer_input": 256,
                    "hidden_size_per_layer_input": 8,
                    "activation_sparsity_pattern": None,
                    "laurel_rank": 4,
                    "altup_num_inputs": 2,
                },
                "block 7 in a DummyLayer",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_refused_at_construction(self, architecture, values, reason):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))
        # Block 4 holds KV entries in all of them: it is not the token-aware block itself that is the trouble.
        plan = PruningPlan.empty(model, kv=KVPlan((1, 4), 1, 1))
        with pytest.raises(ValueError, match=reason):
            TokenAwareCache(plan, model)
        assert hooks_of(model) == 0

    def test_without_token_aware_blocks_there_still_has_to_be_a_cache(self):
        values = {"n_embd": 64, "n_head": 4, "n_layer": 6, "vocab_size": 256}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **values))
        with pytest.raises(ValueError, match="takes no KV cache"):
            TokenAwareCache(PruningPlan.empty(model), model)

    def test_flex_attention(self, llama):
        llama.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="flex_attention"):
            TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama)
