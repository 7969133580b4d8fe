import pytest

from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.evaluation.token_choice_report import choice_means, choice_table, token_choice_lines


def score(kl, agreement, correct):
    return {"kl": kl, "top1_agreement": agreement, "nll": 1.0, "correct": correct}


@pytest.fixture
def rows(tmp_path):
    """As recipes/token_choice.py keeps them: two runs, of other seeds, in one file."""
    file = RowFile(tmp_path / "token_choice.jsonl")
    for seed, tasks in ((0, ("text", "needle 400 0.1", "needle 900 0.1", "needle 400 0.9", "piqa")), (1, ("text",))):
        run = {"plan": "abcdef0123", "model": "/models/some-1B", "fingerprint": "f", "seed": seed, "quantizations": []}
        for number, task in enumerate(tasks):
            scores = {"dense": score(0.0, 1.0, 1.0), "H2O, all blocks": score(0.1 * number + seed, 0.75, number % 2)}
            file.add({**run, "task": task, "example": f"{number}"}, scores)
    return list(RowFile(file.path))


def test_means_by_task_and_by_depth(rows):
    means = choice_means(rows[:5])
    assert list(means) == ["text", "needle", "piqa"]
    assert means["needle"]["H2O, all blocks"]["kl"] == pytest.approx(0.2)
    assert means["needle"]["H2O, all blocks"]["correct"] == pytest.approx(2 / 3)
    assert list(choice_means(rows[1:4], by_depth=True)) == ["needle, depth 0.1", "needle, depth 0.9"]


def test_a_kl_that_was_rounded_to_less_than_nothing_is_none():
    means = {"text": {"all tokens": {"kl": -7e-9, "top1_agreement": 1.0, "correct": 0.0}}}
    assert "| all tokens | 0.000 / 100% |" in choice_table(means).to_markdown()


def test_a_table_for_each_run(rows):
    text = "\n".join(token_choice_lines(rows))
    for part in (
        "Plan abcdef01, some-1B, seed 0, 5 examples.",
        "|  | text | needle | piqa |",
        "| H2O, all blocks | 0.000 / 75% | 0.200 / 67% | 0.400 / 0% |",
        "|  | needle, depth 0.1 | needle, depth 0.9 |",
        "| H2O, all blocks | 0.150 / 50% | 0.300 / 100% |",
        "Plan abcdef01, some-1B, seed 1, 1 examples.",
        "| H2O, all blocks | 1.000 / 75% |",
    ):
        assert part in text, part
    assert text.count("by its depth") == 1  # the second run has nothing to find
    assert token_choice_lines([]) == []
