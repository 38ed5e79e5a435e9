"""Every form of collective on two ranks: the same numbers as eager, in pools whose freed bytes are poisoned."""

from __future__ import annotations

import pytest

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
