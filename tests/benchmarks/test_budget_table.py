"""What the table of budgets says of what was measured."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.budget import budgets
from benchmarks.budget_table import Row, table, verdicts

MB = 10**6


def row(system: str, budget: float | None, held: float, ms: float, **said: object) -> Row:
    """A measurement on a GPU: megabytes held beyond 100 that were there before, of which nine tenths are alive."""
    live = int(0.9 * held * MB)
    found = {"peak": live, "reserved_above": int(held * MB), "ms": ms}
    given = budget if system != "memplan" or budget is None else budget * MB
    job = {"system": system, "budget": given}
    return Row("net", job, {"predicted": live, "gradients": 7, "first_step_s": 3.0, **found, **said})


def said(*rows: Row) -> str:
    return "\n".join(verdicts(rows))


def test_budgets_lie_at_equal_ratios_from_the_least() -> None:
    found = budgets(1000, 4000, 5)
    assert found[0] == 1000
    assert 4000 < found[-1] < 4400
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert ratios == pytest.approx([(found[-1] / 1000) ** 0.25] * 4, rel=1e-2)


def test_what_is_over_its_budget_or_falls_is_named() -> None:
    good = [row("memplan", 100, 99, 5.0), row("memplan", 200, 198, 4.0), row("memplan", 300, 290, 3.0)]
    assert "over their budget: none" in said(*good)
    assert "smaller peak: none" in said(*good)
    assert "distinct peaks: 3" in said(*good)
    assert "at least 95 % used: 3;" in said(*good)
    over = said(*good, row("memplan", 400, 401, 3.0))
    assert "over their budget: 400.0 MB" in over
    falls = said(*good, row("memplan", 400, 285, 3.0, above=[410 * MB, 0]))
    assert "smaller peak: 400.0 MB" in falls


def test_an_unused_budget_is_shown_to_be_of_no_use_or_named() -> None:
    shown = said(row("memplan", 200, 150, 4.0, above=[210 * MB, 0]))
    assert "no plan between it and the budget: 1; others: none" in shown
    left = said(row("memplan", 200, 150, 4.0, above=[210 * MB, 3]))
    assert "others: 200.0 MB" in left


def test_predictions_are_of_live_bytes() -> None:
    assert "off by at most 1.00 %" in said(row("memplan", 200, 100, 4.0, predicted=int(0.909 * 100 * MB)))


@pytest.mark.parametrize(("held", "expected"), [(250, "held 250.0 MB: 0.500"), (150, "held 150.0 MB: 1.000"),
                                                (50, "held 50.0 MB: memplan has no plan so small")])  # fmt: skip
def test_times_are_compared_at_no_more_memory(held: float, expected: str) -> None:
    own = [row("memplan", 100, 99, 8.0), row("memplan", 200, 198, 4.0)]
    assert expected in said(*own, row("inductor", 0.5, held, 8.0))


def test_the_table_has_a_row_for_what_failed() -> None:
    failed = Row("net", {"system": "memplan", "budget": 5 * MB}, {"error": "PlanningError: cannot be met\nmore"})
    rows = [row("memplan", None, 100, 4.0, predicted_reserved=99 * MB), row("inductor", None, 200, 8.0)]
    text = table([*rows, failed], {"torch": "2.13"})
    assert "| memplan | 5.0 | PlanningError: cannot be met |" in text
    assert "| memplan |  | 90.0 | 90.0 | +0.00 % | 99.0 | 100.0 |  |  | 4.00 | 0.500 | the default's | 3 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
