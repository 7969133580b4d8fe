"""Checks of training data: what cannot be trained on is found before training starts."""

import logging
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..data.prompt_completion import IGNORED_LABEL


logger = logging.getLogger(__name__)

_STREAM_ROWS = 64  # of a stream that are looked at before training


def check_whole_rows(
    dataset: Dataset | IterableDataset, name: str, max_length: int | None, truncation_mode: str, packing: bool
) -> None:
    """
    Checks rows of tokens before they are cut to `max_length`, and warns of what is lost by that. Of a stream, the
    first rows stand for all.

    Args:
        dataset ([`~datasets.Dataset`]): With `input_ids` and, mostly, `labels`.
        name (`str`): Which data set it is, for the messages.
        max_length (`int`, *optional*): To which rows will be cut.
        truncation_mode (`str`): `"keep_start"` or `"keep_end"`.
        packing (`bool`): Whether rows will be joined before.

    Raises:
        `ValueError`: If a row has no completion token, or labels of another length than its tokens.
    """
    rows = _first_rows(dataset) if isinstance(dataset, IterableDataset) else dataset
    cut, dropped, longest = 0, 0, 0
    for first, tokens, labels in _batches(rows):
        lengths = pc.list_value_length(tokens)
        _check_labels(name, first, lengths, labels)
        if packing:
            continue
        _check_two_tokens(name, first, lengths)
        for row in [] if max_length is None else _where(pc.greater(lengths, max_length)):
            part = labels[row].values.to_numpy(zero_copy_only=False)
            part = part[-max_length:] if truncation_mode == "keep_end" else part[:max_length]
            cut, longest = cut + 1, max(longest, lengths[row].as_py())
            dropped += bool((part == IGNORED_LABEL).all())
    if cut and PartialState().is_main_process:
        of = f"the first {len(rows)}" if isinstance(dataset, IterableDataset) else len(rows)
        logger.warning(
            f"{name}: {cut} of {of} rows are longer than max_length={max_length} (the longest has {longest} tokens) "
            f"and are cut; {dropped} of them have a prompt of that length and are left out"
            + (" (truncation_mode='keep_end' cuts the prompt instead)" if dropped else "")
        )


def check_prepared_rows(dataset: Dataset | IterableDataset, name: str, context: int | None, max_length: int) -> None:
    """
    Checks the rows that training reads; those of a stream have been checked before they were cut.

    Args:
        dataset ([`~datasets.Dataset`]): With `input_ids` and, mostly, `labels`.
        name (`str`): Which data set it is, for the message.
        context (`int`, *optional*): Most tokens that the model can read.
        max_length (`int`): To which rows have been cut, for the message.

    Raises:
        `ValueError`: If there are too few rows, or one is longer than the context, too short to be cut into prompt
            and completion, or has no prompt or no completion.
    """
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(
            f"{name} has no row with a completion token (a prompt that fills max_length={max_length} leaves no room "
            "for one: truncation_mode='keep_end' cuts the prompt instead)"
        )
    if name == "train_dataset" and len(dataset) == 1:
        raise ValueError(
            "train_dataset has 1 row: every step would see the same tokens. Give it more text; a long text is cut "
            "into rows with packing=True, packing_strategy='wrapped' and a max_length"
        )
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"{name} has no column input_ids: dataset_kwargs skips its preparation")
    for first, tokens, labels in _batches(dataset):
        lengths = pc.list_value_length(tokens)
        if context is not None:
            for row in _where(pc.greater(lengths, context)):
                raise ValueError(
                    f"{name}: row {first + row} has {lengths[row]} tokens, the model's context is {context}"
                )
        _check_two_tokens(name, first, lengths)
        _check_labels(name, first, lengths, labels)


def _check_labels(name: str, first: int, lengths: pa.Array, labels: pa.Array) -> None:
    for row in _where(pc.not_equal(lengths, pc.list_value_length(labels))):
        raise ValueError(f"{name}: row {first + row} has not as many labels as tokens")
    for row in _without_label(labels):
        raise ValueError(f"{name}: row {first + row} has no completion token: all of its labels are -100")


def _check_two_tokens(name: str, first: int, lengths: pa.Array) -> None:
    for row in _where(pc.less(lengths, 2)):
        raise ValueError(
            f"{name}: row {first + row} has {lengths[row]} token: it cannot be cut into prompt and completion"
        )


def _first_rows(stream: IterableDataset) -> Dataset:
    columns = ("input_ids", "labels")
    return Dataset.from_list([{c: row[c] for c in columns if c in row} for row in stream.take(_STREAM_ROWS)])


def _batches(dataset: Dataset) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Number of the first row, tokens and labels (the tokens where there are none) of a thousand rows each."""
    columns = [column for column in ("input_ids", "labels") if column in dataset.column_names]
    first = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        tokens = batch["input_ids"].combine_chunks()
        yield first, tokens, batch["labels"].combine_chunks() if "labels" in columns else tokens
        first += len(batch)


def _without_label(labels: pa.Array) -> list[int]:
    """Rows in which every label is ignored."""
    rows = pc.list_parent_indices(labels).filter(pc.not_equal(pc.list_flatten(labels), IGNORED_LABEL))
    labelled = set(rows.unique().to_pylist())
    return [row for row in range(len(labels)) if row not in labelled] if len(labelled) < len(labels) else []


def _where(condition: pa.Array) -> list[int]:
    return pc.indices_nonzero(condition).to_pylist()
