"""When a compiled graph runs out of memory, the error says which step of the plan ran and what would have helped."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from .ir.plan import Plan
from .step_sampling import call_sampled

#: Text for a plan, the step that ran (None if not known) and the bytes that were asked for (0 if not known).
Explain = Callable[[Plan, int | None, int], str]

_CPU = re.compile(r"not enough memory: you tried to allocate (\d+) bytes|DefaultCPUAllocator: can't allocate memory")
_GPU = re.compile(r"CUDA out of memory\. Tried to allocate")
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TOLD = "_memplan_explained"


def explained(
    call: Callable[..., object], plan: Callable[[], Plan], filename: str, starts: Sequence[int], explain: Explain
) -> Callable[..., object]:
    """The call, whose out-of-memory errors end with what ``explain`` says of the plan at the step that ran.

    The error stays the same object, so its type and traceback are those of torch (but see `torchs_own`). ``starts``
    has the first source line of every step of the wrapper whose code is of ``filename``; without it the step is not
    known.
    """

    name = filename.removeprefix("<memplan ").removesuffix(">")

    def run(args: list[object]) -> object:
        try:
            return call_sampled(call, args, name, filename, starts)
        except RuntimeError as caught:
            error = torchs_own(caught)
            step = getattr(caught, "memplan_step", None)  # the C++ wrapper's host notes it
            if is_out_of_memory(error) and not getattr(error, _TOLD, False):
                if step is None:
                    step = running_step(caught.__traceback__, filename, starts)
                _enrich(error, plan, step, explain)
            if error is caught:
                raise
            raise error from caught

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _enrich(error: RuntimeError, plan: Callable[[], Plan], step: int | None, explain: Explain) -> None:
    try:
        text = explain(plan(), step, requested(str(error)))
    except Exception as failure:  # whatever goes wrong here must not hide that memory ran out
        text = f"(memplan could not say more of its plan: {type(failure).__name__}: {failure})"
    error.args = (f"{error}\n\n{text}",)
    setattr(error, _TOLD, True)


def torchs_own(error: RuntimeError) -> RuntimeError:
    """The error, as torch's own type where the C interface, which passes on an error's text alone, has lost it."""
    lost = type(error) is RuntimeError and _GPU.search(str(error)) is not None
    return torch.OutOfMemoryError(str(error)) if lost else error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's allocator, or the CPU's, had no more to give."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU.search(str(error)) is not None


def requested(message: str) -> int:
    """The bytes that an allocator's message says were asked for; 0 if it does not."""
    found = _ASKED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def running_step(traceback: TracebackType | None, filename: str, starts: Sequence[int]) -> int | None:
    """The step that the wrapper's innermost frame was in, from its line; None without such a frame."""
    step = None
    while traceback is not None:
        if starts and traceback.tb_frame.f_code.co_filename == filename:
            step = max(0, bisect_right(starts, traceback.tb_lineno) - 1)
        traceback = traceback.tb_next
    return step
