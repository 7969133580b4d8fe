"""DraftAcceptance: how well a pruned model serves as the draft of the dense one in assisted decoding."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def draft_acceptance(
    dense_model: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[torch.LongTensor], new_tokens: int = 64
) -> dict[str, Any]:
    """
    Greedy assisted decoding of the dense model (transformers' own) with a draft, beside its plain decoding, in turns.
    The texts are the same by construction; what counts is how many forwards of the dense model they take.

    Args:
        dense_model ([`~transformers.PreTrainedModel`]): The model whose text is wanted.
        draft ([`~transformers.PreTrainedModel`]): Proposes tokens; best a decode stage checkpoint.
        prompts (`Sequence[torch.LongTensor]`): Each of shape `(1, prompt_tokens)`.
        new_tokens (`int`, defaults to 64): Tokens to generate per prompt.

    Returns:
        `dict[str, Any]`: `tokens_per_forward` of the dense model (1 without a draft), `time_ratio` (assisted / plain,
        median over prompts), `same_text` (share of prompts) and `prompts`, their number.

    Raises:
        `ValueError`: If there is no prompt, or if the draft is the dense model itself: forwards could not be told
        apart.
    """
    if draft is dense_model:
        raise ValueError("the draft is the dense model itself")
    if not prompts:
        raise ValueError("draft_acceptance needs at least one prompt")
    tokens, forwards, ratios, same = 0, 0, [], 0
    for prompt in prompts:
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        plain, plain_seconds, _ = _timed(dense_model, prompt, settings)
        assisted, seconds, calls = _timed(dense_model, prompt, settings | {"assistant_model": draft})
        tokens += assisted.shape[1] - prompt.shape[1]
        forwards += calls
        ratios.append(seconds / plain_seconds)
        same += int(plain.shape == assisted.shape and bool((plain == assisted).all()))
    return {
        "tokens_per_forward": tokens / forwards,
        "time_ratio": sorted(ratios)[len(ratios) // 2],
        "same_text": same / len(prompts),
        "prompts": len(prompts),
    }


def _timed(model: PreTrainedModel, prompt: torch.LongTensor, settings: dict[str, Any]) -> tuple:
    """Tokens, seconds, and forwards of the model."""
    calls = []

    def count(module: nn.Module, args: tuple, output: Any) -> None:
        calls.append(None)

    handle = model.register_forward_hook(count)
    begun = time.perf_counter()
    try:
        tokens = model.generate(prompt, **settings)
    finally:
        handle.remove()
    return tokens, time.perf_counter() - begun, len(calls)
