import math

import pytest

from hf_pdprune.evaluation.task_comparison import (
    accuracies_and_others,
    compare_tasks,
    main_metric,
    mean_accuracy,
    paired_stderr,
)


def result(right, **more):
    metrics = {"acc": sum(right) / len(right), "acc_norm": 0.5}
    return {"metrics": metrics, "stderr": {}, "rows": len(right), "num_fewshot": 0, "per_row": {"acc": right}} | more


def test_differences_are_taken_row_by_row():
    dense = {"piqa": result([1, 1, 0, 1]), "rte": result([1, 0]), "only_dense": result([1])}
    pruned = {"piqa": result([1, 0, 0, 1]), "rte": result([1, 0])}
    compared = compare_tasks(dense, pruned)
    assert set(compared) == {"piqa", "rte"}
    piqa = compared["piqa"]
    assert (piqa["metric"], piqa["dense"], piqa["pruned"], piqa["rows"]) == ("acc", 0.75, 0.5, 4)
    # Three rows without a difference, one of -1: far less than what two independent samples would give.
    assert piqa["difference"] == -0.25 and piqa["difference_stderr"] == pytest.approx(0.5 / 2)
    assert compared["rte"]["difference_stderr"] == 0
    assert piqa["all"]["pruned"] == {"acc": 0.5, "acc_norm": 0.5}
    mean = mean_accuracy(compared)
    assert mean == pytest.approx(
        {"dense": 0.625, "pruned": 0.5, "difference": -0.125, "difference_stderr": 0.125, "tasks": 2}
    )


def test_perplexities_are_compared_but_not_averaged():
    text = {"metrics": {"byte_perplexity": 2.0, "word_perplexity": 20.0}, "rows": 3, "per_row": {}}
    more = text | {"metrics": {"byte_perplexity": 3.0, "word_perplexity": 30.0}}
    compared = compare_tasks({"wikitext2": text}, {"wikitext2": more})
    assert compared["wikitext2"]["metric"] == "word_perplexity" and compared["wikitext2"]["difference"] == 10
    assert compared["wikitext2"]["difference_stderr"] is None
    assert mean_accuracy(compared) is None


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="piqa: the dense model was evaluated on 2 rows, the pair on 1"):
        compare_tasks({"piqa": result([1, 0])}, {"piqa": result([1])})


def test_main_metric():
    assert main_metric({"exact_match (strict-match)": 0, "exact_match (flexible-extract)": 0}).endswith("extract)")
    assert main_metric({"f1": 0.0}) == "f1"
    assert paired_stderr([1.0], [0.0]) is None
    assert paired_stderr([0, 0, 1, 1], [1, 0, 1, 0]) == pytest.approx(math.sqrt(2 / 3) / 2)


def test_tasks_of_one_model_by_kind_of_metric():
    accuracy = {"metrics": {"acc": 0.5}, "stderr": {"acc": 0.03}}
    other = {"metrics": {"acc": 0.7}, "stderr": {"acc": 0.04}}
    perplexity = {"metrics": {"word_perplexity": 20.0}, "stderr": {}}
    parts = accuracies_and_others({"piqa": accuracy, "boolq": other, "wikitext2": perplexity})
    assert parts["accuracy"]["mean"] == pytest.approx(0.6) and parts["accuracy"]["stderr"] == pytest.approx(0.025)
    assert parts["accuracy"]["tasks"] == {"piqa": 0.5, "boolq": 0.7}
    assert parts["other_tasks"] == {"wikitext2": {"metric": "word_perplexity", "value": 20.0}}
    assert accuracies_and_others({}) == {} and "accuracy" not in accuracies_and_others({"wikitext2": perplexity})
