"""Which of the library's collectives work in registered memory: one test for each reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch

from memplan.ir.communication import GroupFacts, Memory, default_thresholds
from memplan.ir.communication_options import CommunicationOptions
from memplan.ir.in_flight import Collective, Wait
from memplan.ir.plan import InPool
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
from memplan.ir.verify import verify_program
from memplan.ir.verify_plan import verify_plan
from memplan.passes.comm import Communication, place_in_arenas
from memplan.passes.schedule import lifetimes, make_plan, storages

FACTS = GroupFacts("0", 2, "cpu", "there is none", default_thresholds(2), unregistered="")
OPTIONS = CommunicationOptions.checked({"registered": "on"})


def view(name: str, count: int = 64) -> View:
    return View(name, torch.float32, (count,), (1,))


MAKE = Extern("make", "aten.sin.out", (view("x"),), (), (view("h"),), Contract.OUT, "cpu")
GATHER = Collective(
    "gather", "_c10d_functional.all_gather_into_tensor_out.default", (view("h"), Literal(2), Literal("0")), (),
    (view("g", 128),), Contract.OUT, "cpu", effect=True, group="0",
)  # fmt: skip
WAIT = Wait(
    "wait", "_c10d_functional.wait_tensor.default", (view("g", 128), view("h")), (), (view("g", 128),),
    Contract.MUTATE, "cpu", mutates=("g",),
)  # fmt: skip
USE = Extern("use", "aten.cos.out", (view("g", 128),), (), (view("out", 128),), Contract.OUT, "cpu")
SIZE = sympy.Symbol("s0", integer=True, positive=True)
OPERATIONS = (MAKE, GATHER, WAIT, USE)


def program(*operations: Operation, **changed: Callable[[Buffer], Buffer]) -> Program:
    sizes = {"x": 64, "h": 64, "g": 128, "out": 128, "other": 128}
    kinds = {"x": BufferKind.INPUT, "out": BufferKind.OUTPUT}
    buffers = {n: Buffer(n, 4 * k, torch.float32, "cpu", kinds.get(n, BufferKind.TEMPORARY)) for n, k in sizes.items()}
    if not any("other" in (*op.writes, *op.mutates) for op in operations):
        del buffers["other"]
    buffers.update((name, change(buffers[name])) for name, change in changed.items())
    return Program("p", Phase.INFERENCE, buffers, operations, (TensorInput(0, view("x")),), (view("out", 128),))


def communicated(made: Program, facts: GroupFacts | None = FACTS, refused: str = "") -> Program:
    return Communication({} if facts is None else {"0": facts}, OPTIONS, refused).run(made)


def test_all_that_it_works_on_lies_in_one_arena() -> None:
    made = communicated(program(*OPERATIONS))
    verify_program(made)
    assert {n for n, b in made.buffers.items() if b.memory is Memory.REGISTERED} == {"h", "g"}
    assert not made.notes
    order = [op.name for op in made.operations]
    pools, offsets = place_in_arenas(made, len(order), storages(made, lifetimes(made, order), {}), None)
    plan = make_plan(made, order, in_place={}, pools=pools, offsets=offsets)
    verify_plan(plan)
    (arena,) = plan.arenas
    assert (arena.memory, arena.group) == (Memory.REGISTERED, "0")
    assert plan.placements["h"] != plan.placements["g"]  # in flight together
    assert all(isinstance(plan.placements[n], InPool) for n in ("h", "g"))
    assert max(plan.timeline) == 512  # what is returned; the arena is in no count


@pytest.mark.parametrize(("least", "taken"), [(512, True), (513, False), (0, False)])
def test_where_it_is_known_to_be_faster(least: int, taken: bool) -> None:
    """The message of an all-gather is its result: 128 of float32."""
    thresholds = replace(FACTS.thresholds, all_gather_registered=least)
    options = CommunicationOptions.checked({"registered": "auto"})
    made = Communication({"0": replace(FACTS, thresholds=thresholds)}, options).run(program(*OPERATIONS))
    texts = [text.partition("; with the library, ")[2] for _, text in made.notes]
    assert texts == ([] if taken else ["plain memory is taken for 512 bytes on 2 ranks"])
    assert (made.buffers["h"].memory is Memory.REGISTERED) == taken


def test_a_size_that_is_not_known_is_not_taken_for_a_fast_one() -> None:
    facts = replace(FACTS, thresholds=replace(FACTS.thresholds, all_gather_registered=1))
    gather = replace(GATHER, args=(View("h", torch.float32, (SIZE,), (1,)), *GATHER.args[1:]))
    options = CommunicationOptions.checked({"registered": "auto"})
    made = Communication({"0": facts}, options).run(program(MAKE, gather, WAIT, USE))
    (note,) = made.notes
    assert "its size is known only at the call, or it is a call of several tensors" in note[1]


SECOND = replace(
    GATHER, name="second", args=(view("h"), Literal(2), Literal("7")), results=(view("other", 128),), group="7"
)
SECOND_WAIT = replace(
    WAIT, name="second_wait", args=(view("other", 128), view("h")), results=(view("other", 128),), mutates=("other",)
)


@pytest.mark.parametrize(
    ("made", "facts", "refused", "reason"),
    [
        (program(*OPERATIONS), None, "", "nothing is known of its group"),
        (program(*OPERATIONS), replace(FACTS, unregistered="rank 1: too old"), "", "rank 1: too old"),
        (program(*OPERATIONS), FACTS, "recorded as CUDA graphs", "recorded as CUDA graphs"),
        (program(MAKE, replace(GATHER, contract=Contract.FRESH), WAIT, USE), FACTS, "", "allocates its result itself"),
        (program(replace(MAKE, contract=Contract.FRESH), *OPERATIONS[1:]), FACTS, "", "('make') allocates 'h' itself"),
        (program(*OPERATIONS, h=lambda b: replace(b, kind=BufferKind.CONSTANT)), FACTS, "", "'h' is the caller's"),
        (program(*OPERATIONS, g=lambda b: replace(b, kind=BufferKind.OUTPUT)), FACTS, "", "'g' is the caller's, or"),
        (program(*OPERATIONS, h=lambda b: replace(b, nbytes=4 * SIZE)), FACTS, "", "size of 'h' is known only"),
        (program(*OPERATIONS, h=lambda b: replace(b, nbytes=0)), FACTS, "", "'h' is empty"),
        (program(*OPERATIONS, h=lambda b: replace(b, memory=Memory.SYMMETRIC, group="0")), FACTS, "",
         "'h' is in the symmetric memory of group '0' already"),
        (program(*OPERATIONS, h=lambda b: replace(b, memory=Memory.REGISTERED, group="7")), FACTS, "",
         "'h' is in the registered memory of group '7' already"),
        (program(MAKE, GATHER, SECOND, WAIT, SECOND_WAIT, USE), FACTS, "", "'second' uses 'h' in another group"),
    ],
)  # fmt: skip
def test_what_cannot_stays_as_it_is_and_is_said(
    made: Program, facts: GroupFacts | None, refused: str, reason: str
) -> None:
    found = communicated(made, facts, refused)
    assert {n: b.memory for n, b in found.buffers.items()} == {n: b.memory for n, b in made.buffers.items()}
    texts = [text for name, text in found.notes if name == "gather"]
    assert len(texts) == 1
    assert "runs on unregistered memory" in texts[0]
    assert texts[0].partition("; with the library, ")[2].count(reason) == 1
