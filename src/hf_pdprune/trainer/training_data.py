"""Checks of training data: what cannot be trained on is found before training starts."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..data.prompt_completion import IGNORED_LABEL


def check_given_rows(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Checks rows that are tokens already; others have no labels yet.

    Args:
        dataset ([`~datasets.Dataset`]): As the user gives it.
        name (`str`): Which data set it is, for the message.

    Raises:
        `ValueError`: If a row has no completion token, or labels of another length than its tokens.
    """
    if not isinstance(dataset, Dataset) or not {"input_ids", "labels"} <= set(dataset.column_names):
        return
    for first, tokens, labels in _batches(dataset):
        for row in _where(pc.not_equal(pc.list_value_length(tokens), pc.list_value_length(labels))):
            raise ValueError(f"{name}: row {first + row} has not as many labels as tokens")
        for row in _without_label(labels):
            raise ValueError(f"{name}: row {first + row} has no completion token: all of its labels are -100")


def check_prepared_rows(dataset: Dataset | IterableDataset, name: str, context: int | None, max_length: int) -> None:
    """
    Checks the rows that training reads.

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
        for row in _where(pc.less(lengths, 2)):
            raise ValueError(
                f"{name}: row {first + row} has {lengths[row]} token: it cannot be cut into prompt and completion"
            )
        for row in _without_label(labels):
            raise ValueError(f"{name}: row {first + row} has no completion token: all of its labels are -100")


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
