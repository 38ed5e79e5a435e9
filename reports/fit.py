"""Does it fit, and if not, what would make it fit: answered by planning alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..ir.errors import MemplanError
from .model import Report
from .target import Request

#: Changes of options that cost speed but no accuracy, the cheapest first.
CHANGES: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("recompute up to 10% of the step's time", {"recompute_time": 0.1}),
    ("recompute up to 30% of the step's time", {"recompute_time": 0.3}),
    ("recompute as much as helps", {"recompute_time": 10.0}),
)
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


def changes(plan: Planner, request: Request, budget: int, tell: Callable[[str], None]) -> list[Attempt]:
    """Known changes in order of their price, until one fits: options first, then smaller batches.

    A change that cannot be planned is left out, after ``tell`` was told why.
    """
    found: list[Attempt] = []
    for title, options in CHANGES:
        asked = replace(request, options={**request.options, **options})
        try:
            found.append(attempt(title, plan(asked)))
        except MemplanError as error:
            tell(f"{title}: {error}")
            continue
        if found[-1].total <= budget:
            return found
    batch = request.batch
    while batch is not None and batch > 1:
        batch //= 2
        found.append(attempt(f"batch size {batch}", plan(replace(request, batch=batch))))
        if found[-1].total <= budget:
            break
    return found


def largest_batch(plan: Planner, request: Request, budget: int) -> tuple[int, Attempt | None]:
    """The largest batch size whose plan fits, by doubling and halving the interval, and its bytes.

    Supposes that a larger batch needs no less memory. (0, None) if not even a batch of one fits.
    """
    tried: dict[int, Attempt] = {}

    def fits(batch: int) -> bool:
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
