"""``memplan run script.py``: run somebody's script and report all that it compiles."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import cast

import torch

from .model import Report
from .target import TargetError, report_from


def run_script(script: Path, arguments: Sequence[str], *, override: bool = False) -> tuple[Report | None, str]:
    """Run a script as ``__main__``; the report of what it compiled, and why it failed ("" if it did not).

    A script that fails half-way still has a report of what was compiled until then.

    Raises
    ------
    TargetError
        If the script is not there, or nothing was compiled by one that did not fail.
    """
    import memplan

    if not script.is_file():
        raise TargetError(f"there is no script {str(script)!r}")
    failure = ""
    with memplan.record() as recording, _as_main(script, arguments), _override(override):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            if left.code not in (None, 0):
                failure = f"{script} exited with {left.code}"
        except KeyboardInterrupt:
            failure = f"{script} was interrupted"
        except BaseException as error:
            traceback.print_exception(type(error), error, _from_script(error.__traceback__, script))
            failure = f"{script} failed: {type(error).__name__}: {error}"
    if failure and not recording.graphs:
        return None, failure
    return report_from(recording.graphs, target=str(script)), failure


def _from_script(trace: TracebackType | None, script: Path) -> TracebackType | None:
    """A traceback from the script's own first frame on; none of what led to it where there is no such frame."""
    while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
        trace = trace.tb_next
    return trace


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    argv, path = sys.argv[:], sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


@contextmanager
def _override(active: bool) -> Iterator[None]:
    """Send every ``torch.compile`` to memplan, whatever backend, mode and options it names."""
    if not active:
        yield
        return
    original = cast(Callable[..., object], torch.compile)

    def compile_here(*args: object, **kwargs: object) -> object:
        kept = {k: v for k, v in kwargs.items() if k not in ("backend", "mode", "options")}
        return original(*args, backend="memplan", **kept)

    torch.compile = compile_here  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original  # type: ignore[assignment]
