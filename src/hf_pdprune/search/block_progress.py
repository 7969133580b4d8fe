"""BlockProgress: the bar of a search that goes block by block."""

from accelerate import PartialState
from tqdm.auto import tqdm


class BlockProgress(tqdm):
    """
    Counts blocks, in the main process alone, on a terminal or not. A block can take minutes: an update by nothing,
    which [`Objective.best_of`] makes after every batch, lets its clock go on.

    Args:
        total (`int`, *optional*): Blocks that the search chooses; `None`: not known. With `0` there is no bar.
        description (`str`, *optional*): What stands before the bar.
    """

    def __init__(self, total: int | None, description: str | None = None):
        super().__init__(
            total=total,
            desc=description,
            unit="block",
            disable=total == 0 or not PartialState().is_main_process,
            miniters=0,
            mininterval=1.0,
        )
