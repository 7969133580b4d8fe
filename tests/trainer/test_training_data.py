import pytest
from datasets import Dataset

from hf_pdprune.trainer.training_data import check_prepared_rows, check_whole_rows


def rows(*labels):
    return Dataset.from_list([{"input_ids": list(range(len(row))), "labels": row} for row in labels])


def as_they_are(dataset):
    return dataset


def as_stream(dataset):
    return dataset.to_iterable_dataset()


@pytest.mark.parametrize("given", [as_they_are, as_stream])
def test_rows_without_completion_are_named(given):
    def check(dataset, packing=False):
        check_whole_rows(given(dataset), "train_dataset", 4, "keep_start", packing)

    good = [-100, 1, 2]
    with pytest.raises(ValueError, match="train_dataset: row 2 has no completion token"):
        check(rows(good, good, [-100, -100]))
    with pytest.raises(ValueError, match="row 0 has not as many labels as tokens"):
        check(Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1]}]))
    with pytest.raises(ValueError, match="row 1 has 1 token: it cannot be cut"):
        check(Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]))
    check(rows(good, [1]), packing=True)
    check(rows(good, good))


@pytest.mark.parametrize("given", [as_they_are, as_stream])
def test_what_is_cut_and_left_out_is_counted(given, caplog):
    some = given(rows([-100, 1, 2], [-100, 1, 2, 3, 4], [-100, -100, -100, -100, 1, 2, 3], [1, 2, 3, 4]))
    first = "the first 4" if given is as_stream else "4"
    cut = f"train_dataset: 2 of {first} rows are longer than max_length=4 (the longest has 7 tokens) and are cut; "
    check_whole_rows(some, "train_dataset", 4, "keep_start", False)
    assert cut + "1 of them have a prompt of that length and are left out (truncation_mode='keep_end'" in caplog.text
    caplog.clear()
    check_whole_rows(some, "train_dataset", 4, "keep_end", False)
    assert cut + "0 of them" in caplog.text
    caplog.clear()
    check_whole_rows(some, "train_dataset", 7, "keep_start", False)
    check_whole_rows(some, "train_dataset", None, "keep_start", False)
    check_whole_rows(some, "train_dataset", 4, "keep_start", True)
    assert not caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows([1, 2, 3]), "has 1 row"),
        (rows([1, 2, 3], [4]), "row 1 has 1 token"),
        (rows([1, 2, 3], [-100, -100]), "row 1 has no completion"),
        (rows([1, 2], *[[1, 2, 3, 4, 5]] * 3), "row 1 has 5 tokens, the model's context is 4"),
        (rows([1, 2]).select([]), "no row with a completion token"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_errors(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_prepared_rows(dataset, "train_dataset", 4, 4)


def test_row_numbers_go_beyond_the_first_thousand():
    with pytest.raises(ValueError, match="row 1700 has no completion"):
        check_prepared_rows(rows(*[[1, 2]] * 1700, [-100, -100]), "train_dataset", 4, 4)


def test_a_single_row_is_enough_to_evaluate():
    check_prepared_rows(rows([1, 2, 3]), "eval_dataset", None, 4)
