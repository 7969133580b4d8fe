import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_pdprune.hub import export_stages
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.integrations.lm_eval import PDPruneLM, StopSequences
from hf_pdprune.integrations.local_tasks import LOCAL_TASKS_FOLDER
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


WORDS = "the quick brown fox jumps over a lazy dog while one old cat sleeps".split()


def text(seed, words=12):
    return " ".join(WORDS[(seed * 7 + place * (1 + seed % 5)) % len(WORDS)] for place in range(words))


def choice_rows(choices, **more):
    return [{"question": f"{text(i)}\nAnswer:", "choices": choices(i), "answer": i % 2, **more} for i in range(6)]


def write_data(folder):
    """A few rows of every local task."""
    texts = choice_rows(lambda i: [text(i + 1, 3), text(i + 2, 6)])
    letters = choice_rows(lambda i: ["A", "B", "C", "D"])
    data = {name: texts for name in ("piqa", "arc_easy", "arc_challenge", "hellaswag")}
    data |= {name: choice_rows(lambda i: ["no", "yes"]) for name in ("boolq", "rte", "sst2")}
    data["mmlu"] = [row | {"subject": "high_school_biology"} for row in letters]
    data["cmmlu"] = [row | {"subject": "computer_security"} for row in letters]
    data["winogrande"] = [
        {"question": f"{text(i, 5)} _ {text(i + 3, 5)}.", "choices": ["fox", "cat"], "answer": i % 2} for i in range(6)
    ]
    data["lambada"] = [{"text": text(i, 15)} for i in range(6)]
    data["wikitext2"] = [
        {"text": f" = {text(i, 2)} = \n\n{text(i, 40)}" if i % 3 == 0 else text(i, 60)} for i in range(6)
    ]
    data["gsm8k"] = [
        {"question": f"How many of {i}? {text(i, 4)}", "answer": f"{text(i, 3)}\n#### {i}"} for i in range(12)
    ]
    for name, rows in data.items():
        # Worked examples are rows that are not evaluated; none but GSM8K needs any.
        for part, its_rows in (("validation", rows[:6]), ("calibration", rows[6:] or rows)):
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in its_rows))
    return sorted(data)


@pytest.fixture
def dense(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama", num_hidden_layers=4, max_position_embeddings=400)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    return model


@pytest.fixture
def plan(dense):
    kv = KVPlan((0, 3), first_tokens=2, last_tokens=6)
    return PruningPlan.empty(dense, "tiny", prefill=StagePlan((1,)), decode=StagePlan((1, 2)), kv=kv)


def loaded(tasks, folder):
    metadata = {"data_folder": str(folder)}
    manager = TaskManager(include_path=str(LOCAL_TASKS_FOLDER), include_defaults=False, metadata=metadata)
    return manager.load(tasks)


def evaluated(lm, tasks, folder, **options):
    tasks = loaded(tasks, folder)
    for task in tasks["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": 6}, update=True)
    return evaluate(lm, tasks, bootstrap_iters=0, **options)


def metrics(results, task):
    return {key: value for key, value in results["results"][task].items() if "," in key and "stderr" not in key}


def test_an_empty_plan_gives_the_numbers_of_stock_hf_on_every_local_task(dense, tiny_tokenizer, tmp_path):
    tasks = [f"local_{name}" for name in write_data(tmp_path)]
    assert tasks == sorted(path.stem for path in LOCAL_TASKS_FOLDER.glob("local_*.yaml"))
    stock = HFLM(pretrained=dense, tokenizer=tiny_tokenizer, batch_size=3)
    ours = PDPruneLM(pretrained=str(tmp_path / "dense"), plan="empty", dtype="float32", batch_size=3, device="cuda:0")
    assert ours.device.type == ("cuda" if torch.cuda.is_available() else "cpu")  # as stock hf falls back
    expected, found = (evaluated(lm, tasks, tmp_path, limit=3) for lm in (stock, ours))
    for task in tasks:
        assert metrics(found, task) == pytest.approx(metrics(expected, task), rel=1e-5), task
        for one, other in zip(expected["samples"][task], found["samples"][task], strict=True):
            if expected["configs"][task]["output_type"] == "generate_until":
                assert one["resps"] == other["resps"]
                continue
            for first, second in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert second == pytest.approx(first, rel=1e-5, abs=1e-4), task


