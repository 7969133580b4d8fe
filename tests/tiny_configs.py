"""Configs of the tiny random models that tests are run on."""

# Large enough an initializer_range that a random model has clear preferences: with flat logits, errors would not show.
COMMON = {
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}

ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": 8, "head_dim": 16},
    "mistral, no window": LLAMA_LIKE | {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 16},
    "gemma2": LLAMA_LIKE | GEMMA,
    "gemma3_text": LLAMA_LIKE | GEMMA,
    "phi3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_inner": 96, "n_positions": 512},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "falcon": {
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "alibi": False,
        "max_position_embeddings": 512,
    },
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA_LIKE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}
