"""PromptCompletionCollator: rows of tokens -> the batches that the disaggregated forward takes."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..pair_layout import check_first_token


IGNORED_LABEL = -100


def tokenize_examples(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
    completion_tokens: int,
    max_examples: int | None = None,
) -> list[dict[str, list[int]]]:
    """
    Rows of text -> examples of a prompt and its completion.

    Plain text (`text`) is joined and cut into pieces of exactly `prompt_tokens + completion_tokens` tokens, so that
    every piece has a long prompt. Rows with `prompt` and `completion` stay themselves: a longer prompt loses its
    beginning, a longer completion its end. `messages` go through the chat template; the last one is the completion.

    Args:
        rows (`Iterable[dict]`): Rows of a data set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        prompt_tokens (`int`): Length of the prompts cut out of text, and most that others keep.
        completion_tokens (`int`): The same for completions.
        max_examples (`int`, *optional*): As many examples are made at most.

    Returns:
        `list[dict]`: Each with `input_ids` and `labels`, where the prompt's labels are -100.

    Raises:
        `ValueError`: If the rows give no example, or if a number is below 1.
    """
    numbers = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "max_examples": max_examples}
    for name, number in numbers.items():
        if number is not None and number < 1:  # [-0:] would keep the whole prompt
            raise ValueError(f"{name} must be at least 1, got {number}")
    examples: list[dict[str, list[int]]] = []
    pending: list[int] = []
    length, seen_tokens = prompt_tokens + completion_tokens, 0
    for row in rows:
        if max_examples is not None and len(examples) >= max_examples:
            break
        if "text" in row:
            pending += tokenizer(row["text"] + "\n\n", add_special_tokens=False)["input_ids"]
            whole = len(pending) // length * length
            pieces = (pending[begin : begin + length] for begin in range(0, whole, length))
            # A row can be a whole book, of which a few examples are wanted.
            wanted = None if max_examples is None else max_examples - len(examples)
            examples += [_example(piece[:prompt_tokens], piece[prompt_tokens:]) for piece in islice(pieces, wanted)]
            pending = pending[whole:]
            seen_tokens = len(examples) * length + len(pending)
            continue
        if "messages" in row:
            *context, last = row["messages"]
            prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True, tokenize=False)
            completion = last["content"] + (tokenizer.eos_token or "")
        else:
            prompt, completion = row["prompt"], row["completion"]
        prompt_ids = tokenizer(prompt, add_special_tokens="messages" not in row)["input_ids"]
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        if prompt_ids and completion_ids:
            examples.append(_example(prompt_ids[-prompt_tokens:], completion_ids[:completion_tokens]))
    if not examples:
        raise ValueError(
            f"the text gives no example of {prompt_tokens} prompt and {completion_tokens} completion tokens "
            f"({seen_tokens} tokens in all)"
        )
    return examples[:max_examples]


def _example(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> dict[str, list[int]]:
    return {
        "input_ids": [*prompt_ids, *completion_ids],
        "labels": [IGNORED_LABEL] * len(prompt_ids) + list(completion_ids),
    }


@dataclass
class PromptCompletionCollator:
    """
    Cuts rows of tokens into prompt and completion and pads them: prompts left, completions right.

    The completion begins at the first label that is not -100. A row in which that is the first token (plain text) is
    cut at a point between a quarter and three quarters of it, drawn from the row itself and the seed: the same row is
    always cut at the same place, so that a resumed training sees what an uninterrupted one does.

    Args:
        pad_token_id (`int`): Fills up the rows; masked everywhere.
        seed (`int`, defaults to 0): Other seeds cut plain text at other places.
        min_completion_tokens (`int`, defaults to 1): To which completions are padded at least.
        first_token (`str`, defaults to `"prefill"`): Which stage predicts the first completion token. `"decode"`: the
            completion begins with the last token of the prompt, without a label, which decode then reads. A prompt of
            one token stays prefill's.
        pad_to_multiple_of (`int`, *optional*): Both widths are padded to a multiple of it.

    Raises:
        `ValueError`: If `first_token` is neither stage.
    """

    pad_token_id: int
    seed: int = 0
    min_completion_tokens: int = 1
    first_token: str = "prefill"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        check_first_token(self.first_token)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`Sequence[dict]`): Each with `input_ids`, and `labels` where -100 marks tokens without loss.

        Returns:
            `dict[str, torch.Tensor]`: `prompt_ids`, `prompt_mask` of shape `(batch_size, prompt_tokens)`;
            `completion_ids`, `completion_mask`, `labels` of shape `(batch_size, completion_tokens)`.

        Raises:
            `ValueError`: If a row has no completion token, or no prompt token.
        """
        labelled = [self._cut(row) for row in rows]
        cuts = [max(cut - 1, 1) for cut in labelled] if self.first_token == "decode" else labelled
        prompts = [list(row["input_ids"][:cut]) for row, cut in zip(rows, cuts, strict=True)]
        completions = [list(row["input_ids"][cut:]) for row, cut in zip(rows, cuts, strict=True)]
        labels = [
            [IGNORED_LABEL] * (begin - cut) + list(row.get("labels", row["input_ids"])[begin:])
            for row, cut, begin in zip(rows, cuts, labelled, strict=True)
        ]
        multiple = self.pad_to_multiple_of or 1
        prompt_width = _rounded_up(max(map(len, prompts)), multiple)
        width = _rounded_up(max(self.min_completion_tokens, *map(len, completions)), multiple)
        return {
            "prompt_ids": _padded(prompts, prompt_width, self.pad_token_id, left=True),
            "prompt_mask": _padded([[1] * len(p) for p in prompts], prompt_width, 0, left=True),
            "completion_ids": _padded(completions, width, self.pad_token_id),
            "completion_mask": _padded([[1] * len(c) for c in completions], width, 0),
            "labels": _padded(labels, width, IGNORED_LABEL),
        }

    def with_prompt(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """The row as an example: labels are -100 up to where the completion begins."""
        cut, tokens = self._cut(row), list(row["input_ids"])
        labels = list(row.get("labels", tokens))
        return {"input_ids": tokens, "labels": [IGNORED_LABEL] * cut + labels[cut:]}

    def _cut(self, row: dict[str, Any]) -> int:
        """Length of the row's prompt."""
        labels = row.get("labels", row["input_ids"])
        cut = next((index for index, label in enumerate(labels) if label != IGNORED_LABEL), None)
        if cut is None:
            raise ValueError("a row has no completion token: all of its labels are -100")
        if cut > 0:
            return cut
        length = len(labels)
        if length < 2:
            raise ValueError("a row of one token cannot be cut into prompt and completion")
        draw = zlib.crc32(repr((self.seed, [int(token) for token in row["input_ids"]])).encode()) / 2**32
        return min(max(1, round(length * (0.25 + 0.5 * draw))), length - 1)


def _rounded_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _padded(rows: Sequence[list[int]], width: int, value: int, left: bool = False) -> torch.LongTensor:
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])
