"""Every form of collective on two ranks: the same numbers as eager, in pools whose freed bytes are poisoned."""

from __future__ import annotations

import pytest

from memplan.ir.communication import collective_form
from tests.distributed.cases import FORMS, WITH_BACKWARD
from tests.distributed.ranks import Ranks

CASES = "tests.distributed.cases"


@pytest.mark.parametrize("name", FORMS)
def test_form(ranks: Ranks, name: str) -> None:
    for started, waited in ranks.run(CASES, "form", name, {"poison": True, "pools": "always"}):
        assert started
        assert waited >= started


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_backward(ranks: Ranks, name: str) -> None:
    ranks.run(CASES, "backward", name, {"poison": True, "pools": "always"})


def test_ranks_recompile_by_themselves(ranks: Ranks) -> None:
    """A rank whose shapes change compiles again with the same communication; its peer does not come to agree."""
    first, second = ranks.run(CASES, "recompiles", [(4, 4), (5, 4), (6, 4), (6, 7), (9, 2)])
    assert first == [1, 2, 2, 2, 2]
    assert second == [1, 1, 1, 2, 2]


def test_a_functional_collective_that_is_not_known_is_in_flight_until_its_wait() -> None:
    form = collective_form("_c10d_functional.all_gather_single.default")
    assert form is not None
    assert not form.copies
    assert collective_form("symm_mem._low_contention_all_gather.default") is not None
    for target in ("_c10d_functional.wait_tensor.default", "_c10d_functional._wrap_tensor_autograd.default"):
        assert collective_form(target) is None
    assert collective_form("symm_mem.one_shot_all_reduce.default") is None
