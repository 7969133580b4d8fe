import json

import pytest
from test_link_report import HANDOVER
from test_search_study_report import SEARCHES

from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.evaluation import read_results, write_results
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.evaluation.run_comparison import Run, accuracies_by_task, compare_runs
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


PLAN = PruningPlan(
    "some/model-1B", "llama", 6, prefill=StagePlan((2,)), decode=StagePlan((2, 4)), kv=KVPlan((0, 3, 4), 4, 28)
)
TIMES = {name: {"median": 0.2, "quartiles": [0.19, 0.21], "measurements": 3} for name in ("dense", "pruned")}
CASE = {
    "prompt_tokens": 1024,
    "batch_size": 2,
    "ttft": {**TIMES, "ratio": 0.8, "ratio_quartiles": [0.79, 0.82]},
    "tpot": {**TIMES, "ratio": 0.7, "ratio_quartiles": [0.69, 0.71]},
    "latency": {"dense": 4.0, "pruned": 3.0, "ratio": 0.75, "answer_tokens": 128},
    "throughput": {"dense": 30.0, "pruned": 40.0, "ratio": 4 / 3},
    "memory": {stage: {"dense": None, "pruned": None} for stage in ("prefill", "decode")},
    "kv": {"bytes_dense": 1_250_000, "bytes_sent": 250_000, "ratio": 5.0, "bytes_held": {"dense": 100, "pruned": 25}},
    "roofline": {"prefill_flops_removed": 0.16, "decode_bytes_removed": 0.4},
}


def quality(kl):
    return {"perplexity": 20.0, "kl": kl, "kl_prefill": kl / 2, "kl_decode": kl, "top1_agreement": 0.7, "tokens": 1500}


def write_run(folder, kl, tpot):
    PLAN.save_pretrained(folder)
    task = {"metric": "acc", "dense": 0.6, "pruned": 0.5, "difference": -0.1, "difference_stderr": 0.02, "rows": 50}
    stages = {"dense": quality(0.0), "pruned": quality(kl)}
    speed = {"ttft_ratio": 0.8, "tpot_ratio": tpot, "prefill_share_removed": 0.2, "decode_share_removed": 0.3}
    write_results(
        folder,
        {
            "tasks": {"piqa": task},
            "tasks_mean": {**task, "tasks": 1},
            "tasks_skipped": {"rte": "no rte.validation.jsonl"},
            "quality_of_stages": stages,
            "quality_of_stages_all_tokens": stages,
            "speed": speed,
            "kv": {"ratio": 5.0, "prompt_tokens": 1024, "bytes_dense": 5, "bytes_sent": 1},
            "environment": {"device": "two cores"},
        },
    )
    (folder / "benchmark.json").write_text(json.dumps({"cases": [CASE]}))
    record_command(folder, "benchmark", "accelerate launch recipes/benchmark.py --stages <stages>")
    record_command(folder, "evaluate", "accelerate launch recipes/evaluate.py --limit 50")
    return folder


