"""Clone elimination: what functionalisation made of mutation is mutation again, and only where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree

from memplan.capture.fx import HigherOrderCall, capture
from memplan.ir.config import Config
from memplan.ir.program import BufferKind, Contract, Copy, Extern, Phase, Program, TensorInput, View
from memplan.ir.verify import verify_program
from memplan.lowering.decompositions import decomposition_table
from memplan.lowering.lower import lower_program
from memplan.passes.pipeline import run_pipeline
from memplan.passes.reinplace import Reinplace
from tests.program_runner import copy_inputs, make_inputs, run_program
from tests.programs import F32, ProgramBuilder, fill_kernel

I64 = torch.int64


def reinplaced(program: Program, *, inputs: Sequence[object] | None = None) -> Program:
    """The pass's result, verified and run against the program as it was: outputs and mutated inputs are equal."""
    verify_program(program)
    after = Reinplace().run(program)
    verify_program(after)
    given = list(inputs) if inputs is not None else make_inputs(program)
    first, second = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, first), run_program(after, second)
    donated = {i.position for i in program.inputs if isinstance(i, TensorInput) and _dies(program, i)}
    kept = [[v for k, v in enumerate(values) if k not in donated] for values in (first, second)]
    for a, b in zip([*expected, *kept[0]], [*found, *kept[1]], strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)
    return after


def _dies(program: Program, item: TensorInput) -> bool:
    return program.buffers[item.view.buffer].donated


def names(program: Program) -> list[str]:
    return [op.name for op in program.operations]


def notes(program: Program) -> str:
    return "\n".join(f"{name}: {text}" for name, text in program.notes)


