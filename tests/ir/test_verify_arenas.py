"""Arenas: what lies in them, and that nothing in them is overwritten while a peer may still read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from memplan.ir.communication import SYMMETRIC_FORMS, Memory, SymmetricForm
from memplan.ir.errors import VerificationError
from memplan.ir.plan import InPlaceOf, InPool, Lifetime, Own, Plan, Pool
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    Literal,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)
from memplan.ir.verify_communication import check_arenas
from memplan.ir.verify_plan import verify_plan
from memplan.passes.schedule import make_plan

REDUCE = "symm_mem.one_shot_all_reduce_out.default"


def view(name: str) -> View:
    return View(name, torch.float32, (64,), (1,))


def fill(name: str) -> Extern:
    return Extern(f"fill_{name}", "aten.sin.out", (view("x"),), (), (view(name),), Contract.OUT, "cpu")


def reduce(source: str, result: str) -> Extern:
    args = (view(source), Literal("sum"), Literal("0"))
    return Extern(f"reduce_{source}", REDUCE, args, (), (view(result),), Contract.OUT, "cpu", effect=True)


def plan(operations: Sequence[Operation], offsets: dict[str, int]) -> Plan:
    """Buffers ``a`` and ``b`` in an arena of group "0", reduced into ``ra`` and ``rb``, which are returned."""
    kinds = {"x": BufferKind.INPUT, "a": BufferKind.COMM, "b": BufferKind.COMM}
    buffers = {
        n: Buffer(n, 256, torch.float32, "cpu", kinds.get(n, BufferKind.OUTPUT)) for n in ("x", "a", "b", "ra", "rb")
    }
    for n in ("a", "b"):
        buffers[n] = replace(buffers[n], memory=Memory.SYMMETRIC, group="0")
    program = Program(
        "p", Phase.INFERENCE, buffers, tuple(operations), (TensorInput(0, view("x")),), (view("ra"), view("rb"))
    )
    arena = Pool("arena0", 512, "cpu", Lifetime(0, len(operations) + 1), Memory.SYMMETRIC, "0")
    order = [op.name for op in operations]
    placed = {n: ("arena0", at) for n, at in offsets.items()}
    return make_plan(program, order, in_place={}, pools=(arena,), offsets=placed)


IN_TURN = (fill("a"), reduce("a", "ra"), fill("b"), reduce("b", "rb"))


def test_one_place_after_the_other_is_right() -> None:
    made = plan(IN_TURN, {"a": 0, "b": 0})
    verify_plan(made)
    assert max(made.timeline) == 512  # the two results; the arena is in no count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placements": {"a": Own()}}, "'a' wants symmetric memory, and lies in plain"),
        ({"placements": {"ra": InPool("arena0", 256)}}, "leaves the program"),
        ({"group": "7"}, "of group '0', its arena 'arena0' of group '7'"),
        ({"lifetime": Lifetime(0, 4)}, "does not stay from call to call"),
        ({"memory": Memory.REGISTERED}, "'a' wants symmetric memory, and lies in registered memory"),
    ],
)
def test_what_lies_where(change: dict[str, object], message: str) -> None:
    made = plan(IN_TURN, {"a": 0, "b": 0})
    places = change.pop("placements", {})
    wrong = replace(made, placements={**made.placements, **places}, pools=(replace(made.pools[0], **change),))
    with pytest.raises(VerificationError, match=re.escape(message)):
        verify_plan(wrong, check_program=False)


def test_nothing_takes_the_storage_of_another_memory() -> None:
    made = plan(IN_TURN, {"a": 0, "b": 0})
    wrong = replace(made, placements={**made.placements, "b": InPlaceOf("ra")})
    with pytest.raises(VerificationError, match=r"'b' \(symmetric memory\) is in place of 'ra' \(plain memory\)"):
        check_arenas(wrong, VerificationError)


@pytest.fixture
def no_barrier_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYMMETRIC_FORMS, REDUCE, SymmetricForm("all_reduce", barrier_after=False))  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_barrier_at_the_end")
def test_without_a_barrier_a_place_is_not_written_again() -> None:
    with pytest.raises(VerificationError, match=r"written for 'b', while peers may still read .* 'reduce_a'"):
        verify_plan(plan(IN_TURN, {"a": 0, "b": 0}))


@pytest.mark.usefixtures("no_barrier_at_the_end")
def test_nor_by_the_next_call() -> None:
    with pytest.raises(VerificationError, match="when the next call writes them"):
        verify_plan(plan(IN_TURN, {"a": 0, "b": 256}))


def test_a_later_barrier_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places: the first is free again once the second all-reduce, which has both barriers, has begun."""
    other = "symm_mem.two_shot_all_reduce_out.default"
    monkeypatch.setitem(SYMMETRIC_FORMS, REDUCE, SymmetricForm("all_reduce", barrier_after=False))  # type: ignore[arg-type]
    second = replace(reduce("b", "rb"), target=other, mutates=("b",))
    verify_plan(plan((fill("a"), reduce("a", "ra"), fill("b"), second), {"a": 0, "b": 256}))
