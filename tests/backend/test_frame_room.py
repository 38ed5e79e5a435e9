"""Room for frames: calls inside it ask the kernel for no memory, and are calls like any others."""

from __future__ import annotations

import resource
import sys

import pytest

from memplan.frame_room import with_frame_room

CALLS = 300


def _leaf(v: int) -> int:
    """With a frame larger than that of `_faults_at`, so that at some depth it is the call that does not fit."""
    return max(v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v)


def _faults_at(depth: int) -> int:
    """Page faults of many small calls from so deep a stack."""
    if depth:
        return _faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for k in range(CALLS):
        _leaf(k)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _most_faults() -> int:
    return max(_faults_at(depth) for depth in range(400))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames lie in chunks from Python 3.11 on")
@pytest.mark.skipif(sys.platform != "linux", reason="counts the faults of Linux")
def test_calls_inside_map_no_chunks() -> None:
    outside, inside = _most_faults(), with_frame_room(_most_faults)()
    assert outside >= CALLS, "this Python keeps frames in another way: is the room still needed?"
    assert inside < CALLS / 3


@with_frame_room
def _divided(a: int, *, by: int) -> float:
    """A quotient."""
    return a / by


def test_it_is_a_call_like_any_other() -> None:
    assert _divided(6, by=3) == 2
    assert (_divided.__name__, _divided.__doc__) == ("_divided", "A quotient.")
    with pytest.raises(ZeroDivisionError):
        _divided(6, by=0)
    with pytest.raises(TypeError, match="by"):
        _divided(6)  # type: ignore[call-arg]


def test_deeper_than_the_room_is_still_a_call() -> None:
    def down(n: int) -> int:
        return 1 + down(n - 1) if n else 0

    # Large frames rather than many: where something else than the interpreter evaluates frames (Dynamo, a tracer),
    # every call takes of the C stack too
    down.__code__ = down.__code__.replace(co_stacksize=1 << 11)
    assert with_frame_room(down)(400) == 400  # 6.5 MB of frames
