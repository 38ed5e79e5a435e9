"""``@pytest.mark.memplan_limit("2GiB")``: a test fails if a step that it compiles is planned to need more.

Installed as a pytest plugin by the entry point ``pytest11``. Costs nothing in tests without the marker.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..ir.config import parse_bytes
from ..ir.errors import OptionError

MARK = "memplan_limit"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", f"{MARK}(bytes): fail if a step compiled by memplan is planned to need more")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record what the test compiles, and hold its peak against the limit."""
    mark = item.get_closest_marker(MARK)
    if mark is None:
        return (yield)
    try:
        limit = parse_bytes(*mark.args)
    except (TypeError, OptionError) as error:
        raise pytest.UsageError(f"{item.nodeid}: {MARK} takes one number of bytes, like '2GiB': {error}") from None
    import memplan

    from .oom import largest_lines
    from .target import report_from
    from .text import size

    with memplan.record() as recording:
        result = yield
    if not recording.graphs:
        pytest.fail(
            f"{MARK}: the test compiled nothing with memplan, so there is nothing to hold to the limit", pytrace=False
        )
    graph = report_from(recording.graphs).step
    if graph.peak > limit:
        pytest.fail(
            f"{MARK}: the peak is {size(graph.peak)}, the limit {size(limit)}\n{largest_lines(graph)}", pytrace=False
        )
    return result
