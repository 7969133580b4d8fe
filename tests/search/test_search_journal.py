from unittest.mock import Mock

import pytest

from hf_pdprune.search import SearchJournal


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "new folder" / "journal.jsonl"
    journal = SearchJournal(path, "subject")
    journal.add("plan", 0, 1 / 3)
    journal.add("plan", 1, float("inf"))
    again = SearchJournal(path, "subject")
    assert again.get("plan", 0) == 1 / 3 and again.get("plan", 1) == float("inf")
    assert again.get("plan", 2) is None and again.get("other", 0) is None


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = SearchJournal(path, "subject")
    journal.add("plan", 0, 0.5)
    whole = path.read_bytes()
    journal.add("plan", 1, 0.25)
    path.write_bytes(path.read_bytes()[:-7])
    again = SearchJournal(path, "subject")
    assert again.get("plan", 0) == 0.5 and again.get("plan", 1) is None
    assert path.read_bytes() == whole
    again.add("plan", 1, 0.125)
    assert SearchJournal(path, "subject").get("plan", 1) == 0.125


def test_a_kill_at_the_first_line_leaves_no_journal(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with monkeypatch.context() as patches:
        patches.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            SearchJournal(path, "subject")
    assert list(tmp_path.iterdir()) == []
    SearchJournal(path, "subject").add("plan", 0, 0.5)
    assert SearchJournal(path, "subject").get("plan", 0) == 0.5


def test_another_search_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    SearchJournal(path, "subject").add("plan", 0, 0.5)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another model, calibration set or number"):
        SearchJournal(path, "other subject")
    assert path.read_bytes() == before
    for content in (b"something else\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="journal.jsonl is not a search journal"):
            SearchJournal(path, "subject")


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = SearchJournal(None, "subject")
    journal.add("plan", 0, 0.5)
    assert journal.get("plan", 0) == 0.5 and list(tmp_path.iterdir()) == []
