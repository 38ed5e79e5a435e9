"""Programs that spend donated inputs, and their like that leave them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from memplan.ir.program import Contract, Copy, Program, TensorInput, View
from memplan.ir.template import ProductConfig, Template
from memplan.ir.verify import verify_program
from memplan.passes.comm_rewriting import renamed
from memplan.passes.donation import keeping_inputs
from memplan.templates import collect_templates
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.programs import ProgramBuilder
from tests.templates.products import product


def kept(program: Program, inputs: Sequence[object] | None = None) -> Program:
    """The program that keeps its inputs, checked: it gives the same, and every input is as it was."""
    verify_program(program)
    after = keeping_inputs(program)
    verify_program(after)
    assert not any(b.donated for b in after.buffers.values())
    given = list(inputs) if inputs is not None else make_inputs(program)
    spent, left = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, spent), run_program(after, left)
    for a, b in zip([*expected, *given], [*found, *left], strict=True):
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    return after


def doubled(p: ProgramBuilder, name: str, x: View) -> None:
    p.extern(name, "aten.mul_.Scalar", (x, 2.0), contract=Contract.MUTATE, mutates=(x.buffer,), result=x)


def test_an_input_that_is_changed_is_copied_just_before() -> None:
    p = ProgramBuilder()
    x, d = p.input("x", (4, 6)), p.input("d", (4, 6), donated=True)
    before = p.pointwise("before", "add", x, d)
    doubled(p, "change", d)
    after = p.pointwise("after", "mul", before, d)
    doubled(p, "again", d)
    out = p.pointwise("out", "add", after, d)
    made = kept(p.program(out))
    assert [op.name for op in made.operations] == ["before", "d_kept_copy", "change", "after", "again", "out"]
    assert made.by_name["before"].reads == ("x", "d")
    assert made.by_name["after"].reads == ("before", "d_kept")


def test_what_is_only_read_is_copied_nowhere() -> None:
    p = ProgramBuilder()
    x, d = p.input("x", (4, 6)), p.input("d", (4, 6), donated=True)
    program = p.program(p.pointwise("out", "add", x, d))
    assert kept(program).operations == program.operations


def test_an_input_of_the_callers_that_the_program_is_to_change_stays_that() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4,))
    doubled(p, "change", x)
    out = p.pointwise("out", "neg", x)
    program = p.program(out)
    assert keeping_inputs(program).operations == program.operations


def test_names_that_are_taken_are_left() -> None:
    p = ProgramBuilder()
    d = p.input("d", (4,), donated=True)
    taken = p.pointwise("d_kept", "neg", d)
    doubled(p, "change", d)
    made = kept(p.program(p.pointwise("out", "add", taken, d)))
    assert made.by_name["out"].reads == ("d_kept", "d_kept_")


def test_what_lies_between_the_elements_is_copied_too() -> None:
    p = ProgramBuilder()
    d = p.input("d", (4, 6), donated=True)
    gaps = View("d", torch.float32, (4, 3), (6, 1))
    p.buffers["d"] = replace(p.buffers["d"], nbytes=21 * 4)
    p.inputs[0] = TensorInput(0, gaps)
    doubled(p, "change", replace(d, sizes=(21,), strides=(1,)))  # a user's kernel has a pointer
    out = p.buffer("out", (4, 3))
    p.copy("read", gaps, out, fresh=True)
    made = keeping_inputs(p.program(out))
    verify_program(made)
    (copy,) = (op for op in made.operations if isinstance(op, Copy) and op.target.buffer == "d_kept")
    assert (copy.source.sizes, copy.source.strides) == ((21,), (1,))


def test_a_template_reads_and_writes_under_the_new_names() -> None:
    made = product((1, 16, 16, 16), ProductConfig(16, 16, 16), bias=True, epilogue="residual")
    written = made.epilogue.stores[0].buffer
    result = View(written, torch.float16, (1, 16, 16), (256, 16, 1))
    op = Template("t", "memplan.product", (made.a, made.b), (), (result,), Contract.OUT, "cuda:0", product=made)
    for old in ("b0", "b2", "b3", written):
        found = renamed(op, old, "new")
        assert isinstance(found, Template)
        p = ProgramBuilder()
        p.operations.append(found)
        (arguments,) = collect_templates(p.program()).arguments.values()
        assert "new" in arguments.buffers
        assert old not in (*arguments.buffers, *found.reads, *found.writes)
