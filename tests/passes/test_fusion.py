"""Fusion of patterns that matter, its limits and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memplan.ir.index import FloorDiv, flat_index
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    IndexExpr,
    Kernel,
    Load,
    Node,
    Range,
    Reduce,
    Store,
    StoreMode,
    outer_symbol,
    row_symbol,
)
from memplan.ir.printing import format_kernel
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
from memplan.passes.cleanup import Cleanup, normalise
from memplan.passes.fuse_costs import Limits, row_is_contiguous
from memplan.passes.fuse_graph import FusionGraph
from memplan.passes.fuse_kernels import MergeRules, merge
from memplan.passes.fusion import Fuser, Fusion
from memplan.passes.narrowing import Narrowing
from memplan.passes.split_reductions import split
from tests.passes.test_fusion_generated import assert_same

F32 = torch.float32
X0, X1, X2, R0 = outer_symbol(0), outer_symbol(1), outer_symbol(2), row_symbol(0)


def pointwise(
    out: str, sizes: tuple[int, ...], loads: dict[str, IndexExpr], op: str, at: IndexExpr | None = None
) -> KernelOp:
    """``out[at] = op(loads...)`` over ranges ``x0, x1, ...``."""
    symbols = [outer_symbol(k) for k in range(len(sizes))]
    strides = [1] * len(sizes)
    for k in range(len(sizes) - 2, -1, -1):
        strides[k] = strides[k + 1] * sizes[k + 1]
    nodes: list[Node] = [Load(b, e, F32) for b, e in loads.items()]
    nodes.append(Call(op, tuple(range(len(loads))), F32))
    index = flat_index(symbols, strides) if at is None else at
    ranges = tuple(Range(s, n) for s, n in zip(symbols, sizes, strict=True))
    return KernelOp(out, Kernel(ranges, (), tuple(nodes), (Store(out, index, len(loads), F32),)), "cpu")


def reduction(out: str, rows: int, length: int, source: str, index: IndexExpr, op: str = "sum") -> KernelOp:
    nodes = (Load(source, index, F32), Reduce(op, (0,), F32))  # type: ignore[arg-type]
    return KernelOp(out, Kernel((Range(X0, rows),), (Range(R0, length),), nodes, (Store(out, X0, 1, F32),)), "cpu")


def program(
    operations: list[Operation], sizes: dict[str, int], outputs: tuple[str, ...], mutated: tuple[str, ...] = ()
) -> Program:
    """``sizes`` in elements; what nobody writes is an input."""
    written = {b for op in operations for b in op.writes}
    buffers, inputs = {}, []
    for name, n in sizes.items():
        kind = BufferKind.TEMPORARY if name in written else BufferKind.INPUT
        kind = BufferKind.OUTPUT if name in outputs and name in written else kind
        buffers[name] = Buffer(name, 4 * n, F32, "cpu", kind)
        if kind is BufferKind.INPUT:
            inputs.append(TensorInput(len(inputs), View(name, F32, (n,), (1,))))
    views = tuple(View(o, F32, (sizes[o],), (1,)) for o in outputs)
    return Program("p", Phase.INFERENCE, buffers, tuple(operations), tuple(inputs), views)


def fused(before: Program, **options: int) -> Program:
    """The fused program, verified, and checked to mean the same and to need no more."""
    after = Fusion(**options).run(Cleanup().run(before))
    verify_program(after)
    assert_same(before, after)
    assert FusionGraph(after).live.max() <= FusionGraph(before).live.max()
    return after


def extern(out: str, source: str, n: int) -> Extern:
    view = View(source, F32, (n,), (1,))
    return Extern(out, "aten.relu.default", (view,), (), (View(out, F32, (n,), (1,)),), Contract.FRESH, "cpu")


def softmax() -> Program:
    return program(
        [
            reduction("m", 4, 8, "a", 8 * X0 + R0, "max"),
            pointwise("s", (4, 8), {"a": 8 * X0 + X1, "m": X0}, "sub"),
            pointwise("e", (32,), {"s": X0}, "exp"),
            reduction("t", 4, 8, "e", 8 * X0 + R0),
            pointwise("o", (32,), {"e": X0, "t": FloorDiv(X0, 8)}, "div"),
        ],
        {"a": 32, "m": 4, "s": 32, "e": 32, "t": 4, "o": 32},
        ("o",),
    )


def test_softmax_is_one_kernel() -> None:
    (op,) = fused(softmax()).operations
    assert isinstance(op, KernelOp)
    assert format_kernel(op.kernel).splitlines() == [
        "for x0 < 4 | r0 < 8:",
        "  v0 <- a[r0 + 8*x0] : f32",
        "  v1 = reduce_max(v0) : f32",
        "  v2 <- sub(v0, v1) : f32",
        "  v3 <- exp(v2) : f32",
        "  v4 = reduce_sum(v3) : f32",
        "  v5 <- div(v3, v4) : f32",
        "  o[r0 + 8*x0] = v5 : f32",
    ]


def test_outputs_stay_stored() -> None:
    before = softmax()
    view = View("e", F32, (32,), (1,))
    buffers = {**before.buffers, "e": replace(before.buffers["e"], kind=BufferKind.SAVED)}
    (op,) = fused(replace(before, buffers=buffers, outputs=(*before.outputs, view))).operations
    assert op.writes == ("e", "o")


def test_cat_parts_are_written_by_their_producers() -> None:
    after = fused(
        program(
            [
                pointwise("p", (4,), {"a": X0}, "exp"),
                pointwise("q", (2,), {"a": X0}, "neg"),
                pointwise("c", (4,), {"p": X0}, "abs", X0),
                replace(pointwise("c", (2,), {"q": X0}, "abs", X0 + 4), name="c2"),
            ],
            {"a": 4, "p": 4, "q": 2, "c": 6},
            ("c",),
        )
    )
    assert [op.writes for op in after.operations] == [("c",), ("c",)]
    assert set(after.buffers) == {"a", "c"}


def test_transposed_consumer_follows_its_producer() -> None:
    after = fused(
        program(
            [pointwise("p", (4, 8), {"a": 8 * X0 + X1}, "exp"), pointwise("o", (8, 4), {"p": 8 * X1 + X0}, "neg")],
            {"a": 32, "p": 32, "o": 32},
            ("o",),
        )
    )
    assert len(after.operations) == 1


def test_a_third_between_keeps_two_apart() -> None:
    after = fused(
        program(
            [
                pointwise("p", (32,), {"a": X0}, "exp"),
                extern("e", "p", 32),
                pointwise("o", (32,), {"p": X0, "e": X0}, "add"),
            ],
            {"a": 32, "p": 32, "e": 32, "o": 32},
            ("o",),
        )
    )
    assert [op.name for op in after.operations] == ["p", "e", "o"]


def test_reads_stay_before_a_mutation() -> None:
    """``p`` reads ``a`` shifted before ``a`` changes: neither merged with the change nor replayed behind it."""
    change = replace(pointwise("a", (4,), {"b": X0}, "neg"), name="change", mutates=("a",))
    after = fused(
        program(
            [pointwise("p", (4,), {"a": 3 - X0}, "exp"), change, pointwise("o", (4,), {"p": X0, "b": X0}, "add")],
            {"a": 4, "b": 4, "p": 4, "o": 4},
            ("o",),
        )
    )
    names = [op.name for op in after.operations]
    assert names.index("change") > 0 or "p" not in names
    assert len(names) == 2, "p and o are one, the change is alone"


def test_no_store_beside_a_load_of_the_same_buffer_along_a_row() -> None:
    """A kernel that passes over its row again would read what it has already overwritten."""
    total = reduction("t", 4, 8, "a", 8 * X0 + R0).kernel
    scaled = pointwise("a", (32,), {"a": X0, "t": FloorDiv(X0, 8)}, "div").kernel
    assert merge(total, scaled, MergeRules(frozenset({"a"}), frozenset({"t"}))) is None
    assert merge(total, pointwise("o", (32,), {"a": X0, "t": FloorDiv(X0, 8)}, "div").kernel) is not None


def test_atomics_into_a_fresh_buffer_wait_for_its_zeros() -> None:
    zeros = Kernel((Range(X0, 4),), (), (Constant(0.0, F32),), (Store("z", X0, 0, F32),))
    add = Kernel((Range(X0, 4),), (), (Load("a", X0, F32),), (Store("z", 3 - X0, 0, F32, StoreMode.ADD),))
    assert merge(zeros, add, MergeRules(changed=frozenset({"z"}))) is None


def test_rows_and_columns_of_a_square_stay_apart() -> None:
    after = fused(
        program(
            [reduction("r", 8, 8, "a", 8 * X0 + R0), reduction("c", 8, 8, "a", 8 * R0 + X0)],
            {"a": 64, "r": 8, "c": 8},
            ("r", "c"),
        )
    )
    assert len(after.operations) == 2


def test_siblings_read_once() -> None:
    after = fused(
        program(
            [reduction("r", 8, 4, "a", 4 * X0 + R0), reduction("c", 8, 4, "a", 4 * X0 + R0, "max")],
            {"a": 32, "r": 8, "c": 8},
            ("r", "c"),
        )
    )
    (op,) = after.operations
    assert isinstance(op, KernelOp)
    assert len(op.kernel.loads) == 1


def test_a_batch_norms_result_is_made_in_its_readers() -> None:
    numbers = {n: FloorDiv(X0, 64) for n in ("mean", "rstd", "weight", "bias")}
    before = program(
        [
            pointwise("n", (512,), {"x": X0, **numbers}, "add5"),
            reduction("u", 8, 64, "n", 64 * X0 + R0),
            reduction("v", 64, 8, "n", X0 + 64 * R0),
        ],
        {"x": 512, **dict.fromkeys(numbers, 8), "n": 512, "u": 8, "v": 64},
        ("u", "v"),
    )
    before = replace(before, operations=tuple(map(_summed, before.operations)))
    after = fused(before)
    assert [op.name for op in after.operations] == ["u", "v"]


def _summed(op: Operation) -> Operation:
    """ "add5" as calls of two operands."""
    if not isinstance(op, KernelOp) or op.name != "n":
        return op
    kernel = op.kernel
    loads = [n for n in kernel.nodes if isinstance(n, Load)]
    nodes: list[Node] = [*loads, Call("add", (0, 1), F32)]
    for k in range(2, len(loads)):
        nodes.append(Call("add", (len(nodes) - 1, k), F32))
    (store,) = kernel.stores
    return replace(op, kernel=replace(kernel, nodes=tuple(nodes), stores=(replace(store, value=len(nodes) - 1),)))


def test_what_something_was_inlined_into_is_inlined_in_its_turn() -> None:
    # s and t have two readers each, which are no kernels that could be one
    before = program(
        [
            pointwise("s", (64,), {"a": X0, "b": X0}, "mul"),
            pointwise("t", (64,), {"s": X0, "c": X0}, "sub"),
            reduction("u", 8, 8, "t", 8 * X0 + R0),
            reduction("v", 8, 8, "t", X0 + 8 * R0),
        ],
        {"a": 64, "b": 64, "c": 64, "s": 64, "t": 64, "u": 8, "v": 8},
        ("u", "v"),
    )
    for phase, left in ((Phase.FORWARD, ["u", "v"]), (Phase.INFERENCE, ["t", "u", "v"])):
        fuser = Fuser(replace(before, phase=phase), Limits(24, 200, before.hints))
        fuser.inline_all(trivial=False)
        after = before.with_operations(tuple(fuser.graph.operations()))
        assert [op.name for op in after.operations] == left
        assert_same(before, after)


def test_memory_refuses_a_sibling_that_raises_the_peak() -> None:
    """``early`` and ``late`` read the same; made together, ``late``'s large result would live through the peak."""
    operations: list[Operation] = [
        pointwise("early", (64,), {"a": X0}, "exp"),
        pointwise("wide", (64, 64), {"early": X1, "w": 64 * X0 + X1}, "add"),
        extern("f", "wide", 4096),
        extern("g", "f", 4096),
        reduction("h", 64, 64, "g", 64 * X0 + R0),
        pointwise("late", (64,), {"a": X0}, "neg"),
        extern("k", "late", 64),
        pointwise("o", (64,), {"h": X0, "k": X0}, "add"),
    ]
    sizes = {"a": 64, "early": 64, "wide": 4096, "w": 4096, "f": 4096, "g": 4096, "h": 64, "late": 64, "k": 64, "o": 64}
    after = fused(program(operations, sizes, ("o",)))
    assert "late" in [op.name for op in after.operations], "alone, where it is needed"


