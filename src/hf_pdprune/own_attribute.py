"""own_attribute: an object that has another attribute for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context an object, not its class, has another value."""
    there, before = name in vars(thing), vars(thing).get(name)
    try:
        setattr(thing, name, value)
        yield
    finally:
        delattr(thing, name)
        if there:
            setattr(thing, name, before)
