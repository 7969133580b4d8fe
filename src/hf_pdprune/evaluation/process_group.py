"""Joins the processes of an evaluation, of which the main one does some parts alone."""

from datetime import timedelta

from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs


# The default of minutes would end an evaluation while the others wait for what the main process does alone.
WAIT = timedelta(days=1)


def join_processes() -> PartialState:
    """
    The state of this process among those that `accelerate launch` has started. To be called before anything else asks
    for it: a `PartialState` that is made by itself knows processes on accelerators only.
    """
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
    return PartialState()
