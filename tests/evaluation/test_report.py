import json
import math
from dataclasses import replace

import pytest
from test_link_report import HANDOVER

from hf_pdprune.evaluation import read_results, write_report, write_results
from hf_pdprune.evaluation.plan_plot import plot_plan
from hf_pdprune.evaluation.report import read_redundancy
from hf_pdprune.evaluation.result_table import ResultTable, megabytes
from hf_pdprune.evaluation.results import kl_closed, record_command
from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


PLAN = PruningPlan(
    base_model="some/model-1B",
    model_type="llama",
    num_hidden_layers=6,
    prefill=StagePlan((2,)),
    decode=StagePlan((2,), ((3, 4),)),
    kv=KVPlan((0, 2), 4, 28),
    provenance={"seed": 7, "objective": {"start": 0.5, "result": 0.25}, "history": [1, 2]},
)
RESULTS = {
    "quality": {
        "dense": {"perplexity": 12.5, "kl": 0.0, "tokens": 1500},
        "unhealed": {"perplexity": 123456.0, "kl": 2.0, "tokens": 1500},
        "healed": {"perplexity": 20.25, "kl": 0.5, "tokens": 1500},
    },
    "quality_all_tokens": {
        "dense": {"perplexity": 12.5, "kl": 0.0},
        "unhealed": {"perplexity": 80.0, "kl": 1.5},
        "healed": {"perplexity": 15.0, "kl": 0.15},
    },
    "speed": {"ttft_ratio": 0.8, "tpot_ratio": 0.7, "prefill_share_removed": 0.2, "decode_share_removed": 0.25},
    "kv": {
        "prompt_tokens": 1024,
        "bytes_dense": 47_185_920,
        "bytes_sent": 9_437_184,
        "ratio": 5.0,
        "ratio_by_blocks": 1.25,
        "ratio_by_tokens": 4.0,
    },
}
PNG = b"\x89PNG\r\n"


def test_report_is_made_from_artefacts_alone(tmp_path):
    PLAN.save_pretrained(tmp_path)
    write_results(tmp_path, RESULTS)
    (tmp_path / "block_statistics.json").write_text(json.dumps({"redundancy": [0.1, 0.9, 0.97, 0.95, 0.96, 0.5]}))
    text = write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    for part in ("12.5", "1.23e+05", "2.000", "0.500", "0.150", "0.800", "0.700", "47.19 MB", "9.44 MB", "5.00x"):
        assert part in text and part in report, part
    assert (
        "75% (token-aware cache), 90% (all tokens handed over)" in text and "1.25x by blocks, 4.00x by tokens" in text
    )
    assert "100%" in text and "120%" in text  # time saved beside the share of parameters removed
    assert "(pruning_plan.png)" in report and (tmp_path / "pruning_plan.png").read_bytes().startswith(PNG)
    assert "- seed: 7" in report and "start 0.5, result 0.25" in report and "history" not in report
    assert not list(tmp_path.glob("*.partial"))


def test_links_and_token_choice_stand_with_their_commands(tmp_path):
    PLAN.save_pretrained(tmp_path)
    write_results(tmp_path, {"kv": RESULTS["kv"]})
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Links" not in text and "## Which prompt tokens" not in text

    (tmp_path / "handover.json").write_text(json.dumps(HANDOVER))
    record_command(tmp_path, "handover", "accelerate launch recipes/handover.py --stages <stages>")
    settings = {"plan": PLAN.digest, "model": "some-1B", "seed": 0, "task": "text", "example": "x"}
    score = {"kl": 0.25, "top1_agreement": 0.5, "nll": 1.0, "correct": 0.0}
    RowFile(tmp_path / "token_choice.jsonl").add(settings, {"SnapKV, all blocks": score})
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    links, choice = text.index("## Links"), text.index("## Which prompt tokens decode receives")
    command = text.index("accelerate launch recipes/handover.py --stages <stages>")
    assert links < command < text.index("| slow | dense | in one piece |") < choice
    assert choice < text.index("| SnapKV, all blocks | 0.250 / 50% |")


