"""When a compiled graph runs out of memory, the error says which step of the plan ran and what would have helped."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from .free_memory import bytes_in, free_on_gpu, free_on_host
from .ir.plan import Plan
from .step_sampling import call_sampled


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is known of a failure: the step that ran (None: not known), the bytes that were asked for (0: not known).

    ``free``: bytes that could still be had of that device just then (None: not known). ``released``: what the graph had
    itself is among them, since its wrapper had let go of it before anybody could look.
    """

    step: int | None
    requested: int = 0
    free: int | None = None
    released: bool = False
    on_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Remedy:
    """A known change, planned: the bytes that ``what`` (the graph, or the whole step) needs with it and without it."""

    title: str
    what: str
    peak: int
    before: int
    #: estimated microseconds that it adds to the step; None if nothing is known of that
    microseconds: float | None = None


#: Text for a plan that ran out of memory.
Explain = Callable[[Plan, Shortage], str]

_CPU = re.compile(r"not enough memory: you tried to allocate (\d+) bytes|DefaultCPUAllocator: can't allocate memory")
_GPU = re.compile(r"CUDA out of memory\. Tried to allocate")
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)")
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
            if is_out_of_memory(error) and not getattr(error, _TOLD, False):
                _enrich(error, caught, plan, filename, starts, explain)
            if error is caught:
                raise
            raise error from caught

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _enrich(
    error: RuntimeError,
    caught: RuntimeError,
    plan: Callable[[], Plan],
    filename: str,
    starts: Sequence[int],
    explain: Explain,
) -> None:
    try:
        shortage = _shortage(str(error), caught, filename, starts)
        _let_go(caught.__traceback__, filename)  # planning needs memory itself, and so does who tries again
        known = plan()
        try:
            text = explain(known, shortage)
        except Exception as failure:  # under an address-space limit what it imports may not fit any more
            text = f"{plainly(known, shortage)}\n  (no more can be said: {type(failure).__name__}: {failure})"
    except Exception as failure:  # whatever goes wrong here must not hide that memory ran out
        text = f"(memplan could not say more of its plan: {type(failure).__name__}: {failure})"
    error.args = (f"{error}\n\n{text}",)
    setattr(error, _TOLD, True)


def plainly(plan: Plan, shortage: Shortage) -> str:
    """The step, the user's line and the planned bytes, with nothing imported or planned for it."""
    if not plan.order:
        return f"memplan: memory ran out in {plan.program.name}, whose plan has no steps"
    peak = max(plan.timeline)
    step = plan.timeline.index(peak) if shortage.step is None else shortage.step
    op = plan.program.by_name[plan.order[step]]
    where = next((f"{o.location}    {o.code}".rstrip() for o in reversed(op.origins) if o.file), "")
    said = "its peak, at" if shortage.step is None else "at"
    lines = [
        f"memplan: memory ran out in {plan.program.name}, {said} step {step} of {len(plan.order)}, {op.name}",
        f"  the plan holds {plan.timeline[step]:,} bytes there, at most {peak:,}",
    ]
    return "\n".join([*lines, f"  {where}"] if where else lines)


def _shortage(message: str, caught: RuntimeError, filename: str, starts: Sequence[int]) -> Shortage:
    """What is known. The C++ wrapper notes its step and frees all that it made on the way out; the frame of Python's
    still holds it. A GPU's message tells the free bytes of its moment itself."""
    noted = getattr(caught, "memplan_step", None)
    in_python = running_step(caught.__traceback__, filename, starts)
    step = in_python if noted is None else noted
    if _GPU.search(message):
        return Shortage(step, requested(message), free_on_gpu(message), on_gpu=True)
    return Shortage(step, requested(message), free_on_host(), released=in_python is None)


def _let_go(traceback: TracebackType | None, filename: str) -> None:
    """Free what the wrapper's frames hold, which otherwise lives as long as the error."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            traceback.tb_frame.clear()
        traceback = traceback.tb_next


def torchs_own(error: RuntimeError) -> RuntimeError:
    """The error, as torch's own type where the C interface, which passes on an error's text alone, has lost it."""
    lost = type(error) is RuntimeError and _GPU.search(str(error)) is not None
    return torch.OutOfMemoryError(str(error)) if lost else error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's allocator, or the CPU's, had no more to give."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU.search(str(error)) is not None


def requested(message: str) -> int:
    """The bytes that an allocator's message says were asked for; 0 if it does not."""
    return bytes_in(_ASKED, message) or 0


def running_step(traceback: TracebackType | None, filename: str, starts: Sequence[int]) -> int | None:
    """The step that the wrapper's innermost frame was in, from its line; None without such a frame."""
    step = None
    while traceback is not None:
        if starts and traceback.tb_frame.f_code.co_filename == filename:
            step = max(0, bisect_right(starts, traceback.tb_lineno) - 1)
        traceback = traceback.tb_next
    return step
