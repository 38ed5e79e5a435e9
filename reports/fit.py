"""Does it fit, and if not, what would make it fit: answered by planning alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ir.errors import MemplanError
from .model import Report
from .target import Made, Request, TargetError

LARGEST_BATCH = 1 << 20

Planner = Callable[[Request], Report]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to run the step: bytes the caller holds, and the planned peak above them."""

    title: str
    held: int
    peak: int

    @property
    def total(self) -> int:
        return self.held + self.peak


def attempt(title: str, report: Report) -> Attempt:
    """The bytes of one planned step."""
    return Attempt(title, sum(report.step.held_by_caller.values()), report.step.peak)


def changes(
    plan: Planner,
    request: Request,
    budget: int,
    held: int,
    tell: Callable[[str], None],
    begin: Callable[[str], None] = lambda what: None,
) -> list[Attempt]:
    """Known changes in order of their price, until one fits: recomputation first, then smaller batches.

    A change that cannot be planned is left out, after ``tell`` was told why; ``begin`` is told of each that is tried.

    Parameters
    ----------
    budget:
        Bytes of the device.
    held:
        Of these, bytes that the caller holds: the step has the rest.
    """
    found: list[Attempt] = []
    title = "recompute what it takes"
    if budget > held:
        try:
            asked = replace(request, options={**request.options, "budget": budget - held})
            found.append(attempt(f"{title} (budget={budget - held})", plan(asked)))
        except MemplanError as error:
            tell(f"{title}: {error}")
        if found and found[-1].total <= budget:
            return found
    else:
        tell(f"{title}: the parameters and inputs alone are more than the budget")
    batch = request.batch
    while batch is not None and batch > 1:
        batch //= 2
        begin(f"planning batch size {batch}")
        found.append(attempt(f"batch size {batch}", plan(replace(request, batch=batch))))
        if found[-1].total <= budget:
            break
    return found


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve: planned bytes above those before the step, estimated microseconds of it, and of these
    what recomputation adds; bytes of saved tensors on the host."""

    peak: int
    microseconds: float
    recomputation: float
    on_host: int = 0


def curves(made: Made, request: Request) -> list[list[Point]]:
    """Peak over time for all budgets, for each graph that has a backward; the least bytes first.

    Points that are neither smaller nor faster than another are left out.
    """
    from memplan.analysis import budget_curves

    try:
        found = budget_curves(made.model, made.args, made.kwargs, fake=request.fake, options=request.options)
    except MemplanError:
        raise
    except Exception as error:
        raise TargetError(f"the model could not be compiled: {type(error).__name__}: {error}") from error
    return [
        _frontier([Point(p.nbytes, p.microseconds, p.recomputation, p.on_host) for p in points]) for points in found
    ]


def _frontier(points: list[Point]) -> list[Point]:
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.peak, p.microseconds)):
        if not out or p.microseconds < out[-1].microseconds:
            out.append(p)
    return out


def largest_batch(
    plan: Planner, request: Request, budget: int, begin: Callable[[str], None] = lambda what: None
) -> tuple[int, Attempt | None]:
    """The largest batch size whose plan fits, by doubling and halving the interval, and its bytes.

    ``begin`` is told of each that is planned. Supposes that a larger batch needs no less memory. (0, None) if not even
    a batch of one fits.
    """
    tried: dict[int, Attempt] = {}

    def fits(batch: int) -> bool:
        begin(f"planning batch size {batch}")
        tried[batch] = attempt(f"batch size {batch}", plan(replace(request, batch=batch)))
        return tried[batch].total <= budget

    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low, tried.get(low)


def default_batch(factory: Callable[..., object]) -> int | None:
    """The default of a factory's ``batch`` argument; None if it takes none or has no default."""
    parameter = inspect.signature(factory).parameters.get("batch")
    value = None if parameter is None else parameter.default
    return value if isinstance(value, int) and not isinstance(value, bool) else None