def test_projected_blocks_are_named(tmp_path):
    replace(PLAN, prefill=StagePlan((2,), (), (1, 5))).save_pretrained(tmp_path)
    write_results(tmp_path, RESULTS)
    text = write_report(tmp_path)
    assert "prefill does without blocks 2, and but for keys and values without 1, 5; decode without 2, 4" in text
    assert "| only keys and values computed | 1, 5 | none |" in (tmp_path / "report.md").read_text()


def test_windows_of_blocks_are_in_report_and_picture(tmp_path):
    plan = replace(PLAN, kv=KVPlan((0, 2, 5), 4, 28, block_windows=((5, 16, 112),)))
    plan.save_pretrained(tmp_path)
    write_results(tmp_path, RESULTS)
    write_report(tmp_path)
    expected = "Token-aware blocks (between 32 and 128 of the first and last prompt tokens): 0 (32), 5 (128)"
    assert expected in (tmp_path / "report.md").read_text()
    pictures = [plot_plan(which, None, tmp_path / "plan.png").read_bytes() for which in (PLAN, plan)]
    assert pictures[0] != pictures[1]


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    PLAN.save_pretrained(tmp_path)
    write_results(tmp_path, {"kv": RESULTS["kv"]})
    text = write_report(tmp_path)
    assert "TTFT" not in text and "perplexity" not in text and "5.00x" in text
    with pytest.raises(FileNotFoundError, match="results.json"):
        write_report(PLAN.save_pretrained(tmp_path / "empty").parent)


def test_results_are_read_as_written_and_parts_are_kept(tmp_path):
    write_results(tmp_path, {"quality": RESULTS["quality"], "speed": {"ttft_ratio": 1.0}})
    write_results(tmp_path, {"speed": RESULTS["speed"]})
    assert read_results(tmp_path) == {"quality": RESULTS["quality"], "speed": RESULTS["speed"]}
    write_results(tmp_path, {"kv": RESULTS["kv"]}, replaced=["kv", "speed"])
    assert read_results(tmp_path) == {"quality": RESULTS["quality"], "kv": RESULTS["kv"]}
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_results(tmp_path, {"kv": {"ratio": math.nan}})
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"speed": 3}'])
def test_broken_results_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json"):
        read_results(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"redundancy": 3}', '{"redundancy": ["a"]}', "{}"])
def test_broken_statistics_are_refused(tmp_path, content):
    (tmp_path / "block_statistics.json").write_text(content)
    with pytest.raises(ValueError, match="redundancy"):
        read_redundancy(tmp_path / "block_statistics.json")


def test_share_of_kl_closed():
    assert kl_closed(RESULTS["quality"]) == 0.75
    assert kl_closed({"dense": {"kl": 0.0}}) is None
    assert kl_closed({"unhealed": {"kl": 0.0}, "healed": {"kl": 0.0}}) is None


def test_tables_are_rectangular():
    table = ResultTable.of_quality_speed_and_bytes(RESULTS)
    assert {len(row) for row in table.rows} == {4}
    assert len({len(line) for line in table.to_text().splitlines()[2:]}) == 1  # right-aligned
    assert len({line.count("|") for line in table.to_markdown().splitlines()}) == 1


@pytest.mark.parametrize(("nbytes", "text"), [(7, "7 B"), (2500, "2.50 kB"), (3_210_000, "3.21 MB"), (5e9, "5.00 GB")])
def test_megabytes(nbytes, text):
    assert megabytes(nbytes) == text


@pytest.mark.parametrize("total", [1, 4, 80])
def test_plot_of_any_size(tmp_path, total):
    plan = PruningPlan("tiny", "llama", total)
    for redundancy in (None, [0.9] * total, [-0.2] * total):
        assert plot_plan(plan, redundancy, tmp_path / "plan.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match=f"{total} blocks"):
        plot_plan(plan, [0.5] * (total + 1), tmp_path / "plan.png")
