"""What is being worked on just now, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Told what begins, in a few words.
Listener = Callable[[str], None]
_listeners: list[Listener] = []


def working_on(what: str) -> None:
    """Tell who listens; costs a look at a list where nobody does."""
    for listener in _listeners:
        listener(what)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of all that is worked on inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
