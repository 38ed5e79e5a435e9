"""One sample of every operator, forward and gradient, through memplan against eager."""

from __future__ import annotations

import pytest

from tests.opdb.harness import calls, check_group, names, skipped

#: Operators in one compiled graph.
TOGETHER = 24
NAMES = [n for n in names() if skipped(n) is None]
GROUPS = [NAMES[k : k + TOGETHER] for k in range(0, len(NAMES), TOGETHER)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"{g[0]}-to-{g[-1]}")
def test_first_sample(group: list[str]) -> None:
    outcomes = check_group([calls(name, limit=1) for name in group])
    wrong = [f"{o.name}: {o.error}" for o in outcomes if o.error]
    assert not wrong, "\n".join(wrong)


def test_few_are_skipped() -> None:
    """At most two in a hundred, each with a reason."""
    reasons = [skipped(name) for name in names()]
    assert sum(r is not None for r in reasons) <= 0.02 * len(reasons)
