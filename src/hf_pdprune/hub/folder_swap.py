"""FolderSwap: replaces folders as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class FolderSwap:
    """
    Context in which the new content of folders is written beside them. At its end the new folders take the place of
    the old ones by renaming; after an exception the old ones are as they were. A kill leaves each folder old or new
    (or, between two renamings, the old one aside: the next swap puts it back). What a kill has left beside a folder
    is removed by the next swap.

    Args:
        folders (`Path`): The folders to replace; they need not exist. Of a link to a folder, the folder is replaced.
        removed (`Sequence[Path]`, *optional*): Folders that are removed when the others are replaced, before them.

    Raises:
        `ValueError`: If a folder holds the current directory, which would be gone afterwards.

    Example:

    ```python
    with FolderSwap(folder) as swap:
        with swap.writing(folder) as new:
            (new / "config.json").write_text("{}")
    ```
    """

    def __init__(self, *folders: Path, removed: Sequence[Path] = ()):
        # Without links: the new content belongs where the old one is, and a link cannot be emptied as a folder can.
        self.folders = tuple(folder.resolve() for folder in folders)
        self.removed = tuple(folder.resolve() for folder in removed)
        here = [folder for folder in self.folders if Path.cwd().is_relative_to(folder)]
        if here:
            raise ValueError(f"{here[0]} cannot be replaced: it is, or holds, the current directory")

    def __enter__(self) -> "FolderSwap":
        self._clean()
        return self

    @contextmanager
    def writing(self, folder: Path) -> Iterator[Path]:
        """
        Gives the (empty) folder into which the new content of `folder` is to be written.

        Raises:
            `OSError`: One line that names the folder, where anything cannot be written.
        """
        new = _aside(folder.resolve(), "new")
        with naming_folder(folder):
            new.mkdir(parents=True)
            yield new

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            if kind is None and all(_aside(folder, "new").is_dir() for folder in self.folders):
                self._replace()
        finally:
            self._clean()

    def _replace(self) -> None:
        try:
            for folder in self.removed:
                if folder.exists():
                    os.replace(folder, _aside(folder, "old"))
            for folder in self.folders:
                if folder.exists():
                    os.replace(folder, _aside(folder, "old"))
                os.replace(_aside(folder, "new"), folder)
        except BaseException:
            for folder in self.folders:
                new, old = _aside(folder, "new"), _aside(folder, "old")
                if not new.exists():  # it has taken the folder's place
                    os.replace(folder, new)
                if old.exists():
                    os.replace(old, folder)
            for folder in self.removed:
                if _aside(folder, "old").exists():
                    os.replace(_aside(folder, "old"), folder)
            raise

    def _clean(self) -> None:
        for folder in self.folders:
            self._put_right(folder, is_wanted=True)
        is_replaced = all(folder.exists() for folder in self.folders)
        for folder in self.removed:
            self._put_right(folder, is_wanted=not is_replaced)

    @staticmethod
    def _put_right(folder: Path, is_wanted: bool) -> None:
        new, old = _aside(folder, "new"), _aside(folder, "old")
        if is_wanted and old.exists() and not folder.exists():
            os.replace(old, folder)  # a kill between two renamings: the old one is all that there is
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Within this context what goes wrong in writing is an `OSError` of one line that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # what safetensors raises on a full disk is no OSError
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{folder} cannot be written: {reason}") from error


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
