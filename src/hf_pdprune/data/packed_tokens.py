"""Rows of text, or of tokens -> batches of equal rows without padding."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


# What is fitted in closed form follows from the tokens around a token: rows need not be longer.
_MAX_ROW_TOKENS = 512
_TOKENS_PER_BATCH = 4096


def tokenize_rows(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """
    The tokens of each row of a data set.

    Args:
        rows (`Iterable[dict]`): Rows with `text`, with `prompt` and `completion`, or with `messages` (which go through
            the chat template).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
    """
    for row in rows:
        if "messages" in row:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        else:
            text = (row["text"] if "text" in row else row["prompt"] + row["completion"]) + "\n\n"
        yield tokenizer(text, add_special_tokens=False)["input_ids"]


def pack_tokens(
    rows: Iterable[list[int]],
    num_tokens: int,
    max_row_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.LongTensor]:
    """
    Joins rows of tokens, cuts them into rows of equal length and mixes these, so that the first ones are of all parts
    of the text.

    Args:
        rows (`Iterable[list[int]]`): Tokens; no more of them are read than needed.
        num_tokens (`int`): As many are used at most.
        max_row_tokens (`int`, *optional*): Longest row, at most 512.
        device (`torch.device`): Where the batches are put.

    Returns:
        `list[torch.LongTensor]`: Batches of shape `(batch_size, row_tokens)` of up to 4,096 tokens; tokens that do not
        fill a row are left out.

    Raises:
        `ValueError`: If there is no token.
    """
    tokens: list[int] = []
    for row in rows:
        tokens += row
        if len(tokens) >= num_tokens:
            break
    tokens = tokens[:num_tokens]
    if not tokens:
        raise ValueError("the text has no token")
    length = min(_MAX_ROW_TOKENS, max_row_tokens or _MAX_ROW_TOKENS, len(tokens))
    packed = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    packed = packed[torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))].to(device)
    return list(packed.split(max(1, _TOKENS_PER_BATCH // length)))
