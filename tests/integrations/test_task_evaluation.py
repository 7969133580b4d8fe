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
    problems = [{"question": f"{i} + {i}?", "answer": f"So\n#### {2 * i}"} for i in range(8)]
    write_rows(tmp_path / "gsm8k.validation.jsonl", problems[6:])
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


def test_choice_tasks_take_worked_examples_that_are_not_evaluated(lm, folder):
    texts = {name: f"{name}\nAnswer:" for name in ("Q1", "first", "second", "third")}
    shots = [{"question": text, "choices": ["aa", "bb b"], "answer": 1} for text in texts.values()]
    write_rows(folder / "piqa.calibration.jsonl", shots)  # the first of them is evaluated, too
    evaluation = TaskEvaluation(["piqa"], folder, num_fewshot=2)
    assert evaluation.shots_file_of("piqa") == folder / "piqa.calibration.jsonl"
    task = evaluation._load("piqa")["tasks"]["local_piqa"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    before = "first\nAnswer: bb b\n\nsecond\nAnswer: bb b\n\n"
    assert [request.args[0] for request in task.instances] == [f"{before}q{i}\nAnswer:" for i in (0, 0, 1, 1)]
    assert evaluation.run(lm, "piqa", limit=2)["num_fewshot"] == 2
    assert TaskEvaluation(["piqa"], folder).shots_file_of("piqa") is None


def test_worked_examples_of_other_forms(folder, caplog):
    sentences = [
        {"question": f"{n} met Bea as _ was tall.", "choices": [n, "Bea"], "answer": 1} for n in ("Ann", "Eva")
    ]
    articles = [{"text": f" = {name} = \n\nIt is so"} for name in ("A", "B")]
    for number, part in enumerate(("validation", "calibration")):
        write_rows(folder / f"winogrande.{part}.jsonl", sentences[number : number + 1])
        write_rows(folder / f"wikitext2.{part}.jsonl", articles[number : number + 1])
        write_rows(folder / f"lambada.{part}.jsonl", [{"text": f"{number} and so on"}])
    evaluation = TaskEvaluation(["winogrande", "lambada", "wikitext2"], folder, num_fewshot=1)
    prompts = {}
    for name in evaluation.tasks:
        task = evaluation._load(name)["tasks"][f"local_{name}"]
        task.build_all_requests(rank=0, world_size=1)
        prompts[name] = [request.args[0] for request in task.instances]
    assert prompts["winogrande"] == [
        f"Eva met Bea as Bea was tall.\n\nAnn met Bea as {name}" for name in ("Ann", "Bea")
    ]
    assert prompts["lambada"] == ["1 and so on\n\n0 and so"]
    # A text that is scored as a whole has no question before which they could stand.
    assert evaluation.shots_file_of("wikitext2") is None and len(prompts["wikitext2"]) == 1
    assert "local_wikitext2 takes no worked examples" in caplog.text


def test_worked_examples_that_are_not_there_are_an_error_at_the_start(folder):
    with pytest.raises(ValueError, match=f"num_fewshot: piqa: no piqa.calibration.jsonl in {folder} for 2 worked"):
        TaskEvaluation(["gsm8k", "piqa"], folder, num_fewshot=2)
    write_rows(folder / "piqa.calibration.jsonl", [{"question": "Q0 Answer:", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(ValueError, match="piqa.calibration.jsonl has 0 rows that are not evaluated, too few for 2"):
        TaskEvaluation(["piqa"], folder, num_fewshot=2)
    with pytest.raises(ValueError, match="gsm8k.calibration.jsonl has 0 rows that are not evaluated"):
        TaskEvaluation(["gsm8k"], folder, data_split="calibration", num_fewshot=1)
    with pytest.raises(ValueError, match="num_fewshot must be at least 0"):
        TaskEvaluation(["piqa"], folder, num_fewshot=-1)
    # Those that a task has by itself are data like others: without them it is left out.
    (folder / "gsm8k.calibration.jsonl").unlink()
    reason = f"no gsm8k.calibration.jsonl in {folder} for 5 worked examples"
    assert TaskEvaluation(["gsm8k", "piqa"], folder).missing() == {"gsm8k": reason}
    assert not TaskEvaluation(["gsm8k"], folder, num_fewshot=0).missing()


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "piqa.validation.jsonl has no rows"),
        ("\n\n", "piqa.validation.jsonl has no rows"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{"quest', "piqa.validation.jsonl is not made of"),
    ],
)
def test_files_without_rows_are_named(lm, folder, content, message):
    (folder / "piqa.validation.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        TaskEvaluation(["piqa"], folder).run(lm, "piqa")


def test_an_empty_calibration_part_has_no_worked_examples(folder):
    (folder / "piqa.calibration.jsonl").write_text("")
    assert len(load_local_data("piqa", str(folder))["fewshot"]) == 0


def test_rows_are_brought_to_the_form_of_lm_eval():
    doc = {"question": "Ann saw Bea because _ was tall.", "choices": ["Ann", "Bea"], "answer": 1}
    assert winogrande_choice(doc) == ["Ann saw Bea because Ann", "Ann saw Bea because Bea"]
    assert winogrande_target(doc) == "was tall."
    texts = ["= First =\n\nIt begins .", "= = A section = =\n\nMore .", "Still more .", " = Second = \n\nAgain ."]
    pages = wikitext_articles({"text": texts})["page"]
    assert list(pages) == ["\n\n".join(texts[:3]), texts[3]]