@pytest.mark.parametrize(("most", "count"), [(3, 2), (24, 1)])
def test_number_of_buffers_is_bounded(most: int, count: int) -> None:
    operations: list[Operation] = [
        pointwise("p", (4,), {"a": X0, "b": X0}, "add"),
        pointwise("o", (4,), {"p": X0, "c": X0}, "add"),
    ]
    before = program(operations, dict.fromkeys("abcpo", 4), ("o",))
    assert len(fused(before, max_buffers=most).operations) == count


def test_same_program_same_result() -> None:
    assert Fusion().run(softmax()) == Fusion().run(softmax())


def test_normalise_collapses_and_splits() -> None:
    kernel = pointwise("o", (2, 3, 4), {"a": 12 * X0 + 4 * X1 + X2}, "neg").kernel
    assert [r.size for r in normalise(kernel).outer] == [24]
    bias = Kernel(
        (Range(X0, 24),),
        (),
        (Load("a", X0, F32), Load("b", X0 - 8 * FloorDiv(X0, 8), F32), Call("add", (0, 1), F32)),
        (Store("o", X0, 2, F32),),
    )
    assert [r.size for r in normalise(bias).outer] == [3, 8]
    single = reduction("o", 1, 8, "a", R0).kernel
    assert normalise(single).outer == ()
    assert normalise(reduction("o", 3, 1, "a", X0).kernel).row != ()


