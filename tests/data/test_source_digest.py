import pytest

from hf_pdprune.data import source_digest


def test_other_content_is_another_digest(tmp_path):
    one, two = tmp_path / "a.train.jsonl", tmp_path / "b.train.jsonl"
    one.write_text("one\n")
    two.write_text("two\n")
    first = source_digest(str(one), "train")
    assert first.startswith("4 bytes, sha256 ")
    both = source_digest(f"{one},{two}", "train")
    assert both == source_digest(str(tmp_path), "train") and both.startswith("8 bytes")
    one.write_text("owe\n")
    assert source_digest(str(one), "train") != first and source_digest(str(tmp_path), "train") != both
    with pytest.raises(FileNotFoundError, match="no file"):
        source_digest(str(tmp_path), "validation")


def test_what_is_not_local_has_none():
    assert source_digest("pydoc-topics", "train") is None and source_digest("some/data", "train", "main") is None
