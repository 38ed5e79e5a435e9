"""Which step of a plan runs when, told to whoever measures memory step by step.

Only Python wrappers can be watched: their lines are the plan's steps. While nobody samples, a call costs one look at a
global; while somebody does, the wrapper's frame (and nothing below it) is traced line by line, in its own thread.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

#: Told (name of the program, step) before each step runs, and (name, None) when the program has run.
Mark = Callable[[str, int | None], None]
_marks: list[Mark] = []


@contextmanager
def sampling(mark: Mark) -> Iterator[None]:
    """Tell ``mark`` of all steps that run inside the block."""
    _marks.append(mark)
    try:
        yield
    finally:
        _marks.remove(mark)


def call_sampled(
    call: Callable[..., object], args: list[object], name: str, filename: str, starts: Sequence[int]
) -> object:
    """The call, with its steps told; ``starts`` has the first source line of every step in ``filename``."""
    if not _marks or not starts:
        return call(args)
    mark, running = _marks[-1], -1

    def in_wrapper(frame: FrameType, event: str, argument: object) -> object:
        nonlocal running
        step = max(0, bisect_right(starts, frame.f_lineno) - 1)  # (the first line of a step may be a comment)
        if event == "line" and step != running:
            running = step
            mark(name, step)
        return in_wrapper

    def trace(frame: FrameType, event: str, argument: object) -> object:
        return in_wrapper if frame.f_code.co_filename == filename else None

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        return call(args)
    finally:
        sys.settrace(before)
        mark(name, None)