def test_outer_ranges_follow_memory() -> None:
    """Channels last, iterated in the order of the sizes: the channel becomes the innermost range, then all is one."""
    at = 96 * X0 + X1 + 8 * X2
    kernel = pointwise("o", (2, 8, 12), {"a": at}, "neg", at).kernel
    assert [r.size for r in normalise(kernel).outer] == [192]
    with_bias = pointwise("o", (2, 8, 12), {"a": at, "b": X1}, "add", at).kernel
    assert [r.size for r in normalise(with_bias).outer] == [24, 8]


def test_epilogue_of_a_strided_reduction() -> None:
    after = fused(
        program(
            [reduction("s", 4, 8, "a", 4 * R0 + X0), pointwise("o", (4,), {"s": X0}, "exp")],
            {"a": 32, "s": 4, "o": 4},
            ("s", "o"),
        )
    )
    assert len(after.operations) == 1


def column_sum(out: str, rows: int, columns: int, loads: dict[str, IndexExpr], op: str = "") -> KernelOp:
    """``out[x] = sum over r of op(loads...)``, the columns contiguous."""
    nodes: list[Node] = [Load(b, e, F32) for b, e in loads.items()]
    if op:
        nodes.append(Call(op, tuple(range(len(loads))), F32))
    nodes.append(Reduce("sum", (len(nodes) - 1,), F32))
    stores = (Store(out, X0, len(nodes) - 1, F32),)
    return KernelOp(out, Kernel((Range(X0, columns),), (Range(R0, rows),), tuple(nodes), stores), "cpu")


