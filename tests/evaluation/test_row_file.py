import math

import pytest

from hf_pdprune.evaluation.row_file import RowFile


def test_rows_are_found_again(tmp_path):
    rows = RowFile(tmp_path / "new" / "rows.jsonl")
    assert rows.get({"task": "a"}) is None and len(rows) == 0
    assert rows.get_or_make({"task": "a", "limit": 3}, lambda: {"acc": 0.5}) == {"acc": 0.5}
    rows.add({"task": "b", "limit": 3}, {"acc": 0.25})
    again = RowFile(rows.path)
    assert again.get_or_make({"limit": 3, "task": "a"}, lambda: pytest.fail("made twice")) == {"acc": 0.5}
    assert [row["settings"]["task"] for row in again] == ["a", "b"]
    assert again.get({"task": "a", "limit": 4}) is None


def test_a_row_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = RowFile(path)
    for name in "abc":
        rows.add({"task": name}, {"acc": 1.0})
    path.write_bytes(path.read_bytes()[:-7])
    rows = RowFile(path)
    assert [row["settings"]["task"] for row in rows] == ["a", "b"]
    rows.add({"task": "d"}, {"acc": 0.0})
    assert [row["settings"]["task"] for row in RowFile(path)] == ["a", "b", "d"]


def test_what_is_no_row_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"settings": {}, "result": {}}\nnonsense\n{"settings": {"a": 1}, "result": {}}\n')
    with pytest.raises(ValueError, match="line 2 is no row"):
        RowFile(path)
    rows = RowFile(tmp_path / "other.jsonl")
    with pytest.raises(ValueError):
        rows.add({"task": "a"}, {"acc": math.nan})
    assert not rows.path.exists() and len(rows) == 0


def test_only_one_process_writes(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl", write=False)
    assert rows.get_or_make({"a": 1}, lambda: {"b": 2}) == {"b": 2}
    assert not rows.path.exists()