def test_context_goes_through_prefill_and_continuation_through_decode(dense, plan, tiny_tokenizer, tmp_path):
    export_stages(dense, plan, tmp_path / "pair", tokenizer=tiny_tokenizer)
    views = PDPruneLM(
        prefill=PrefillStage(dense, plan), decode=DecodeStage(dense, plan), tokenizer=tiny_tokenizer, batch_size=4
    )
    folder = tmp_path / "pair"
    checkpoints = PDPruneLM(prefill=f"{folder}/prefill", decode=f"{folder}/decode", batch_size=2, device="cpu")
    stock = HFLM(pretrained=dense, tokenizer=tiny_tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (text(i, 20), " " + text(j, 4)), 0) for i in range(3) for j in range(2)
    ] + [Instance("loglikelihood", {}, ("", text(5)), 0)]
    found = views.loglikelihood(requests, disable_tqdm=True)
    for one, other in zip(found, checkpoints.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    # What comes out is neither the dense model's, nor prefill's or decode's alone.
    alone = [
        HFLM(pretrained=stage.model, tokenizer=tiny_tokenizer, batch_size=4)
        for stage in (checkpoints.prefill, checkpoints.decode)
    ]
    for lm in (stock, *alone):
        assert (
            max(
                abs(one[0] - other[0])
                for one, other in zip(found, lm.loglikelihood(requests, disable_tqdm=True), strict=True)
            )
            > 1e-2
        )


@pytest.mark.slow
def test_command_line(dense, plan, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    write_data(tmp_path)
    export_stages(dense, plan, tmp_path / "pair", tokenizer=tiny_tokenizer)
    monkeypatch.setenv("HF_PDPRUNE_DATA", str(tmp_path))
    model_args = f"prefill={tmp_path}/pair/prefill,decode={tmp_path}/pair/decode,dtype=float32"
    arguments = ["run", "--model", "hf-pdprune", "--model_args", model_args, "--tasks", "local_piqa", "--limit", "3"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--include_path", str(LOCAL_TASKS_FOLDER)])
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    cli_evaluate()
    assert "|local_piqa|" in capsys.readouterr().out


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_generation_is_that_of_the_stages(dense, plan, tiny_tokenizer, first_token):
    prefill, decode = PrefillStage(dense, plan), DecodeStage(dense, plan)
    lm = PDPruneLM(prefill=prefill, decode=decode, tokenizer=tiny_tokenizer, batch_size=2, first_token=first_token)
    contexts = [text(i, 6 + 2 * i) for i in range(3)]
    stop = "q"
    requests = [Instance("generate_until", {}, (c, {"until": [stop], "max_gen_toks": 12}), 0) for c in contexts]
    answers = lm.generate_until(requests, disable_tqdm=True)
    for context, answer in zip(contexts, answers, strict=True):
        ids = tiny_tokenizer(context, return_tensors="pt").input_ids
        payload = prefill(ids, do_sample=False, first_token=first_token)
        whole = decode.generate(payload, max_new_tokens=12, do_sample=False)
        expected = tiny_tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == expected.split(stop)[0]


def test_contexts_are_cut_as_lm_eval_cuts_them(dense, tiny_tokenizer):
    plan = PruningPlan.empty(dense)
    stages = {"prefill": PrefillStage(dense, plan), "decode": DecodeStage(dense, plan), "tokenizer": tiny_tokenizer}
    requests = [Instance("loglikelihood", {}, (text(1, 30), " " + text(j, 3)), 0) for j in range(2)]
    lms = [PDPruneLM(**stages, max_length=40), HFLM(pretrained=dense, tokenizer=tiny_tokenizer, max_length=40)]
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in lms)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_answers_are_kept_as_they_come(dense, plan, tiny_tokenizer, tmp_path, monkeypatch):
    """An evaluation that is interrupted in the middle of a task goes on there."""
    write_data(tmp_path)
    lm = PDPruneLM(
        prefill=PrefillStage(dense, plan), decode=DecodeStage(dense, plan), tokenizer=tiny_tokenizer, batch_size=2
    )
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    forward, calls = PrefillStage.forward, []

    def interrupted(self, ids, mask):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, ids, mask)

    with monkeypatch.context() as patch:
        patch.setattr(PrefillStage, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluated(cached, ["local_piqa"], tmp_path)
    calls.clear()
    monkeypatch.setattr(
        PrefillStage, "forward", lambda self, ids, mask: calls.append(len(ids)) or forward(self, ids, mask)
    )
    found = evaluated(cached, ["local_piqa"], tmp_path)
    assert sum(calls) == 2  # of six contexts, four were answered
    assert metrics(found, "local_piqa") == metrics(evaluated(lm, ["local_piqa"], tmp_path), "local_piqa")


def test_batch_size_can_be_found(dense, plan, tiny_tokenizer):
    lm = PDPruneLM(
        prefill=PrefillStage(dense, plan),
        decode=DecodeStage(dense, plan),
        tokenizer=tiny_tokenizer,
        batch_size="auto",
        max_batch_size=4,
        max_length=32,
    )
    request = [Instance("loglikelihood", {}, (text(1, 4), " the"), 0)]
    assert lm._detect_batch_size() == 4 and lm.loglikelihood(request, disable_tqdm=True)[0][0] < 0


def test_stop_sequences_are_looked_for_in_each_row_after_its_prompt(tiny_tokenizer):
    rows = tiny_tokenizer(["stop xx go on", "xx stop go on", "xx go on stop"], return_tensors="pt").input_ids
    stops = StopSequences(tiny_tokenizer, ["stop", ""], prompt_tokens=3)
    assert stops(rows, None).tolist() == [False, False, True]
    assert stops(rows[:, :7], None).tolist() == [False, True, False]


SHARE = """
import json, sys
from lm_eval import evaluate
from lm_eval.tasks import TaskManager
from hf_pdprune.integrations.lm_eval import PDPruneLM
from hf_pdprune.integrations.local_tasks import LOCAL_TASKS_FOLDER

folder, tasks = sys.argv[1], sys.argv[2:]
lm = PDPruneLM(prefill=f"{folder}/pair/prefill", decode=f"{folder}/pair/decode", dtype="float32", batch_size=2)
assert lm.world_size == 2
metadata = {"data_folder": folder}
manager = TaskManager(include_path=str(LOCAL_TASKS_FOLDER), include_defaults=False, metadata=metadata)
results = evaluate(lm, manager.load(tasks), limit=5, bootstrap_iters=0)
assert (results is None) == (lm.rank > 0)
if results is not None:
    with open(f"{folder}/found.json", "w") as file:
        json.dump({task: [results["results"][task], results["n-samples"][task]] for task in tasks}, file)
"""


def test_several_processes_take_a_share_each(dense, plan, tiny_tokenizer, tmp_path):
    write_data(tmp_path)
    export_stages(dense, plan, tmp_path / "pair", tokenizer=tiny_tokenizer)
    (tmp_path / "share.py").write_text(SHARE)
    tasks = ["local_piqa", "local_wikitext2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "share.py"), str(tmp_path), *tasks]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    lm = PDPruneLM(
        prefill=PrefillStage(dense, plan), decode=DecodeStage(dense, plan), tokenizer=tiny_tokenizer, batch_size=2
    )
    expected = evaluated(lm, tasks, tmp_path, limit=5)
    for task in tasks:
        results, rows = found[task]
        numbers = {key: value for key, value in results.items() if key in metrics(expected, task)}
        assert numbers == pytest.approx(metrics(expected, task), rel=1e-5)
        assert rows == expected["n-samples"][task]


def test_real_data_are_read_by_every_task():
    folder = os.environ.get("HF_PDPRUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HF_PDPRUNE_DATA names no folder")
    names = sorted(path.stem for path in LOCAL_TASKS_FOLDER.glob("local_*.yaml"))
    for name, task in loaded(names, folder)["tasks"].items():
        doc = next(iter(task.test_docs()))
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        assert choices is None or all(isinstance(choice, str) and choice for choice in choices), name
        assert task.doc_to_target(doc) not in (None, ""), name
        if name == "local_cmmlu":
            assert {task.doc_to_text(doc)[:4] for doc in task.test_docs()} == {"以下是关"}
        if name == "local_wikitext2":
            assert all(article["page"].lstrip().startswith("= ") for article in task.test_docs())


def test_stages_without_a_tokenizer_are_refused(dense, plan):
    with pytest.raises(ValueError, match="tokenizer="):
        PDPruneLM(prefill=PrefillStage(dense, plan), decode=DecodeStage(dense, plan))
    with pytest.raises(TypeError, match="no_such_option"):
        PDPruneLM(pretrained="x", no_such_option=1)


def test_an_unknown_stage_for_the_first_token_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="first_token must be prefill or decode, got 'both'"):
        PDPruneLM("nowhere", plan="empty", first_token="both")
