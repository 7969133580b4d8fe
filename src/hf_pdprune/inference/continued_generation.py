"""Continued generation: settings of `model.generate` for an answer whose first token is there already."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation import StopStringCriteria


def continued_settings(setting: Callable[[str], Any], first_rows: torch.LongTensor) -> dict[str, Any]:
    """
    What has to be said otherwise to `model.generate` when the first token of the answer is a part of its input: what
    counts tokens from the end of the prompt counts one less, and rows have the numbers that they have in the batch.

    Args:
        setting (`Callable[[str], Any]`): Gives the caller's setting of a name, `None` where there is none.
        first_rows (`torch.LongTensor`): Shape `(rows,)`, the number in the batch of each row that is generated for.
    """
    changed: dict[str, Any] = {}
    if setting("min_new_tokens") is not None:
        changed["min_new_tokens"] = max(setting("min_new_tokens") - 1, 0)
    if setting("begin_suppress_tokens") is not None:  # prefill's token was the first one
        changed["begin_suppress_tokens"] = None
    if setting("exponential_decay_length_penalty") is not None:
        start, factor = setting("exponential_decay_length_penalty")
        changed["exponential_decay_length_penalty"] = (start - 1, factor)
    allowed, rows = setting("prefix_allowed_tokens_fn"), first_rows.tolist()
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda row, input_ids: allowed(rows[row], input_ids)
    return changed


def ends_with_first_token(sequences: torch.LongTensor, setting: Callable[[str], Any]) -> torch.BoolTensor:
    """
    Which rows `model.generate` would end after their first new token: by an end-of-sequence token, a stop string or
    the caller's criteria.

    Args:
        sequences (`torch.LongTensor`): Shape `(batch_size, prompt_tokens + 1)`.
        setting (`Callable[[str], Any]`): As for [`continued_settings`].
    """
    eos = setting("eos_token_id")
    wanted = [] if eos is None else eos if isinstance(eos, list) else [eos]
    ends = torch.isin(sequences[:, -1], torch.tensor(wanted, device=sequences.device, dtype=sequences.dtype))
    criteria = StoppingCriteriaList(setting("stopping_criteria") or ())
    if setting("stop_strings") is not None:
        criteria.append(StopStringCriteria(setting("tokenizer"), setting("stop_strings")))
    if criteria:
        ends = ends | criteria(sequences, None)
    # Without such a token there is nothing to fill up a row with: `model.generate` ends all of them or none.
    return ends if wanted else ends.all().expand(len(ends))
