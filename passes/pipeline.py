"""The passes in their order, and what runs them: requirements checked, results verified, dumps written."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol, Self

from memplan.ir.config import Config
from memplan.ir.errors import MemplanError, VerificationError
from memplan.ir.printing import format_program
from memplan.ir.program import Program

from .cleanup import Cleanup
from .concat import Concat, SingleStore
from .fusion import Fusion
from .narrowing import Narrowing
from .reinplace import Reinplace


class Pass(Protocol):
    """A pure function from programs to programs.

    ``requires`` names passes that must come earlier in the pipeline (a pass that the user has disabled counts as
    done: every pass is right without the others, they only work better together).
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]

    @classmethod
    def configured(cls, config: Config) -> Self:
        """The pass with the options that the configuration gives it."""
        ...

    def run(self, program: Program) -> Program: ...


PASSES: tuple[type[Pass], ...] = (Reinplace, Concat, Cleanup, Fusion, Narrowing, SingleStore)

#: names that ``options={"disable": [...]}`` accepts, in the order in which the passes run
PASS_NAMES: tuple[str, ...] = tuple(p.name for p in PASSES)


def check_requirements(passes: tuple[type[Pass] | Pass, ...]) -> None:
    """Raise if a pass stands before one that it needs, or if two have the same name.

    Raises
    ------
    ValueError
        Naming the pass and what it lacks.
    """
    done: set[str] = set()
    for p in passes:
        if p.name in done:
            raise ValueError(f"two passes are called {p.name!r}")
        missing = [r for r in p.requires if r not in done]
        if missing:
            raise ValueError(
                f"pass {p.name!r} needs {', '.join(missing)} before it; the order is "
                f"{', '.join(q.name for q in passes)}"
            )
        done.add(p.name)


class CollectorPause:
    """No cyclic garbage collection while anybody is inside, in whichever thread.

    Passes make many long-lived objects, so the collector walks everything that torch and the model hold again and
    again (half a second each time, measured on a Llama of 16 layers), and finds next to nothing. It is the process's,
    so it stands still for other threads too: objects in cycles that they drop are freed afterwards. Whoever comes
    first switches it off if it was on, and whoever leaves last switches it on again, also where one raises; a
    collector that the user had switched off stays off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._was_on:
                    gc.enable()


collector_paused = CollectorPause()


def run_pipeline(
    program: Program,
    config: Config,
    verify: Callable[[Program], None] | None = None,
    on_pass: Callable[[str, Program, Program], None] | None = None,
    passes: tuple[type[Pass] | Pass, ...] = PASSES,
) -> Program:
    """Run the passes that ``config`` leaves enabled.

    Parameters
    ----------
    verify:
        Called with the program before the first pass and after every pass that changed it; raises where it is wrong.
    on_pass:
        Called with a pass's name, the program before and the program after it.
    passes:
        Kinds of passes, which get their options from ``config``, or passes with options of their own.

    Raises
    ------
    VerificationError
        If ``verify`` refuses what a pass made; the message names the pass.
    """
    check_requirements(passes)
    with collector_paused():
        return _run_passes(program, config, verify, on_pass, passes)


def _run_passes(
    program: Program,
    config: Config,
    verify: Callable[[Program], None] | None,
    on_pass: Callable[[str, Program, Program], None] | None,
    passes: tuple[type[Pass] | Pass, ...],
) -> Program:
    """`run_pipeline`, its requirements checked."""
    dump = None if config.dump is None else Path(config.dump) / program.name
    if verify is not None and config.verify:
        verify(program)
    _write(dump, "00-captured", format_program(program) if dump else "")
    for number, kind in enumerate(passes, 1):
        before = program
        if config.enabled(kind.name):
            ready = kind.configured(config) if isinstance(kind, type) else kind
            program = ready.run(program)
        changed = program is not before
        if changed and verify is not None and config.verify:
            try:
                verify(program)
            except MemplanError as error:
                raise VerificationError(f"pass {kind.name!r} made a wrong program: {error}") from error
        if dump is not None:
            _write(dump, f"{number:02d}-{kind.name}", format_program(program) if changed else "(unchanged)\n")
        if on_pass is not None:
            on_pass(kind.name, before, program)
    return program


def _write(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text)
