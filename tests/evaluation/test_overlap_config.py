import json

import pytest

from hf_pdprune.evaluation.overlap_config import OverlapConfig, sources_of_run


QUESTIONS = [{"question": f"What of {i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    text = [{"text": f"This is line {i} of a text that is long enough to be told from others."} for i in range(4)]
    for name, rows in (("qa.train", QUESTIONS), ("text.train", text), ("text.calibration", text[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluated(*texts):
    return [("some data", texts)]


def test_what_the_recipe_itself_shows_and_what_the_run_says_is_looked_up(folder):
    sources = [(str(folder), "calibration", "text")]
    line = "This is line 0 of a text that is long enough to be told from others."
    assert OverlapConfig().check_overlap(evaluated("another"), sources=sources) == {"checked": True, "seen_rows": {}}
    with pytest.raises(ValueError, match="some data: 1 of the evaluation rows were seen.*--allow_overlap true"):
        OverlapConfig().check_overlap(evaluated("another", line), sources=sources)
    run = {"plan": {"calibration_dataset": str(folder), "calibration_split": "calibration"}, "stages": {}}
    run["stages"] = {"train_dataset": str(folder), "train_split": "train", "train_subset": "qa"}
    (folder / "run.json").write_text(json.dumps(run))
    assert sources_of_run(folder) == [(str(folder), "calibration", None), (str(folder), "train", "qa")]
    found = OverlapConfig(allow_overlap=True).check_overlap(evaluated("What of 3?", line, "new"), folders=[folder])
    assert found == {"checked": True, "seen_rows": {"some data": 2}}
    # What is named by hand stands in place of what the run says.
    named = OverlapConfig(seen_data=[f"{folder}:calibration:text"])
    assert named.check_overlap(evaluated("What of 3?"), folders=[folder])["seen_rows"] == {}


def test_questions_are_found_in_a_source_that_joins_them_with_plain_text(folder):
    for source in (str(folder), f"{folder}/qa.train.jsonl, {folder}/text.train.jsonl"):
        with pytest.raises(ValueError, match="2 of the evaluation rows"):
            OverlapConfig().check_overlap(evaluated("What of 1?", "what of 2?"), sources=[(source, "train", None)])


def test_where_nobody_says_what_was_seen_nothing_is_read(folder, caplog):
    texts = (pytest.fail("read") for _ in range(1))
    assert OverlapConfig().check_overlap(texts, folders=[folder]) == {"checked": False}
    assert "overlap is not checked" in caplog.text
    with pytest.raises(ValueError, match="seen_data: 'piqa' is not source:split"):
        OverlapConfig(seen_data=["piqa"])
