import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_pdprune.hub import folder_swap
from hf_pdprune.hub.folder_swap import FolderSwap


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(text)


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_new_content_replaces_all_of_the_old(tmp_path):
    write(tmp_path / "a", "old")
    (tmp_path / "a" / "more").write_text("old")
    with FolderSwap(tmp_path / "a", tmp_path / "b" / "c") as swap:
        for folder in swap.folders:
            with swap.writing(folder) as new:
                write(new, "new")
        assert files(tmp_path / "a") == {"file": "old", "more": "old"}
    assert files(tmp_path) == {"a/file": "new", "b/c/file": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(28, "No space left on device")])
def test_exception_leaves_everything_as_it_was(tmp_path, error):
    write(tmp_path / "a", "old")
    with pytest.raises(type(error)):
        with FolderSwap(tmp_path / "a", tmp_path / "b") as swap:
            for folder in swap.folders:
                with swap.writing(folder) as new:
                    write(new, "new")
                    if folder.name == "b":
                        raise error
    assert files(tmp_path) == {"a/file": "old"} and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_errors_name_the_folder_in_one_line(tmp_path):
    errors = (
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device\n(os error 28)"),
    )
    for error in errors:
        with pytest.raises(OSError, match=r"a cannot be written: .*No space left on device$"):
            with FolderSwap(tmp_path / "a") as swap, swap.writing(tmp_path / "a"):
                raise error


def test_what_a_kill_left_is_put_right(tmp_path):
    # Killed while writing: the old one is there. Killed between two renamings: it is aside.
    write(tmp_path / "a", "old")
    write(tmp_path / ".a.new", "half")
    write(tmp_path / ".b.old", "old")
    write(tmp_path / ".b.new", "new")
    with pytest.raises(KeyError):
        with FolderSwap(tmp_path / "a", tmp_path / "b"):
            raise KeyError
    assert files(tmp_path) == {"a/file": "old", "b/file": "old"}


def test_what_the_new_content_makes_wrong_is_removed_with_it(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, "old")
    with pytest.raises(KeyError), FolderSwap(tmp_path / "c", removed=[tmp_path / "a", tmp_path / "b"]) as swap:
        with swap.writing(tmp_path / "c") as new:
            write(new, "new")
        raise KeyError
    assert files(tmp_path) == {"a/file": "old", "b/file": "old"}
    with FolderSwap(tmp_path / "c", removed=[tmp_path / "a", tmp_path / "b"]) as swap:
        with swap.writing(tmp_path / "c") as new:
            write(new, "new")
    assert files(tmp_path) == {"c/file": "new"} and [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("failing_call", range(1, 5))
def test_exception_in_a_renaming_brings_removed_folders_back(tmp_path, monkeypatch, failing_call):
    for folder in ("a", "b", "c"):
        write(tmp_path / folder, "old")
    real_replace, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return real_replace(source, target)

    monkeypatch.setattr(folder_swap.os, "replace", replace)
    with (
        pytest.raises(KeyboardInterrupt),
        FolderSwap(tmp_path / "c", removed=[tmp_path / "a", tmp_path / "b"]) as swap,
    ):
        with swap.writing(tmp_path / "c") as new:
            write(new, "new")
    assert files(tmp_path) == {"a/file": "old", "b/file": "old", "c/file": "old"}


def test_kill_between_removing_and_replacing(tmp_path):
    # Removed but not yet replaced: they come back. Replaced: they go for good.
    for is_replaced in (False, True):
        write(tmp_path / ".a.old", "old")
        write(tmp_path / ("c" if is_replaced else ".c.new"), "new")
        with pytest.raises(KeyError), FolderSwap(tmp_path / "c", removed=[tmp_path / "a"]):
            raise KeyError
        assert files(tmp_path) == ({"c/file": "new"} if is_replaced else {"a/file": "old"})
        for path in tmp_path.iterdir():
            shutil.rmtree(path)


def test_nothing_is_replaced_unless_all_was_written(tmp_path):
    write(tmp_path / "a", "old")
    with FolderSwap(tmp_path / "a", tmp_path / "b") as swap:
        with swap.writing(tmp_path / "a") as new:
            write(new, "new")
    assert files(tmp_path) == {"a/file": "old"}


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    write(tmp_path / "disk" / "a", "old")
    (tmp_path / "links").mkdir()
    for name in ("a", "b"):  # there is nothing behind the second one yet
        (tmp_path / "links" / name).symlink_to(tmp_path / "disk" / name)
    for text in ("new", "newer"):
        with FolderSwap(tmp_path / "links" / "a", tmp_path / "links" / "b") as swap:
            for name in ("a", "b"):
                with swap.writing(tmp_path / "links" / name) as new:
                    write(new, text)
        assert files(tmp_path / "disk") == {"a/file": text, "b/file": text}
        assert sorted(path.name for path in (tmp_path / "links").iterdir() if path.is_symlink()) == ["a", "b"]


@pytest.mark.parametrize("folder", [".", "..", "../here"])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, folder):
    write(tmp_path / "here", "old")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="cannot be replaced: it is, or holds, the current directory"):
        FolderSwap(Path(folder))
