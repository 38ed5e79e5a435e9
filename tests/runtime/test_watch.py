"""The watch over kernels that wait for other ranks."""

from __future__ import annotations

from collections.abc import Callable

from memplan.runtime.watch import Watch


def watched(reached: bool) -> tuple[list[str], Watch]:
    told: list[str] = []
    calls = iter(range(1, 1 << 30))

    def mark() -> Callable[[], bool] | None:
        found = next(calls)
        if reached and found > 6:
            watch.stop()
        return None if found % 2 else lambda: reached

    watch = Watch("group '0'", mark, 0.1, give_up=told.append)
    return told, watch


def test_a_device_that_stands_still_ends_it() -> None:
    told, watch = watched(reached=False)
    watch.run()
    assert len(told) == 1
    assert "group '0'" in told[0]


def test_a_device_that_gets_on_does_not() -> None:
    told, watch = watched(reached=True)
    watch.run()
    assert not told