def test_column_sums_of_one_gradient_are_one_kernel() -> None:
    """As LayerNorm's weight and bias: values for each row that one of them loads do not make it a row-wise kernel."""
    at = 8 * R0 + X0
    after = fused(
        program(
            [
                column_sum("weight", 64, 8, {"g": at, "mean": R0, "scale": R0}, "fma"),
                column_sum("bias", 64, 8, {"g": at}),
            ],
            {"g": 512, "mean": 64, "scale": 64, "weight": 8, "bias": 8},
            ("weight", "bias"),
        )
    )
    assert len(after.operations) == 1


def test_a_column_sum_is_split_though_it_loads_along_its_row() -> None:
    whole = column_sum("o", 4096, 8, {"g": 8 * R0 + X0, "mean": R0, "scale": R0}, "fma")
    assert not row_is_contiguous(whole.kernel)
    parts = split(replace(whole, device="cuda:0"), {}, least_elements=0)
    assert parts is not None
    assert parts[0].kernel.outer[0].size == 64


def converting(out: str, source: str, index: IndexExpr, *, also_plain: bool = False) -> KernelOp:
    """``out = float(bfloat16(source)) + 1`` (or plus the source as it is)."""
    one: Node = Load(source, index, F32) if also_plain else Constant(1.0, F32)
    nodes: tuple[Node, ...] = (Load(source, index, F32), Cast(0, torch.bfloat16), Cast(1, F32), one)
    nodes += (Call("add", (2, 3), F32),)
    return KernelOp(out, Kernel((Range(X0, 32),), (), nodes, (Store(out, X0, 4, F32),)), "cpu")


