import pytest

from hf_pdprune.artefact_file import read_json, write_artefact


def test_what_is_written_is_read(tmp_path):
    path = write_artefact(tmp_path / "new" / "a.json", {"blocks": [1, 2]})
    assert read_json(path) == {"blocks": [1, 2]}
    assert write_artefact(tmp_path / "a.md", "text").read_text() == "text"


@pytest.mark.parametrize("content", [{"kl": float("nan")}, {"kl": float("inf")}], ids=str)
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, content):
    path = write_artefact(tmp_path / "a.json", {"kl": 1})
    with pytest.raises(ValueError):
        write_artefact(path, content)
    assert read_json(path) == {"kl": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_artefact(tmp_path / "a.json", {"kl": 1})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_artefact(path, {"kl": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert read_json(path) == {"kl": 1}


def test_broken_json_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
