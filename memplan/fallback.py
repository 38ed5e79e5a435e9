"""What happens when a kernel cannot be built: its operations run as the calls they were, and the user is told once.

Planning starts again with those operations left alone, since a call needs other buffers than a kernel does. Every round
leaves more operations alone than the one before it, so there are at most as many rounds as operations; a second round
is rare, a third one almost unheard of.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .ir.errors import LoweringError, MemplanError
from .ir.program import KernelOp, Operation, Origin, Program
from .lowering.lower import NOTHING_KEPT, Kept

Result = TypeVar("Result")


class FallbackWarning(UserWarning):
    """Something runs as torch's own calls because no kernel could be built for it. Answers are right all the same."""


@dataclass(frozen=True)
class Failure:
    """One kernel source that could not be had, and the operations that run it."""

    users: tuple[KernelOp, ...]
    error: Exception


class KernelBuildError(MemplanError):
    """Kernels that could not be emitted or built: all that failed of one program."""

    def __init__(self, failures: tuple[Failure, ...]) -> None:
        super().__init__("\n".join(str(f.error) for f in failures))
        self.failures = failures


class NoCompilerError(MemplanError):
    """Nothing can be built for a type of device."""

    def __init__(self, device: str, error: Exception) -> None:
        super().__init__(str(error))
        self.device = device
        self.error = error


def with_fallback(program: Program, attempt: Callable[[Kept], Result]) -> Result:
    """The result of ``attempt``, which is told what to leave as calls; tried again with more of it when it fails.

    Raises
    ------
    MemplanError
        What ``attempt`` raised, where leaving the operations that it names alone would change nothing.
    """
    kept = NOTHING_KEPT
    while True:
        try:
            return attempt(kept)
        except NoCompilerError as error:
            more = replace(kept, devices=kept.devices | {error.device})
            if more == kept:
                raise error.error from error
            _warn_no_compiler(error)
        except KernelBuildError as error:
            more = _without(kept, program, [u for f in error.failures for u in f.users])
            if more == kept:
                raise
            for failure in error.failures:
                _warn(_origins(failure.users), failure.error)
        except LoweringError as error:
            errors = {e.operation: e for e in (error, *error.others)}
            failed = [op for op in program.operations if op.name in errors]
            more = _without(kept, program, failed)
            if more == kept:
                raise
            for op in failed:
                _warn(_origins([op]), errors[op.name])
        kept = more


def _without(kept: Kept, program: Program, failed: Iterable[Operation]) -> Kept:
    """Also the operations of the program that the failed ones come from; all of their devices where none is found."""
    failed = tuple(failed)
    nodes = {n for op in failed for n in (op.name, *(o.node for o in op.origins)) if n}
    found = {op.name for op in program.operations if op in Kept(frozenset(nodes))}
    new = found - {op.name for op in program.operations if op in kept}
    if new:
        return replace(kept, nodes=kept.nodes | nodes)
    # a kernel that a pass made and whose origins are calls already: without any kernels there is none like it
    return replace(kept, devices=kept.devices | {op.device.partition(":")[0] for op in failed})


def _origins(operations: Iterable[Operation]) -> tuple[Origin, ...]:
    return tuple(dict.fromkeys(o for op in operations for o in op.origins))


def _warn(origins: tuple[Origin, ...], error: Exception) -> None:
    names = list(dict.fromkeys(o.op for o in origins if o.op))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    places = list(dict.fromkeys(o.location for o in origins if o.location))
    lines = next((f": {o.code}" for o in origins if o.location and o.code), "")
    where = f" ({places[0]}{lines})" if places else ""
    warnings.warn(
        f"no kernel could be built for {shown or 'an operation'}{where}; it runs as torch's own calls. "
        f"{type(error).__name__}: {error}",
        FallbackWarning,
        stacklevel=_outside(),
    )


def _warn_no_compiler(error: NoCompilerError) -> None:
    what = "CPU" if error.device == "cpu" else "GPU"
    warnings.warn(
        f"no {what} kernel can be built, so everything on the {what} runs as torch's own calls, unfused and slower: "
        f"{error.error}",
        FallbackWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """The stack level of the code that called the compiled function: the first frame outside of torch and memplan."""
    inside = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith((*inside, "<")):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return 1 if frame is None else level
