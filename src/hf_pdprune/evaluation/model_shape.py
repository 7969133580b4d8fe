"""ModelShape: random weights of the sizes of real models, so that speed at size needs no download."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..blocks import num_blocks
from ..plan import KVPlan, PruningPlan, StagePlan


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "qwen2.5-14b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


@dataclass
class ModelShape:
    """
    A model of random weights and a plan for it: how fast it is depends on how many blocks go, not on which.

    Args:
        name (`str`): One of `llama-3.1-8b`, `qwen2.5-7b`, `qwen2.5-14b`, `smollm2-135m`.
        num_prefill_blocks (`int`, defaults to 0): Blocks that prefill loses, evenly spread.
        num_decode_blocks (`int`, defaults to 0): Blocks that decode loses, those of prefill among them.
        num_token_aware_blocks (`int`, defaults to 0): Blocks that hand over the window only.
        first_tokens (`int`, defaults to 16): First prompt tokens of the window.
        last_tokens (`int`, defaults to 112): Last prompt tokens of the window.

    Raises:
        `ValueError`: If the shape is unknown or has not so many blocks.
    """

    name: str
    num_prefill_blocks: int = 0
    num_decode_blocks: int = 0
    num_token_aware_blocks: int = 0
    first_tokens: int = 16
    last_tokens: int = 112

    def __post_init__(self):
        if self.name not in SHAPES:
            raise ValueError(f"unknown shape {self.name!r}; there are {', '.join(SHAPES)}")
        total = SHAPES[self.name]["num_hidden_layers"]
        counts = {name: getattr(self, f"num_{name}_blocks") for name in ("prefill", "decode", "token_aware")}
        for name, count in counts.items():
            if not 0 <= count < total:
                raise ValueError(f"num_{name}_blocks must be from 0 to {total - 1}, got {count}")
        if counts["prefill"] > counts["decode"]:
            raise ValueError("num_decode_blocks must be at least num_prefill_blocks")
        if counts["token_aware"] > total - counts["decode"]:
            raise ValueError(
                f"num_token_aware_blocks is {counts['token_aware']}, decode keeps {total - counts['decode']} blocks"
            )

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model, in eval mode, its weights drawn on the device."""
        config = AutoConfig.for_model(**SHAPES[self.name])
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def plan(self, model: PreTrainedModel) -> PruningPlan:
        """The plan for the model."""
        total = num_blocks(model.config)
        removed = [(2 * i + 1) * total // (2 * self.num_decode_blocks) for i in range(self.num_decode_blocks)]
        kept = [block for block in range(total) if block not in removed]
        return PruningPlan.empty(
            model,
            self.name,
            prefill=StagePlan(tuple(removed[: self.num_prefill_blocks])),
            decode=StagePlan(tuple(removed)),
            kv=KVPlan(tuple(kept[: self.num_token_aware_blocks]), self.first_tokens, self.last_tokens),
        )
