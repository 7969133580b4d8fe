import pytest
import torch
from cache_states import KV, assert_same_states, hooks_of, states_of
from masked_reference import (
    filled_cache,
    random_prompts,
)
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pdprune.kv import StaticDecodeCache, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan


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

    def test_a_prompt_of_no_token(self, llama):
        with pytest.raises(ValueError, match="prompt_tokens must be at least 1, got 0"):
            TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama, prompt_tokens=0)

    def test_generate_that_uses_no_cache(self, llama):
        prompts = dict(zip(("input_ids", "attention_mask"), random_prompts([16, 3]), strict=True))
        with TokenAwareCache(PruningPlan.empty(llama, kv=KV), llama) as cache:
            with pytest.raises(ValueError, match="use_cache=False and a cache to go on from exclude each other"):
                llama.generate(past_key_values=cache, use_cache=False, max_new_tokens=3, **prompts)

    def test_rotary_frequencies_that_change_at_some_length(self, tiny_model):
        # generate forgets the cache there and reads everything anew: nothing would be selected, without a word.
        factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
        model = tiny_model(
            "phi3",
            max_position_embeddings=64,
            original_max_position_embeddings=20,
            rope_parameters=factors | {"original_max_position_embeddings": 20},
        )
        plan = PruningPlan.empty(model, kv=KV)
        for prompt, more in ((24, 2), (16, 8)):
            input_ids, mask = random_prompts([prompt])
            with TokenAwareCache(plan, model) as cache:
                with pytest.raises(ValueError, match="Keep prompt and answer within 20 tokens"):
                    model.generate(input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=more)
        with TokenAwareCache(plan, model) as cache:
            assert model.generate(input_ids, past_key_values=cache, max_new_tokens=4).shape == (1, 20)
            assert cache.get_seq_length() == 19
        with TokenAwareCache(plan, model) as cache:
            model(input_ids=input_ids, past_key_values=cache)
            with pytest.raises(ValueError, match="Keep prompt and answer within 20 tokens"):
                StaticDecodeCache(cache, model, max_new_tokens=5)
            assert StaticDecodeCache(cache, model, max_new_tokens=4).get_seq_length() == 16

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
            (
                "roformer",
                SMALL | {"intermediate_size": 96, "embedding_size": 64, "is_decoder": True},
                "does not embed tokens",
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