def captured(function: Callable[..., object], *inputs: torch.Tensor, lower: bool) -> tuple[Program, list[object]]:
    """The one inference graph of a function, as torch functionalises it, and the inputs that it is given."""
    found: list[Program] = []
    given: list[list[object]] = []

    def compiler(module: torch.fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        found.append(capture(module, Phase.INFERENCE, name="captured"))

        def boxed(args: list[object]) -> object:
            given.append(copy_inputs(args))
            return module.forward(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    table = decomposition_table(Config()) if lower else None
    backend = aot_autograd(
        fw_compiler=compiler, inference_compiler=compiler, decompositions=table, keep_inference_input_mutations=True
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*copy_inputs(inputs))
    (program,) = found
    return lower_program(program, Config()) if lower else program, given[0]


def memory(program: Program) -> int:
    """Bytes of everything that the program makes."""
    kinds = {BufferKind.TEMPORARY, BufferKind.OUTPUT}
    return sum(program.nbytes(b.name) for b in program.buffers.values() if b.kind in kinds)


# -- real graphs ------------------------------------------------------------------------------------------------------


def fill_cache(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache[:, position] = new
    return cache.sum(1)


def assign_slice(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache[:, 2:3].copy_(new)
    cache[:, 5:6] = new * 2
    return cache * position


def scatter(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache.scatter_add_(1, position.view(1, 1, 1).expand(2, 1, 4), new)
    return cache.clone()


def statistics(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    mean, variance = cache[0, 0], cache[1, 0]
    out = torch.nn.functional.batch_norm(new.reshape(2, 4), mean, variance, training=True)
    return out + position


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("function", [fill_cache, assign_slice, scatter, statistics])
def test_functionalised_graphs(function: Callable[..., object], lower: bool) -> None:
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(function, *inputs, lower=lower)
    after = reinplaced(program, inputs=given)
    cache = program.nbytes("arg0_1")
    copies = sum(b.nbytes == cache for b in program.buffers.values())
    left = sum(b.nbytes == cache for b in after.buffers.values())
    if function is fill_cache or (lower and function in (assign_slice, scatter)):
        assert copies > left, "no clone of the cache was avoided"
        assert "arg0_1" in {b for op in after.operations for b in op.mutates}
        assert memory(after) <= memory(program) - cache


def test_a_cache_is_filled_without_a_copy_of_it() -> None:
    """index_put into an input: no clone, no copy back, however the graph is captured."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    for lower in (False, True):
        program, given = captured(fill_cache, *inputs, lower=lower)
        after = reinplaced(program, inputs=given)
        assert len(after.operations) == 2
        assert after.operations[0].mutates == ("arg0_1",)


def test_slices_are_copied_alone() -> None:
    """Lowered slice assignment writes the slice, not the whole cache."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(assign_slice, *inputs, lower=True)
    after = reinplaced(program, inputs=given)
    changing = [op for op in after.operations if "arg0_1" in op.mutates]
    assert len(changing) == 2
    for op in changing:
        points = 1
        for r in op.kernel.outer:  # type: ignore[union-attr]
            points *= int(r.size)
        assert points == 8


@torch.library.custom_op("memplan_tests::scale_both_", mutates_args={"x", "y"})
def scale_both_(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> None:
    x.mul_(s)
    y.add_(s)


@torch.library.custom_op("memplan_tests::fill_and_double", mutates_args={"out"})
def fill_and_double(out: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    out.copy_(s)
    return s * 2


@fill_and_double.register_fake
def _(out: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(s)


def custom_operators(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    t = x + 1
    scale_both_(t, y[1], s)
    r = fill_and_double(y[2], s)
    return t, r


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_custom_operators_change_their_arguments(version: int, lower: bool) -> None:
    import torch._inductor.config as switches

    inputs = (torch.randn(4), torch.randn(3, 4), torch.randn(4))
    with switches.patch(enable_auto_functionalized_v2=version == 2):
        program, given = captured(custom_operators, *inputs, lower=lower)
    kind = "auto_functionalized_v2" if version == 2 else "auto_functionalized"
    assert any(isinstance(op, Extern) and op.target.startswith(f"callable:{kind}") for op in program.operations)
    after = reinplaced(program, inputs=given)
    targets = [op.target for op in after.operations if isinstance(op, Extern)]
    assert "memplan_tests.scale_both_.default" in targets
    assert "memplan_tests.fill_and_double.default" in targets
    if version == 2:
        assert not any(isinstance(op, Copy) for op in after.operations)
        assert not any(b.nbytes == 48 and b.kind is BufferKind.TEMPORARY for b in after.buffers.values())


def test_foreach_updates_its_list() -> None:
    def update(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> None:
        torch._foreach_add_([a, b], [g, g], alpha=-0.5)

    inputs = (torch.randn(4), torch.randn(4), torch.randn(4))
    program, given = captured(update, *inputs, lower=False)
    after = reinplaced(program, inputs=given)
    (op,) = after.operations
    assert isinstance(op, Extern)
    assert op.target == "aten._foreach_add_.List"
    assert op.mutates == ("arg0_1", "arg1_1")


def test_the_source_of_a_clone_read_by_the_operation_that_changes_it() -> None:
    """``y = x.clone(); op(y, x)`` must not become ``op(x, x)``."""

    def put(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 1.5
        y = x.clone()
        y.index_put_((index,), x[2:4])
        return (y,)  # type: ignore[return-value]

    inputs = (torch.randn(4, 4), torch.tensor([2, 3]).flip(0))
    for lower in (False, True):
        program, given = captured(put, *inputs, lower=lower)
        after = reinplaced(program, inputs=given)
        assert "clone" in names(after)
        assert "'index_put'" in notes(after)
        assert "uses 'mul' as it was" in notes(after)


# -- by hand ----------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """``t = index_put(x, [i], v)`` and what a test adds."""

    p: ProgramBuilder
    x: View
    i: View
    v: View

    @classmethod
    def new(cls, kind: BufferKind = BufferKind.INPUT, *, donated: bool = False) -> Cache:
        p = ProgramBuilder()
        x = p.input("x", (8, 4), kind=kind, donated=donated)
        return cls(p, x, p.input("i", (2,), dtype=I64), p.input("v", (2, 4)))

    def put(self, name: str, base: View, values: View | None = None) -> View:
        arguments = (base, [self.i], values or self.v)
        return self.p.extern(name, "aten.index_put.default", arguments, base.sizes)


def test_chain_of_updates_of_an_input() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", a)
    b = c.put("b", a)
    c.p.copy("back", b, c.x)
    after = reinplaced(c.p.program(y))
    assert names(after) == ["a", "y", "b"]
    assert all(op.mutates == ("x",) for op in after.operations if op.name != "y")
    assert after.operations[1].reads == ("x",)


def test_a_reader_of_the_old_value_keeps_the_clone() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", c.x)
    c.p.copy("back", a, c.x)
    program = c.p.program(y)
    after = reinplaced(program)
    assert names(after) == names(program)
    assert "a: the clone of 'x' stays: 'y' (model.py:2) uses 'x' as it was" in notes(after)


def test_an_earlier_reader_does_not() -> None:
    c = Cache.new()
    y = c.p.pointwise("y", "neg", c.x)
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    assert names(reinplaced(c.p.program(y))) == ["y", "a"]


def test_values_from_an_overlapping_view_keep_the_clone() -> None:
    c = Cache.new()
    a = c.put("a", c.x, View("x", F32, (2, 4), (4, 1), 4))
    c.p.copy("back", a, c.x)
    after = reinplaced(c.p.program())
    assert "'a' (model.py:1) uses 'x' as it was" in notes(after)


def test_an_input_that_is_not_changed_is_not_changed() -> None:
    c = Cache.new()
    after = reinplaced(c.p.program(c.put("a", c.x)))
    assert "is returned, and may not be the caller's" in notes(after)
    c = Cache.new()
    after = reinplaced(c.p.program(c.p.pointwise("y", "neg", c.put("a", c.x))))
    assert "the caller keeps 'x', which is not changed" in notes(after)


def test_constants_are_not_changed() -> None:
    p = ProgramBuilder()
    k = p.buffer("k", (8, 4), BufferKind.CONSTANT)
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (k, [i], v), (8, 4))
    program = replace(p.program(p.pointwise("y", "neg", a)), constants={"k": torch.randn(8, 4)})
    assert "'k' is a constant" in notes(reinplaced(program))


def test_donated_inputs_and_temporaries_are_changed() -> None:
    c = Cache.new(donated=True)
    after = reinplaced(c.p.program(c.p.pointwise("y", "neg", c.put("a", c.x))))
    assert names(after) == ["a", "y"]
    c = Cache.new()
    t = c.p.pointwise("t", "neg", c.x)
    after = reinplaced(c.p.program(c.put("a", t)))
    assert names(after) == ["t", "a"]
    assert [o.buffer for o in after.outputs if isinstance(o, View)] == ["t"]
    assert after.buffers["t"].kind is BufferKind.OUTPUT


def test_a_temporary_that_is_returned_keeps_its_value() -> None:
    c = Cache.new()
    t = c.p.pointwise("t", "neg", c.x)
    after = reinplaced(c.p.program(c.put("a", t), t))
    assert "'t' is returned as it was" in notes(after)


def test_the_new_value_used_when_the_input_changes_again() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    c.p.kernel("fill", fill_kernel(c.x, 0.0), mutates=("x",))
    y = c.p.pointwise("y", "neg", a)
    assert "'a' is still used when 'fill' (model.py:3) changes 'x'" in notes(reinplaced(c.p.program(y)))


def test_the_clone_changed_after_it_was_copied_back() -> None:
    c = Cache.new()
    a = c.put("a", c.x)
    c.p.copy("back", a, c.x)
    c.p.kernel("fill", fill_kernel(a, 0.0), mutates=("a",))
    y = c.p.pointwise("y", "neg", a)
    assert "'fill' (model.py:3) changes 'a' after it was copied back" in notes(reinplaced(c.p.program(y)))


def test_overwritten_by_something_else() -> None:
    """The input's bytes are free until it is overwritten in full; not if the clone is still used then."""
    c = Cache.new()
    a = c.put("a", c.x)
    y = c.p.pointwise("y", "neg", a)
    c.p.copy("back", y, c.x)
    assert names(reinplaced(c.p.program())) == ["a", "y", "back"]
    z = c.p.pointwise("z", "neg", a)
    assert "'a' is still used when 'back'" in notes(reinplaced(c.p.program(z)))
    c = Cache.new()
    a = c.put("a", c.x)
    half = View("a", F32, (4, 4), (4, 1))
    c.p.copy("back", half, View("x", F32, (4, 4), (4, 1), 16))
    assert "copies it back to another place" in notes(reinplaced(c.p.program(c.p.pointwise("y", "neg", a))))


def test_every_other_row_overwritten_is_not_all_of_it() -> None:
    """The rows in between keep what the caller had there: the clone, which changes them, stays."""
    p = ProgramBuilder()
    x, i, v = p.input("x", (5, 4)), p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (x, [i], v), (5, 4))
    y = p.pointwise("y", "neg", a)
    every_other = View("x", F32, (3, 4), (8, 1))
    p.copy("back", View("y", F32, (3, 4), (4, 1)), every_other)
    assert "'back' (model.py:3) writes a part of 'x'" in notes(reinplaced(p.program(y)))


def test_a_row_of_an_input() -> None:
    """``x[3].index_put_(...)``: the clone of the row, changed, copied back to the row."""
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    row = View("x", F32, (4,), (1,), 12)
    a = p.extern("a", "aten.index_put.default", (row, [i], v), (4,))
    p.copy("back", a, row)
    y = p.pointwise("y", "neg", a)
    after = reinplaced(p.program(y))
    assert names(after) == ["a", "y"]
    changed = after.operations[0]
    assert isinstance(changed, Extern)
    assert changed.args[0] == row


def test_a_column_of_an_input() -> None:
    """The clone is dense, the column is not: every access gets the column's stride."""
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    column = View("x", F32, (8,), (4,), 1)
    a = p.extern("a", "aten.index_put.default", (column, [i], v), (8,))
    y = p.pointwise("y", "neg", View("a", F32, (2, 2), (4, 2), 1))
    p.copy("back", a, column)
    after = reinplaced(p.program(y))
    assert names(after) == ["a", "y"]
    assert after.operations[0].args[0] == column  # type: ignore[union-attr]


def test_a_part_of_a_temporary_is_cloned() -> None:
    """A row that outlives a large temporary would keep all of it."""
    p = ProgramBuilder()
    x = p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2,))
    p.pointwise("t", "neg", x)
    a = p.extern("a", "aten.index_put.default", (View("t", F32, (4,), (1,), 12), [i], v), (4,))
    assert "it is a part of 't', which would be kept for it" in notes(reinplaced(p.program(a)))


def test_a_clone_that_is_only_read_is_left_to_fusion() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    t = p.pointwise("t", "neg", x)
    c = p.extern("c", "aten.clone.default", (t,), (4, 4))
    program = p.program(p.pointwise("y", "neg", c))
    after = reinplaced(program)
    assert after is program


def test_clone_in_another_layout() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    p.pointwise("t", "neg", x)
    p.buffer("c", (4, 4))
    c = View("c", F32, (4, 4), (1, 4))
    p.extern("c", "aten.clone.default", (View("t", F32, (4, 4), (4, 1)),), result=c)
    p.kernel("fill", fill_kernel(View("c", F32, (4,), (1,)), 0.0), mutates=("c",))
    after = reinplaced(p.program(p.pointwise("y", "neg", c)))
    assert names(after) == ["t", "fill", "y"]


def test_reshaped_use_that_the_old_place_cannot_show() -> None:
    p = ProgramBuilder()
    p.input("x", (8, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 2))
    half = View("x", F32, (8, 2), (4, 1))
    a = p.extern("a", "aten.index_put.default", (half, [i], v), (8, 2))
    flat = p.extern("flat", "aten.neg.default", (View("a", F32, (16,), (1,)),), (16,))
    p.copy("back", a, half)
    assert "uses it in a layout that 'x' does not have" in notes(reinplaced(p.program(flat)))


def test_symbolic_sizes() -> None:
    p = ProgramBuilder()
    s = p.symbol("s0", 6)
    x = p.input("x", (s, 4))
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    a = p.extern("a", "aten.index_put.default", (x, [i], v), (s, 4))
    p.copy("back", a, x)
    assert names(reinplaced(p.program())) == ["a"]


def test_in_place_collective() -> None:
    p = ProgramBuilder()
    t = p.pointwise("t", "neg", p.input("x", (4,)))
    r = p.extern("r", "_c10d_functional.all_reduce.default", (t, "sum", "0"), (4,), effect=True)
    after = Reinplace().run(p.program(r))
    verify_program(after)
    op = after.operations[-1]
    assert isinstance(op, Extern)
    assert (op.target, op.mutates) == ("_c10d_functional.all_reduce_.default", ("t",))


def test_a_users_triton_kernel_changes_its_tensors() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import (
        triton_kernel_wrapper_functional,
        triton_kernel_wrapper_mutation,
    )

    p = ProgramBuilder()
    x, y = p.input("x", (4,)), p.input("y", (4,))
    t = p.pointwise("t", "neg", x)
    keywords = {
        "kernel_idx": 0, "constant_args_idx": 0, "grid": [(1,)], "tma_descriptor_metadata": {},
        "kwargs": {"a": "x", "out": "t"}, "tensors_to_clone": ["out"],
    }  # fmt: skip
    leaves, spec = pytree.tree_flatten(((), keywords))
    slots = (leaves.index("x"), leaves.index("t"))
    template = tuple(None if k in slots else v for k, v in enumerate(leaves))
    call = HigherOrderCall(triton_kernel_wrapper_functional, template, spec, slots, (0, 0))
    r = p.extern("r", "callable:r", (y, t), (4,))
    program = replace(p.program(r), callables={"r": call})
    after = Reinplace().run(program)
    verify_program(after)
    op = after.operations[-1]
    assert isinstance(op, Extern)
    assert (op.contract, op.mutates, op.args) == (Contract.MUTATE, ("t",), (y, t))
    made = after.callables[op.target.removeprefix("callable:")]
    assert isinstance(made, HigherOrderCall)
    assert made.operator is triton_kernel_wrapper_mutation
    restored = list(made.template)
    for slot, value in zip(made.slots, ("y", "t"), strict=True):
        restored[slot] = value
    _, given = pytree.tree_unflatten(restored, made.spec)
    assert given["kwargs"] == {"a": "y", "out": "t"}
    assert "tensors_to_clone" not in given


Step = tuple[str, int, int]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "clone_fill", "neg", "row", "back", "backrow", "add"]),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=9,
    ),
    st.booleans(),
)
def test_random_programs_mean_the_same(steps: list[Step], donated: bool) -> None:
    p = ProgramBuilder()
    x, d = p.input("x", (4, 4)), p.input("d", (4, 4), donated=donated)
    i, v = p.input("i", (2,), dtype=I64), p.input("v", (2, 4))
    values = [x, d]
    for k, (kind, first, second) in enumerate(steps):
        a, b = values[first % len(values)], values[second % len(values)]
        name = f"t{k}"
        match kind:
            case "put":
                values.append(p.extern(name, "aten.index_put.default", (a, [i], v), (4, 4)))
            case "clone_fill":
                values.append(p.extern(name, "aten.clone.default", (a,), (4, 4)))
                part = View(name, F32, (2, 4), (4, 1), 4)
                p.pointwise(f"{name}_part", "neg", View(b.buffer, F32, (2, 4), (4, 1)), into=part, mutates=True)
            case "row":
                row = View(a.buffer, F32, (4,), (1,), 4)
                part = p.extern(name, "aten.index_put.default", (row, [i], View("v", F32, (2,), (1,))), (4,))
                p.copy(f"{name}_back", part, row)
            case "back":
                p.copy(name, b, x)
            case "backrow":
                p.copy(name, View(b.buffer, F32, (4,), (1,), 4 * (first % 4)), View("x", F32, (4,), (1,), 8))
            case "neg":
                values.append(p.pointwise(name, "neg", a))
            case _:
                values.append(p.pointwise(name, "add", a, b))
    if any(isinstance(op, Copy) and op.source.buffer == op.target.buffer for op in p.operations):
        return
    leaving = [u for u in (values[-1], values[len(values) // 2]) if u.buffer not in ("x", "d")]
    reinplaced(p.program(*leaving))


@pytest.mark.parametrize("function", [fill_cache, assign_slice, scatter, statistics])
def test_with_the_passes_that_follow(function: Callable[..., object]) -> None:
    """Fusion meets mutation of inputs in the middle of a program: values stay the same."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(function, *inputs, lower=True)
    after = run_pipeline(program, Config(), verify_program)
    first, second = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, first), run_program(after, second)
    for a, b in zip([*expected, *first], [*found, *second], strict=True):
        torch.testing.assert_close(b, a)
