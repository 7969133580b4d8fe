import pytest
from datasets import Dataset

from hf_pdprune.trainer.training_data import check_given_rows, check_prepared_rows


def rows(*labels):
    return Dataset.from_list([{"input_ids": list(range(len(row))), "labels": row} for row in labels])


def test_rows_without_completion_are_named():
    good = [-100, 1, 2]
    with pytest.raises(ValueError, match="train_dataset: row 2 has no completion token"):
        check_given_rows(rows(good, good, [-100, -100]), "train_dataset")
    with pytest.raises(ValueError, match="row 0 has not as many labels as tokens"):
        check_given_rows(Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1]}]), "train_dataset")
    check_given_rows(rows(good, good), "train_dataset")
    check_given_rows(Dataset.from_list([{"text": "plain"}]), "train_dataset")


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
