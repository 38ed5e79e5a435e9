"""Which rungs a budget's search tries and takes, with bytes that are given instead of planned."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch.fx
from hypothesis import given
from hypothesis import strategies as st

import memplan.budget
from memplan.budget import LEVEL, LIMITS, PROBES, RUNGS, Budget, Modules, Planned, rung_of
from memplan.ir.errors import PlanningError
from memplan.passes.step_peak import StepPeak

LEAST, MOST = 800_000_000, 60_000_000_000


class Given(Budget):
    """A search in which the plans of a limit need what a function says."""

    needs: Callable[[int], int]
    fastest = MOST

    def tried(self, rung: int) -> tuple[Modules, Planned]:
        if rung not in self._tried:
            needed = self.fastest if rung == RUNGS else self.needs(max(LEAST, min(MOST, LIMITS[rung])))
            module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
            self._tried[rung] = (module, module), Planned((), {}, StepPeak(needed, 0, 0, ()))
        return self._tried[rung]

    def _fastest_peak(self) -> int:
        return MOST


def searched(limit: int, needs: Callable[[int], int], fastest: int = MOST) -> tuple[int, int]:
    """Bytes that the plan taken needs, and rungs tried."""
    search = Given(limit, None, None, lambda modules: pytest.fail("nothing is planned here"))  # type: ignore[arg-type]
    search.needs, search.fastest = needs, fastest  # type: ignore[method-assign]
    return search.search()[1].peak.needed, len(search._tried)


def noisy(seed: int, part: float, more: float) -> Callable[[int], int]:
    """A model that is off by a part of each limit, up and down, and by the same number of bytes everywhere."""

    def needs(limit: int) -> int:
        draw = (hash((seed, limit)) % 2001 - 1000) / 1000
        return int(limit * (1 + part * draw) + more * LEAST)

    return needs


@pytest.mark.parametrize("off", [0.0, 0.004, 0.008])
@pytest.mark.parametrize("limit", [2_000_000_000, 9_876_543_210, 45_000_000_000])
def test_one_plan_is_enough_where_the_model_is_nearly_right(limit: int, off: float) -> None:
    needed, tried = searched(limit, lambda n: int(n * (1 + off)))
    assert tried == 1
    assert limit / LEVEL**2 / 1.005 <= needed <= limit


@pytest.mark.parametrize("more", [0.1, 0.3, 0.5])
def test_the_error_of_one_plan_corrects_the_next(more: float) -> None:
    needed, tried = searched(1_900_000_000, lambda n: n + int(more * LEAST))
    assert tried == 2
    assert 0.97 * 1_900_000_000 <= needed <= 1_900_000_000


@given(
    seed=st.integers(0, 10_000),
    part=st.sampled_from([0.0, 0.01, 0.04, 0.2]),
    more=st.sampled_from([-0.1, 0.0, 0.3]),
    budgets=st.lists(st.integers(1_500_000_000, 70_000_000_000), min_size=2, max_size=12),
)
def test_larger_budgets_never_need_less_whatever_the_model_gets_wrong(
    seed: int, part: float, more: float, budgets: list[int]
) -> None:
    needs = noisy(seed, part, more)
    found = [searched(limit, needs) for limit in sorted(budgets)]
    assert all(needed <= limit for (needed, _), limit in zip(found, sorted(budgets), strict=True))
    assert [needed for needed, _ in found] == sorted(needed for needed, _ in found)


def test_the_fastest_plan_is_taken_wherever_it_is_within_the_budget() -> None:
    fastest = int(0.9 * MOST)
    assert searched(fastest, noisy(0, 0.0, 0.0), fastest)[0] == fastest
    assert searched(fastest - 1, noisy(0, 0.0, 0.0), fastest)[0] < fastest


def test_steps_between_plans_that_are_larger_than_a_level_are_walked_down() -> None:
    """Plans that need 1, 1.3 or 1.7 GB and nothing between."""

    def needs(limit: int) -> int:
        return max(n for n in (1_000_000_000, 1_300_000_000, 1_700_000_000) if n <= max(limit, 1_000_000_000))

    for limit, expected in ((1_600_000_000, 1_300_000_000), (1_299_000_000, 1_000_000_000)):
        needed, tried = searched(limit, needs)
        assert needed == expected
        assert tried <= PROBES * (2 + math.log(limit / expected, LEVEL))


def test_the_least_is_found_to_the_byte_and_below_it_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memplan.budget, "cannot_be_met", lambda limit, least: f"{least.peak.needed} bytes")

    def needs(limit: int) -> int:
        return int(1.1 * limit)

    least = needs(LEAST)
    assert searched(least, needs)[0] == least
    with pytest.raises(PlanningError, match=f"{least} bytes"):
        searched(least - 1, needs)


@pytest.mark.parametrize("limit", [1, 7, 10**6, 12 * 2**30, 2**60])
def test_a_rung_of_a_limit_is_the_highest_within_it(limit: int) -> None:
    rung = rung_of(limit)
    assert LIMITS[rung] <= limit
    assert rung + 1 == RUNGS or LIMITS[rung + 1] > limit
