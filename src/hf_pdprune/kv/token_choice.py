"""Token choice by attention: which prompt tokens each KV head keeps (SnapKV, H2O). Pure tensor maths."""

import torch


def heavy_hitters(attention: torch.Tensor, kept_tokens: int) -> torch.LongTensor:
    """
    H2O (arXiv 2306.14048): half of the kept tokens are the last ones, the others those with most attention of all
    queries.

    Args:
        attention (`torch.Tensor`): Summed over the prompt's queries, shape `(batch_size, num_heads, prompt_tokens)`.
        kept_tokens (`int`): How many are kept of each head.

    Returns:
        `torch.LongTensor`: Kept columns, rising, of shape `(batch_size, num_heads, kept_tokens)`.
    """
    return _best_and_last(attention, kept_tokens, kept_tokens // 2)


def observed(
    attention: torch.Tensor,
    kept_tokens: int,
    last_tokens: int,
    padding_mask: torch.Tensor | None = None,
    kernel: int = 5,
) -> torch.LongTensor:
    """
    SnapKV (arXiv 2404.14469, section 4): the last tokens, and of those before them the ones with most attention of the
    last tokens' queries, each with the mean of its neighbours, so that what belongs together stays together.

    Args:
        attention (`torch.Tensor`): Sum or mean over the last queries, shape `(batch_size, num_heads, prompt_tokens)`.
        kept_tokens (`int`): How many are kept of each head.
        last_tokens (`int`): How many of them are the last ones: the observation window.
        padding_mask (`torch.Tensor`, *optional*): Shape `(batch_size, prompt_tokens)`, 0 for padding. A row with fewer
            real tokens keeps all of them, and in every head the same columns of its padding.
        kernel (`int`, defaults to 5): Neighbours in the mean, odd.

    Returns:
        `torch.LongTensor`: Kept columns, rising, of shape `(batch_size, num_heads, kept_tokens)`.
    """
    last_tokens = min(last_tokens, kept_tokens)
    earlier = attention.shape[-1] - last_tokens
    scores = attention.float()
    # The last tokens are kept anyway: what they get of each other must not spill over to their neighbours.
    pooled = torch.nn.functional.avg_pool1d(scores[..., :earlier], kernel, stride=1, padding=kernel // 2)
    if padding_mask is not None:
        padding = ~padding_mask[:, None, :earlier].bool()
        below_all = -1.0 - torch.arange(earlier, device=scores.device)
        pooled = torch.where(padding.to(scores.device), below_all, pooled)
    return _best_and_last(torch.cat([pooled, scores[..., earlier:]], dim=-1), kept_tokens, last_tokens)


def _best_and_last(scores: torch.Tensor, kept_tokens: int, last_tokens: int) -> torch.LongTensor:
    prompt_tokens = scores.shape[-1]
    if not 0 < kept_tokens <= prompt_tokens:
        raise ValueError(f"{kept_tokens} of {prompt_tokens} tokens cannot be kept")
    earlier = prompt_tokens - last_tokens
    best = scores[..., :earlier].topk(kept_tokens - last_tokens, dim=-1).indices
    last = torch.arange(earlier, prompt_tokens, device=scores.device).expand(*scores.shape[:-1], -1)
    return torch.cat([best, last], dim=-1).sort(dim=-1).values


def select_per_head(states: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """
    Keys or values of the kept columns.

    Args:
        states (`torch.Tensor`): Shape `(batch_size, num_heads, prompt_tokens, head_dim)`.
        columns (`torch.LongTensor`): Shape `(batch_size, num_heads, kept_tokens)`.
    """
    return states.gather(-2, columns[..., None].expand(-1, -1, -1, states.shape[-1]))
