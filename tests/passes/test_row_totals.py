"""Sums over columns joined with kernels over rows: which, where in the order, with the same answers and fewer bytes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.codegen.triton_kernel import emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.device import default_figures
from memplan.ir.index import FloorDiv
from memplan.ir.loops import Kernel, StoreMode
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    KernelOp,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)
from memplan.ir.verify import verify_program
from memplan.passes import row_totals
from memplan.passes.costs import step_microseconds
from memplan.passes.row_totals import RowTotals
from memplan.passes.split_reductions import SplitReductions
from memplan.passes.store_and_reduce import StoreAndReduce
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.sample_kernels import F32, Builder, R, X

ROWS, COLUMNS = 2112, 512
SIZE = ROWS * COLUMNS
DEVICE = "cuda:0"
GIVEN = ("dy", "x", "mean", "rstd", "weight", "other")
SIZES = {"mean": ROWS, "rstd": ROWS, "weight": COLUMNS, "dweight": COLUMNS, "dbias": COLUMNS, "dfirst": COLUMNS}


def backward(*, keep: str = "", columns: int = COLUMNS, rows: int = ROWS) -> Kernel:
    """Gradient of a layer norm's input; with ``keep`` the normalised input is stored there."""
    k = Builder((rows,), (columns,))
    at = X[0] * columns + R[0]
    wdy = k.call("mul", k.load("dy", at), k.load("weight", R[0]))
    xhat = k.call("mul", k.call("sub", k.load("x", at), k.load("mean", X[0])), k.load("rstd", X[0]))
    mean = k.call("div", k.reduce("sum", k.call("mul", wdy, xhat)), k.const(float(columns)))
    k.store("dx", at, k.call("sub", wdy, k.call("mul", xhat, mean)))
    if keep:
        k.store(keep, at, xhat)
    return k.done()


