import json

import pytest
from lm_eval.tasks import TaskManager

from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.integrations import task_evaluation
from hf_pdprune.integrations.lm_eval import PDPruneLM
from hf_pdprune.integrations.local_tasks.local_data import (
    load_local_data,
    wikitext_articles,
    winogrande_choice,
    winogrande_target,
)
from hf_pdprune.integrations.task_evaluation import TaskEvaluation
from hf_pdprune.plan import PruningPlan


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    questions = [{"question": f"q{i}\nAnswer:", "choices": ["aa", "bb b"], "answer": i % 2} for i in range(5)]
    write_rows(tmp_path / "piqa.validation.jsonl", questions)
    write_rows(tmp_path / "boolq.heldout.jsonl", questions[:2])
    problems = [{"question": f"{i} + {i}?", "answer": f"So\n#### {2 * i}"} for i in range(6)]
    write_rows(tmp_path / "gsm8k.validation.jsonl", problems[:2])
    write_rows(tmp_path / "gsm8k.calibration.jsonl", problems)
    return tmp_path


@pytest.fixture
def lm(tiny_llama, tiny_tokenizer):
    plan = PruningPlan.empty(tiny_llama)
    stages = {"prefill": PrefillStage(tiny_llama, plan), "decode": DecodeStage(tiny_llama, plan)}
    return PDPruneLM(**stages, tokenizer=tiny_tokenizer, batch_size=4)


def test_result_has_metrics_errors_and_rows(lm, folder):
    evaluation = TaskEvaluation(["piqa", "rte"], folder)
    assert evaluation.missing() == {"rte": f"no rte.validation.jsonl in {folder}"}
    assert evaluation.file_of("piqa") == folder / "piqa.validation.jsonl"
    found = evaluation.run(lm, "piqa", limit=4)
    assert set(found["metrics"]) == set(found["stderr"]) == {"acc", "acc_norm"}
    assert (found["rows"], found["num_fewshot"]) == (4, 0)
    assert len(found["per_row"]["acc"]) == 4
    assert sum(found["per_row"]["acc"]) / 4 == found["metrics"]["acc"]
    assert evaluation.texts("piqa", 2) == ["q0\nAnswer:", "q1\nAnswer:"] and len(evaluation.texts("piqa")) == 5
    json.dumps(found)


def test_worked_examples_come_from_the_calibration_part(folder):
    task = TaskEvaluation(["gsm8k"], folder)._load("gsm8k")["tasks"]["local_gsm8k"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("Question:") == 6 and prompt.startswith("Question: 0 + 0?\nAnswer: So\n#### 0")
    fewer = TaskEvaluation(["gsm8k"], folder, num_fewshot=1)._load("gsm8k")["tasks"]["local_gsm8k"]
    assert fewer.get_config("num_fewshot") == 1


def test_generated_answers_are_compared(lm, folder):
    evaluation = TaskEvaluation(["gsm8k"], folder, num_fewshot=1)
    task = evaluation._load("gsm8k")["tasks"]["local_gsm8k"]
    task.set_config(key="generation_kwargs", value={"max_gen_toks": 4}, update=True)
    found = evaluation.run(lm, "gsm8k", limit=2)
    assert found["metrics"] == {"exact_match (strict-match)": 0.0, "exact_match (flexible-extract)": 0.0}
    assert found["per_row"]["exact_match (flexible-extract)"] == [0.0, 0.0]


def test_the_part_of_the_data_is_an_option(lm, folder):
    assert TaskEvaluation(["boolq"], folder).missing()
    evaluation = TaskEvaluation(["boolq"], folder, data_split="heldout")
    assert not evaluation.missing() and evaluation.run(lm, "boolq")["rows"] == 2


def test_names_without_a_folder_are_lm_evals_own():
    evaluation = TaskEvaluation(["piqa"])
    assert evaluation.file_of("piqa") is None and evaluation.missing() == {}
    with pytest.raises(ValueError, match="unknown task 'piqaa'; on local data there are .*winogrande"):
        TaskEvaluation(["piqaa"])


@pytest.fixture
def lm_evals_own(tmp_path, monkeypatch):
    """Few tasks in place of the thousands of lm-eval, whose names alone take a minute to read."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = "custom_dataset: !function hf_pdprune.integrations.local_tasks.local_data.load_local_data\n"
    rows += "output_type: multiple_choice\ntest_split: evaluation\ndoc_to_text: question\ndoc_to_target: answer\n"
    rows += "doc_to_choice: choices\ndataset_kwargs:\n  file: piqa\n"
    for name in ("one", "two", "piqa"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntag: [some]\n{rows}")
    mean = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (folder / "mean.yaml").write_text(f"group: with_mean\ntask: [one, two]\n{mean}")
    (folder / "none.yaml").write_text("group: without_mean\ntask:\n  - with_mean\n  - task: one\n")

    def manager(include_path, include_defaults, metadata):
        own = [str(folder)] if include_defaults else []
        return TaskManager(include_path=[include_path, *own], include_defaults=False, metadata=metadata)

    monkeypatch.setattr(task_evaluation, "TaskManager", manager)


def test_a_tag_is_its_tasks_and_a_group_needs_a_result(lm, folder, lm_evals_own, monkeypatch):
    monkeypatch.setenv("HF_PDPRUNE_DATA", str(folder))
    assert TaskEvaluation(["some"]).tasks == ["one", "piqa", "two"]
    assert TaskEvaluation(["two", "some"]).tasks == ["two", "one", "piqa"]
    evaluation = TaskEvaluation(["some", "with_mean"], folder)
    assert evaluation.tasks == ["one", "piqa", "two", "with_mean"]
    assert evaluation.file_of("one") is None and evaluation.file_of("piqa") == folder / "piqa.validation.jsonl"
    found = [evaluation.run(lm, task, limit=3) for task in evaluation.tasks]
    assert [result["rows"] for result in found] == [3, 3, 3, 6]
    assert all(set(result["metrics"]) >= {"acc"} for result in found)
    with pytest.raises(ValueError, match="'without_mean' has no result of its own; name those of with_mean, one"):
        TaskEvaluation(["without_mean"])


def test_bad_input_is_named(folder, monkeypatch):
    with pytest.raises(ValueError, match="'piqa' is named twice"):
        TaskEvaluation(["piqa", "piqa"], folder)
    with pytest.raises(FileNotFoundError, match="data_folder"):
        TaskEvaluation(["piqa"], folder / "nothing")
    monkeypatch.delenv("HF_PDPRUNE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="HF_PDPRUNE_DATA"):
        load_local_data("piqa")
    monkeypatch.setenv("HF_PDPRUNE_DATA", str(folder))
    assert len(load_local_data("piqa")["evaluation"]) == 5
    with pytest.raises(FileNotFoundError, match="no sst2.validation.jsonl"):
        load_local_data("sst2")


def test_rows_are_brought_to_the_form_of_lm_eval():
    doc = {"question": "Ann saw Bea because _ was tall.", "choices": ["Ann", "Bea"], "answer": 1}
    assert winogrande_choice(doc) == ["Ann saw Bea because Ann", "Ann saw Bea because Bea"]
    assert winogrande_target(doc) == "was tall."
    texts = ["= First =\n\nIt begins .", "= = A section = =\n\nMore .", "Still more .", " = Second = \n\nAgain ."]
    pages = wikitext_articles({"text": texts})["page"]
    assert list(pages) == ["\n\n".join(texts[:3]), texts[3]]