def test_what_all_readers_round_is_stored_rounded() -> None:
    operations: list[Operation] = [pointwise("t", (32,), {"a": X0}, "exp"), converting("o", "t", X0)]
    operations += [converting("q", "t", 31 - X0)]
    sizes = {"a": 32, "t": 32, "o": 32, "q": 32}
    before = program(operations, sizes, ("o", "q"))
    after = Narrowing().run(before)
    verify_program(after)
    assert_same(before, after)
    assert after.buffers["t"].dtype is torch.bfloat16
    assert after.buffers["t"].nbytes == 64
    reader = after.operations[1]
    assert isinstance(reader, KernelOp)
    assert Cast(0, torch.bfloat16) not in reader.kernel.nodes


@pytest.mark.parametrize("reason", ["output", "read as it is", "read by a call"])
def test_what_somebody_needs_unrounded_stays(reason: str) -> None:
    operations: list[Operation] = [pointwise("t", (32,), {"a": X0}, "exp"), converting("o", "t", X0)]
    operations += [converting("q", "t", 31 - X0, also_plain=reason == "read as it is")]
    operations += [extern("r", "t", 32)] if reason == "read by a call" else []
    sizes = {"a": 32, "t": 32, "o": 32, "q": 32, "r": 32}
    outputs = ("o", "q", *(("t",) if reason == "output" else ()), *(("r",) if reason == "read by a call" else ()))
    before = program(operations, sizes, outputs)
    assert Narrowing().run(before) is before


def test_a_stored_literal_becomes_a_literal_in_every_reader() -> None:
    """Also where its store could not be solved for the element that a reader wants."""
    sevens = Kernel((Range(X0, 8),), (), (Constant(7.0, F32),), (Store("c", X0 + FloorDiv(X0, 9), 0, F32),))
    operations: list[Operation] = [
        KernelOp("c", sevens, "cpu"),
        pointwise("o", (8,), {"a": X0, "c": 7 - X0}, "add"),
        reduction("s", 4, 2, "c", 2 * X0 + R0),
        extern("r", "a", 8),
        pointwise("q", (8,), {"r": X0, "c": X0}, "mul"),
    ]
    after = fused(program(operations, dict.fromkeys(("a", "c", "o", "r", "q"), 8) | {"s": 4}, ("o", "s", "q")))
    assert "c" not in after.buffers


def test_running_statistics_join_their_reduction() -> None:
    """The running sum is read and written once a row, by the instance that has reduced it."""
    update = replace(pointwise("run", (4,), {"run": X0, "s": X0}, "add"), name="update", mutates=("run",))
    operations: list[Operation] = [reduction("s", 4, 8, "a", 8 * X0 + R0), update]
    after = fused(program(operations, {"a": 32, "s": 4, "run": 4}, ("s",)))
    assert len(after.operations) == 1
    assert after.operations[0].mutates == ("run",)


def test_running_statistics_that_the_row_depends_on_stay_apart() -> None:
    centred = pointwise("d", (4, 8), {"a": 8 * X0 + X1, "run": X0}, "sub")
    update = replace(pointwise("run", (4,), {"run": X0, "s": X0}, "add"), name="update", mutates=("run",))
    operations: list[Operation] = [centred, reduction("s", 4, 8, "d", 8 * X0 + R0), update]
    after = fused(program(operations, {"a": 32, "d": 32, "s": 4, "run": 4}, ("s", "d")))
    assert len(after.operations) == 2