def pictures(batch: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Kernel:
    """`backward` of what is scaled by a number for each picture, in two ranges that do not make one."""
    pieces = rows // batch
    k = Builder((batch, pieces), (columns,))
    row = X[0] * pieces + X[1]
    at = row * columns + R[0]
    wdy = k.call("mul", k.call("mul", k.load("dy", at), k.load("scale", X[0])), k.load("weight", R[0]))
    mean = k.call("div", k.reduce("sum", k.call("mul", wdy, k.load("x", at))), k.const(float(columns)))
    k.store("dx", at, k.call("mul", k.call("sub", wdy, mean), k.load("rstd", row)))
    return k.done()


def sums(*, kept: str = "", columns: int = COLUMNS, rows: int = ROWS) -> Kernel:
    """Gradients of the weight and the bias; ``kept``: with the normalised input that was stored there."""
    k = Builder((columns,), (rows,))
    at = R[0] * columns + X[0]
    dy = k.load("dy", at)
    if kept:
        xhat = k.load(kept, at)
    else:
        xhat = k.call("mul", k.call("sub", k.load("x", at), k.load("mean", R[0])), k.load("rstd", R[0]))
    k.store("dweight", X[0], k.reduce("sum", k.call("mul", dy, xhat)))
    k.store("dbias", X[0], k.reduce("sum", dy))
    return k.done()


def sum_of(source: str, target: str = "dfirst", *, by: str = "", columns: int = COLUMNS, rows: int = ROWS) -> Kernel:
    k = Builder((columns,), (rows,))
    at = R[0] * columns + X[0]
    value = k.load(source, at)
    k.store(target, X[0], k.reduce("sum", k.call("mul", value, k.load(by, at)) if by else value))
    return k.done()


def product(source: str, target: str) -> Extern:
    """A call between kernels."""
    views = [View(b, F32, (SIZE,), (1,)) for b in (source, target)]
    return Extern(target, "aten.relu.default", (views[0],), (), (views[1],), Contract.FRESH, DEVICE)


def program(
    *operations: tuple[str, Kernel] | Extern, sizes: dict[str, int] | None = None, given: tuple[str, ...] = GIVEN
) -> Program:
    """`GIVEN` are given; what nobody reads, ``dx`` and what is called ``out`` are returned."""
    made: list[Operation] = [op if isinstance(op, Extern) else KernelOp(*op, DEVICE) for op in operations]
    names = dict.fromkeys(b for op in made for b in (*op.reads, *op.writes))
    read = {b for op in made for b in op.reads}
    buffers = {}
    for b in names:
        kind = BufferKind.INPUT if b in given else BufferKind.TEMPORARY
        if b not in given and (b not in read or b in ("dx", "out")):
            kind = BufferKind.OUTPUT
        buffers[b] = Buffer(b, 4 * ({**SIZES, **(sizes or {})}.get(b, SIZE)), F32, DEVICE, kind)

    def view(b: str) -> View:
        return View(b, F32, (int(buffers[b].nbytes) // 4,), (1,))

    inputs = tuple(TensorInput(k, view(b)) for k, b in enumerate(given) if b in buffers)
    outputs = tuple(view(b) for b in buffers if buffers[b].kind is BufferKind.OUTPUT)
    found = Program("p", Phase.BACKWARD, buffers, tuple(made), inputs, outputs)
    verify_program(found)
    return found


def joined(before: Program) -> Program:
    """What the pass makes, verified, with the same answers."""
    after = RowTotals().run(before)
    verify_program(after)
    inputs = make_inputs(before)
    expected = run_program(before, copy_inputs(inputs))
    found = run_program(after, inputs)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)
    return after


def names(p: Program) -> list[str]:
    return [op.name for op in p.operations]


def totals(p: Program, name: str) -> int:
    op = p.by_name[name]
    assert isinstance(op, KernelOp)
    return sum(s.mode is StoreMode.TOTAL for s in op.kernel.stores)


def traffic(p: Program) -> float:
    return sum(step_microseconds(p, default_figures("NVIDIA H100")).values())


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_of_weight_and_bias_beside_that_of_the_input(first: int) -> None:
    kernels = [("rows", backward()), ("sums", sums())]
    before = program(kernels[first], kernels[1 - first])
    after = joined(before)
    assert names(after) == ["rows", "sums"]
    assert totals(after, "rows") == 2
    assert not {"dy", "x"} & set(after.by_name["sums"].reads)
    assert traffic(after) < 0.85 * traffic(before)
    kernel = after.by_name["rows"].kernel  # type: ignore[union-attr]
    emitted = emit_triton(canonicalize(kernel), name="rows", hints={})
    groups = int(after.buffers["sums_total0"].nbytes) // (4 * COLUMNS)
    assert emitted.grid(emitted.configs[0]) == groups
    assert 132 <= groups <= 528


def test_what_only_the_sums_read_is_not_stored() -> None:
    before = program(("rows", backward(keep="xhat")), ("sums", sums(kept="xhat")))
    after = joined(before)
    assert totals(after, "rows") == 2
    assert "xhat" not in after.buffers
    for other in (("read", sum_of("xhat", by="other")), product("xhat", "out")):
        after = joined(program(("rows", backward(keep="xhat")), ("sums", sums(kept="xhat")), other))
        assert totals(after, "rows") == 2
        assert "xhat" in after.by_name["rows"].writes
    after = joined(program(("rows", backward(keep="out")), ("sums", sums(kept="out"))))
    assert "out" in after.by_name["rows"].writes


def test_the_bias_of_the_product_before_is_summed_too() -> None:
    before = program(
        ("rows", backward()), product("dx", "out"), ("sums", sums()), ("bias", sum_of("dx")),
    )  # fmt: skip
    after = joined(before)
    assert names(after) == ["rows", "sums", "bias", "out"]
    assert totals(after, "rows") == 3
    kernel = after.by_name["rows"].kernel  # type: ignore[union-attr]
    assert len({s.index for s in kernel.stores if s.mode is StoreMode.TOTAL}) == 1
    # reductions of what is left are split as ever, and nothing is merged with the rows again
    late = StoreAndReduce().run(SplitReductions().run(after))
    assert totals(late, "rows") == 3


def test_rows_of_several_pictures() -> None:
    batch = 33
    k = Builder((COLUMNS,), (batch, ROWS // batch))
    at = (R[0] * (ROWS // batch) + R[1]) * COLUMNS + X[0]
    k.store("dweight", X[0], k.reduce("sum", k.call("mul", k.load("dy", at), k.load("scale", R[0]))))
    given, sizes = (*GIVEN, "scale"), {"scale": batch}
    for second in (("sums", k.done()), ("sums", sum_of("dx")), ("sums", sums(kept="x"))):
        after = joined(program(("rows", pictures(batch)), second, sizes=sizes, given=given))
        assert totals(after, "rows") == (2 if len(after.outputs) == 3 else 1)
        emit_triton(canonicalize(after.by_name["rows"].kernel), name="rows", hints={})  # type: ignore[union-attr]


def test_no_more_sums_than_registers_hold() -> None:
    sources = [("bias", sum_of("dx")), ("second", sum_of("dx", "dthird", by="x")), ("third", sum_of("dx", "dfourth"))]
    sizes = {"dthird": COLUMNS, "dfourth": COLUMNS}
    after = joined(program(("rows", backward()), ("sums", sums()), *sources, sizes=sizes))
    assert totals(after, "rows") == 4
    assert "dx" in after.by_name["third"].reads


def test_what_is_made_between_is_waited_for_if_nobody_waits_for_the_rows() -> None:
    late = ("late", sum_of("dx", by="made"))
    waiting = program(("rows", backward()), product("other", "made"), late)
    assert names(joined(waiting)) == ["rows", "made", "late"]  # dx has another kernel's tensor beside it: one read more
    early = program(product("other", "dy"), ("rows", backward()), ("sums", sums()), given=("x", *GIVEN[2:]))
    assert names(joined(early)) == ["dy", "rows", "sums"]


def test_sums_wait_for_the_rows_whose_results_would_be_alive_earlier() -> None:
    before = program(("sums", sums()), product("other", "out"), ("rows", backward()))
    assert names(joined(before)) == ["out", "rows", "sums"]
    k = Builder((COLUMNS,))
    k.store("twice", X[0], k.call("add", k.load("dbias", X[0]), k.load("dbias", X[0])))
    reading = program(("sums", sums()), ("read", k.done()), ("rows", backward()), sizes={"twice": COLUMNS})
    assert RowTotals().run(reading) is reading


def test_neither_can_move_past_the_other() -> None:
    # the rows' result is called between, and the sums need what that makes
    k = Builder((COLUMNS,), (ROWS,))
    at = R[0] * COLUMNS + X[0]
    k.store("dfirst", X[0], k.reduce("sum", k.call("mul", k.load("dx", at), k.load("scale", X[0]))))
    views = [View(b, F32, (COLUMNS,), (1,)) for b in ("dx", "scale")]
    scale = Extern("scale", "aten.relu.default", (views[0],), (), (views[1],), Contract.FRESH, DEVICE)
    before = program(("rows", backward()), scale, ("late", k.done()), sizes={"scale": COLUMNS})
    assert RowTotals().run(before) is before


def test_sums_of_some_rows_are_left_alone() -> None:
    """The gradient of positions sums over the batch: rows that are not beside each other."""
    batch = 4
    k = Builder((ROWS // batch, COLUMNS), (batch,))
    at = (R[0] * (ROWS // batch) + X[0]) * COLUMNS + X[1]
    k.store("dfirst", X[0] * COLUMNS + X[1], k.reduce("sum", k.load("dx", at)))
    before = program(("rows", backward()), ("positions", k.done()), sizes={"dfirst": SIZE // batch})
    assert RowTotals().run(before) is before


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (1000, 512),  # the caches hold it
        (300, 8192),  # too long for registers
        (900, 2048),  # too few rows for each instance
    ],
)
def test_left_alone(rows: int, columns: int) -> None:
    sizes = {"mean": rows, "rstd": rows, **dict.fromkeys(("weight", "dweight", "dbias"), columns)}
    sizes |= dict.fromkeys(("dy", "x", "dx"), rows * columns)
    before = program(
        ("rows", backward(rows=rows, columns=columns)), ("sums", sums(rows=rows, columns=columns)), sizes=sizes
    )
    assert RowTotals().run(before) is before


def test_cpus_are_left_alone() -> None:
    before = program(("rows", backward()), ("sums", sums()))
    buffers = {n: replace(b, device="cpu") for n, b in before.buffers.items()}
    operations = tuple(replace(op, device="cpu") for op in before.operations)
    before = replace(before, buffers=buffers, operations=operations)
    assert RowTotals().run(before) is before


def test_each_group_of_rows_has_its_sums() -> None:
    after = joined(program(("rows", backward()), ("sums", sums())))
    kernel = after.by_name["rows"].kernel  # type: ignore[union-attr]
    (index,) = {s.index for s in kernel.stores if s.mode is StoreMode.TOTAL}
    (division,) = index.atoms(FloorDiv)
    assert -(-ROWS // int(division.args[1])) * COLUMNS * 4 == after.buffers["sums_total1"].nbytes


KINDS = st.lists(
    st.sampled_from(["rows", "again", "pictures", "sums", "dx", "xhat", "product", "call"]), min_size=2, max_size=7
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(KINDS, st.integers(1, 13).map(lambda n: 3 * n), st.integers(2, 12), st.integers(1, 12), st.booleans())
def test_any_kernels_in_any_order(kinds: list[str], rows: int, columns: int, instances: int, keep: bool) -> None:
    """Two kernels over rows, sums of what is given and of what they store, calls between: the same answers."""
    size = {"columns": columns, "rows": rows}
    stored = ["x"]
    operations: list[tuple[str, Kernel] | Extern] = []
    for k, kind in enumerate(kinds):
        latest, name = stored[-1], f"op{k}"
        if kind in ("rows", "again"):
            names = {"dx": f"dx{k}", "xhat": f"xhat{k}", "x": latest if kind == "again" else "x"}
            made = backward(keep="xhat" if keep else "", **size)
            operations.append((name, made.over(tuple(names.get(b, b) for b in made.buffers))))
            stored += [names["xhat"]] * keep + [names["dx"]]
        elif kind == "pictures":
            made = pictures(3, rows=rows, columns=columns)
            names = {"dx": f"dx{k}", "x": latest}
            operations.append((name, made.over(tuple(names.get(b, b) for b in made.buffers))))
            stored.append(names["dx"])
        elif kind == "sums":
            made = sums(kept=latest, **size)
            names = {"dweight": f"dweight{k}", "dbias": f"dbias{k}"}
            operations.append((name, made.over(tuple(names.get(b, b) for b in made.buffers))))
        elif kind == "call":
            views = [View(b, F32, (rows * columns,), (1,)) for b in (latest, f"made{k}")]
            call = Extern(name, "aten.relu.default", (views[0],), (), (views[1],), Contract.FRESH, DEVICE)
            operations.append(call)
            stored.append(f"made{k}")
        else:
            source = stored[-2] if kind == "xhat" and len(stored) > 1 else latest
            by = "dy" if kind == "product" else ""
            operations.append((name, sum_of(source, f"sum{k}", by=by, **size)))
    names = {b for op in operations if not isinstance(op, Extern) for b in op[1].buffers}
    sizes = {"mean": rows, "rstd": rows, "weight": columns, "scale": 3}
    sizes |= {b: columns if b.startswith(("dweight", "dbias", "sum")) else rows * columns for b in names - set(sizes)}
    sizes |= {op.results[0].buffer: rows * columns for op in operations if isinstance(op, Extern)}  # type: ignore[union-attr]
    limits = {"_INSTANCES": instances, "_LEAST_INSTANCES": 1, "_LEAST_ROWS": 1, "_LEAST_BYTES": 0, "_SUMS_PART": 1e6}
    with contextlib.ExitStack() as stack:
        for name, value in limits.items():
            stack.enter_context(mock.patch.object(row_totals, name, value))
        joined(program(*operations, sizes=sizes, given=(*GIVEN, "scale")))