def test_runs_stand_side_by_side(tmp_path):
    folders = {"mild": write_run(tmp_path / "a", 0.4, 0.9), "strong": write_run(tmp_path / "b", 1.2, 0.7)}
    rows = RowFile(tmp_path / "study" / "ablation.jsonl")
    row = {"prefill": [2], "decode": [2, 4], "kv_reduction": 2.5, "quality": quality(0.3), "search_cost": 3.25}
    rows.add({"section": "strategies", "variant": "one_shot"}, row)
    rows.add({"search": "one_shot"}, {"plan": {}, "cost": 1})
    draft = {"tokens_per_forward": 2.5, "time_ratio": 0.9, "same_text": 1.0, "prompts": 4}
    rows.add({"section": "draft", "variant": "decode stage"}, draft)
    output = tmp_path / "docs" / "results.md"
    table = compare_runs({**folders, "study": rows.path.parent}, output, "All of it")
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["mild", "strong"]
    text = output.read_text()
    for part in (
        "# All of it",
        "| strong | 2 | 2, 4 | 2 blocks, 4 + 28 | 1.200 | 60.0% | 50.0% | -10.0 ± 2.0 points | 0.800 | 0.700 |",
        "| 5.00x of 1,024 |",
        "|  | mild | strong |",
        "| piqa | -10.0 ± 2.0 points | -10.0 ± 2.0 points |",
        "| mean | -10.0 ± 2.0 points | -10.0 ± 2.0 points |",
        "| piqa | acc | 50 | 60.0 % | 50.0 % | -10.0 ± 2.0 points |",
        "Left out: rte",
        "recipes/evaluate.py --limit 50",
        "0.800 (0.79-0.82)",
        "x 0.750",
        "100 B (4.00x fewer)".replace("100", "25"),
        "| 16.0% | 20.0% | 125% | 40.0% | 30.0% | 75% |",
        "10 -> 2 ms",  # 1.25 MB and 0.25 MB at 1 Gbit/s
        "| one_shot | 2 | 4 | 2.50x | 20.0 | 0.300 | 0.150 | 0.300 | 70.0% | 3.2 |",
        "| decode stage | 2.50 | 0.90 | 100% | 4 |",
        "(results.png)",
    ):
        assert part in text, part
    assert (tmp_path / "docs" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_notes_stand_between_the_comparison_and_the_runs(tmp_path):
    folders = {"mild": write_run(tmp_path / "a", 0.4, 0.9), "strong": write_run(tmp_path / "b", 1.2, 0.7)}
    compare_runs(folders, tmp_path / "plain.md")
    compare_runs(folders, tmp_path / "noted.md", notes="## What it says\n\nMild is better.\n")
    plain, noted = (path.read_text() for path in (tmp_path / "plain.md", tmp_path / "noted.md"))
    assert "no number is typed in.\n" in plain and "no number is typed in, but for the notes.\n" in noted
    assert "(noted.png)\n\n## What it says\n\nMild is better.\n\n## mild\n" in noted


def test_a_study_alone_has_its_tables(tmp_path):
    rows = RowFile(tmp_path / "study" / "ablation.jsonl")
    rows.add(
        {"section": "parts", "variant": "cache only"},
        {"prefill": [], "decode": [], "kv_reduction": 2.0, "quality": quality(0.3)},
    )
    assert "cache only" in compare_runs({"study": rows.path.parent}, tmp_path / "out.md")
    assert not (tmp_path / "out.png").exists()


def test_links_and_token_choice_of_runs(tmp_path):
    run, study = write_run(tmp_path / "a", 0.4, 0.9), tmp_path / "study"
    (run / "handover.json").write_text(json.dumps(HANDOVER))
    record_command(run, "handover", "accelerate launch recipes/handover.py --stages <stages>")
    settings = {"plan": PLAN.digest, "model": "some-1B", "seed": 0, "task": "text", "example": "x"}
    score = {"kl": 0.25, "top1_agreement": 0.5, "nll": 1.0, "correct": 0.0}
    RowFile(study / "token_choice.jsonl").add(settings, {"SnapKV, all blocks": score})
    compare_runs({"a": run, "study": study}, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    command = text.index("accelerate launch recipes/handover.py --stages <stages>")
    assert text.index("### Links") < command < text.index("| slow | dense | in one piece |") < text.index("## study")
    assert text.index("## study") < text.index("| SnapKV, all blocks | 0.250 / 50% |")
    # Where there is nothing else, the terminal gets the choices.
    assert "| SnapKV, all blocks | 0.250 / 50% |" in compare_runs({"study": study}, tmp_path / "out.md")


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of results.json, ablation.jsonl, token_choice.jsonl, search_"):
        compare_runs({"x": tmp_path}, tmp_path / "out.md")
    assert not (tmp_path / "out.md").exists()


def test_commands_are_kept_by_recipe(tmp_path):
    record_command(tmp_path, "evaluate", "a")
    record_command(tmp_path, "evaluate", "b")
    record_command(tmp_path, "benchmark", "c")
    assert read_results(tmp_path)["commands"] == {"evaluate": "b", "benchmark": "c"}


def test_differences_by_task_name_what_a_run_has_not(tmp_path):
    one, other = write_run(tmp_path / "a", 0.4, 0.9), write_run(tmp_path / "b", 1.2, 0.7)
    assert accuracies_by_task([Run.from_folder(one)]) is None
    task = {"metric": "word_perplexity", "dense": 20.0, "pruned": 25.5, "difference": 5.5, "rows": 8}
    write_results(other, {"tasks": {"wikitext2": task}}, replaced=["tasks_mean"])
    table = accuracies_by_task([Run.from_folder(one), Run.from_folder(other)])
    assert table.rows == [
        ["", "a", "b"],
        ["piqa", "-10.0 ± 2.0 points", ""],
        ["wikitext2", "", "+5.5"],
        ["mean", "-10.0 ± 2.0 points", ""],
    ]


def test_a_study_of_searches_is_in_the_report(tmp_path):
    folder = tmp_path / "searches"
    write_artefact(folder / "search_study.json", SEARCHES)
    record_command(folder, "search_study", "accelerate launch recipes/search_study.py --seeds 0 1")
    assert "annealing" in compare_runs({"searches": folder}, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert text.index("## searches") < text.index("search_study.py --seeds") < text.index("| first | 2 | annealing")


def test_kl_of_the_finished_pair():
    results = {"quality": {"unhealed": {"kl": 2.0}, "healed": {"kl": 1.0}}}
    run, empty = Run("x", None, results, [], []), Run("x", None, {}, [], [])
    assert (run.kl_unhealed, run.kl) == (2.0, 1.0) and (empty.kl_unhealed, empty.kl) == (None, None)
