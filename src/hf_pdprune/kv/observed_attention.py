"""observed_attention: what the last queries of a prompt attend to, while the prompt attends as ever."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..blocks import get_blocks
from .attention_replay import AttentionReplay


@torch.no_grad()
def observed_attention(
    replay: AttentionReplay,
    args: tuple,
    kwargs: dict,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding_mask: torch.Tensor | None,
    first_query: int,
    prompt_tokens: int,
    observed_tokens: int,
) -> torch.Tensor | None:
    """
    Attention that the prompt's tokens get from those of its last tokens that a forward reads, one block's. A query
    sees only what comes before it, so where the prompt is read in chunks, each chunk tells all about its own queries,
    and what they tell adds up.

    Args:
        replay ([`AttentionReplay`]): Of the block.
        args, kwargs: What its attention module was called with in this forward.
        keys (`torch.Tensor`): What the block holds since, all tokens seen so far, of shape
            `(batch_size, num_key_value_heads, tokens, head_dim)`.
        values (`torch.Tensor`): Shape as `keys`.
        padding_mask (`torch.Tensor`, *optional*): Shape `(batch_size, tokens)`, 0 for padding.
        first_query (`int`): Position of the forward's first token.
        prompt_tokens (`int`): Length of the padded prompt.
        observed_tokens (`int`): How many of its last tokens' queries are observed.

    Returns:
        `torch.Tensor`: Summed over the queries that are no padding, mean over the heads that share a KV head, float32
        of shape `(batch_size, num_key_value_heads, prompt_tokens)`. `None` if the forward reads none of these tokens.
    """
    begin, end = max(first_query, prompt_tokens - observed_tokens), min(keys.shape[-2], prompt_tokens)
    if begin >= end:
        return None
    real = None if padding_mask is None else padding_mask[:, :end].bool()
    queries = slice(begin - first_query, end - first_query)
    visible = visible_keys(real, end, end - begin, keys.device)
    _, weights = replay(args, kwargs, queries, begin, keys[:, :, :end], values[:, :, :end], visible)
    grouped = weights.float().unflatten(1, (keys.shape[1], -1)).mean(dim=2)
    if real is not None:
        grouped = grouped.masked_fill(~real[:, None, begin:, None].to(grouped.device), 0.0)
    return torch.nn.functional.pad(grouped.sum(dim=2), (0, prompt_tokens - end))


@contextmanager
def observing(
    model: nn.Module, blocks: Iterable[int], cache: Cache, padding_mask: torch.Tensor, observed_tokens: int
) -> Iterator[dict[int, torch.Tensor]]:
    """
    Within this context a forward of `model` over whole prompts, with a full cache, is observed.

    Args:
        model (`nn.Module`): The model.
        blocks (`Iterable[int]`): Blocks that are observed, as the model counts.
        cache ([`~transformers.Cache`]): What the forward fills.
        padding_mask (`torch.Tensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
        observed_tokens (`int`): As for [`observed_attention`].

    Yields:
        `dict[int, torch.Tensor]`: By block, of shape `(batch_size, num_key_value_heads, prompt_tokens)`.
    """
    attention: dict[int, torch.Tensor] = {}

    def observer(block: int, replay: AttentionReplay) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            keys, values = cache.layers[block].keys, cache.layers[block].values
            attention[block] = observed_attention(
                replay, args, kwargs, keys, values, padding_mask, 0, padding_mask.shape[1], observed_tokens
            )

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            replay = AttentionReplay(get_blocks(model)[block])
            hook = observer(block, replay)
            hooks.callback(replay.module.register_forward_hook(hook, with_kwargs=True).remove)
        yield attention


def visible_keys(real: torch.Tensor | None, keys: int, queries: int, device: torch.device) -> torch.Tensor:
    """
    Which key each of the last `queries` tokens sees.

    Args:
        real (`torch.Tensor`, *optional*): Boolean, shape `(batch_size, keys)`, `False` for padding.
        keys (`int`): Number of keys.
        queries (`int`): Number of queries, the last of the keys' tokens.
        device (`torch.device`): Where the mask is needed.

    Returns:
        `torch.Tensor`: Boolean, shape `(batch_size or 1, 1, queries, keys)`.
    """
    causal = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device).tril(keys - queries)
    return causal if real is None else causal & real[:, None, None, :].to(device)
