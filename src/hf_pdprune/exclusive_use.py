"""exclusive_use: one thread at a time has a model that is changed for a while."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .blocks import get_blocks


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def exclusive_use(model: nn.Module) -> Iterator[None]:
    """
    Within this context other threads wait that want exclusive use of the same blocks, however the model is wrapped.
    Contexts nest within a thread.

    Args:
        model (`nn.Module`): A causal language model.
    """
    with _guard:
        lock = _locks.setdefault(get_blocks(model), threading.RLock())
    with lock:
        yield
