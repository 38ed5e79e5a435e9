"""Graphs of every kind as programs: verified, and run plainly with eager's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memplan.ir.errors import UnsupportedError
from memplan.ir.program import BufferKind, Contract, Copy, Extern, Literal, Phase, Program, Symbolic, View, order_edges
from tests.capture.tracing import Traced, traced
from tests.models.against_eager import clone_inputs, compare_gradients, compare_trees, total


def check(function: Callable[..., object], *inputs: object, dynamic: bool | None = False, calls: int = 1) -> Traced:
    """Results, gradients and changed inputs against eager's; returns what was captured."""
    compiled, found = traced(function, dynamic=dynamic)
    for _ in range(calls):
        answers = []
        for f in (function, compiled):
            torch.manual_seed(0)
            given = clone_inputs(inputs)
            out = f(*given)
            leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            if leaves:
                total(out).backward()
            answers.append((out, given))
        (expected, theirs), (actual, ours) = answers
        compare_trees(actual, expected, "result")
        compare_trees(ours, theirs, "input")
        compare_gradients(ours, theirs)
    return found


def inference(found: Traced) -> Program:
    return found.programs[Phase.INFERENCE]


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


# -- views ----------------------------------------------------------------------------------------------------------


def test_views_are_no_operations() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = x.transpose(0, 1).split([2, 6], 0)
        c = b.unflatten(0, (2, 3)).movedim(0, -1)[1:, ::2].unsqueeze(0).expand(4, -1, -1, -1)
        return (a.sum() + c).squeeze(0)

    program = inference(check(function, torch.randn(4, 8)))
    assert [op.target for op in program.operations if isinstance(op, Extern)] == ["aten.sum.default", "aten.add.Tensor"]


def test_outputs_that_are_views_of_each_other_share_a_buffer() -> None:
    program = inference(check(lambda x: (y := x.sin(), y[1:], y.t())[0:3], torch.randn(3, 4)))
    views = [o for o in program.outputs if isinstance(o, View)]
    assert len({v.buffer for v in views}) == 1
    assert {program.buffers[v.buffer].kind for v in views} == {BufferKind.OUTPUT}


def test_outputs_that_are_inputs() -> None:
    x = torch.randn(3, 4)
    program = inference(check(lambda a, b: (a, b.t(), a + 1), x, torch.randn(2, 3)))
    assert {program.buffers[o.buffer].kind for o in program.outputs if isinstance(o, View)} <= {
        BufferKind.INPUT, BufferKind.OUTPUT,
    }  # fmt: skip


def test_views_that_change_the_dtype() -> None:
    check(lambda x: (x.view(torch.int32) ^ 5).view(torch.float32)[1:], torch.randn(6))
    check(lambda x: x.view(torch.uint8)[:, 4:8] + 1, torch.randn(3, 4))


def test_an_input_that_starts_inside_of_its_storage() -> None:
    base = torch.randn(100)
    compiled, _ = traced(lambda x: (x[1:] * 2, x.as_strided((3,), (2,), 7)))
    given = base[5:25].view(4, 5)
    for a, b in zip(compiled(given), (given[1:] * 2, given.as_strided((3,), (2,), 7)), strict=True):  # type: ignore[call-overload]
        assert torch.equal(a, b)


def test_expanded_and_channels_last_inputs() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    program = inference(check(lambda x: nn.functional.relu(x) + x.amax((2, 3), keepdim=True), image))
    out = program.outputs[0]
    assert isinstance(out, View)
    assert out.strides == (60, 1, 15, 3)
    check(lambda x: x + 1, torch.randn(3, 1).expand(3, 5))


def test_conjugates_and_negatives_are_made_real() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    check(lambda a: (a.conj() @ a.t(), a.conj().imag, a.mH), x)
    check(lambda a: torch.view_as_real(a * 2).sum(-1), x)


def test_complex_training() -> None:
    check(lambda a: (a * a.conj()).real.sum(0), leaf(3, 4, dtype=torch.complex64))


def test_split_with_sizes_and_unbind_of_fresh_results() -> None:
    check(
        lambda x: torch.stack([t.square() for t in (x * 2).unbind(1)]) + torch.cat(x.exp().chunk(2, 1)).sum(),
        leaf(3, 4),
    )


# -- changes --------------------------------------------------------------------------------------------------------


def test_mutated_inputs() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y[1:, ::2].mul_(x[1:, ::2])
        return x + y

    program = inference(check(function, torch.randn(3, 4), torch.randn(3, 4)))
    changed = {b for op in program.operations for b in op.mutates}
    assert len(changed) == 2
    assert all(program.buffers[b].kind is BufferKind.INPUT for b in changed)
    assert any(isinstance(op, Copy) for op in program.operations)


def test_mutated_module_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - self.mean

    ours, eager = Counter(), Counter()
    compiled, _ = traced(ours)
    for _ in range(3):
        x = leaf(5, 4)
        compare_trees(compiled(x), eager(x), "result")
    compare_trees(dict(ours.named_buffers()), dict(eager.named_buffers()), "buffers")


def test_an_input_changed_after_it_was_read_and_returned() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x * 2
        x.copy_(before.flip(0))
        return before, x

    check(function, torch.randn(5))


# -- odd sizes, constants, dtypes -----------------------------------------------------------------------------------


def test_zero_size_and_zero_dimensions() -> None:
    check(lambda x: (x.relu().sum(0), torch.cat([x, x]), x.t() @ x), leaf(0, 4))
    check(lambda x, y: (x * y, (x + 1).reshape(1), x.square().sum()), leaf(), leaf())


def test_constants_of_the_graph() -> None:
    table = torch.arange(12.0).view(3, 4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + table.t()[0], torch.tensor([1.0, 2.0, 3.0]) * x

    check(function, leaf(3))


def test_a_graph_without_tensor_inputs() -> None:
    check(lambda n: torch.arange(6).view(2, 3) * n, 3)


def test_literals_and_none_among_the_results() -> None:
    check(lambda x: {"a": x.cos(), "b": None, "c": (3, "text")}, leaf(3, 4))
    weight = torch.randn(4)  # no gradient: the backward has None for it
    check(lambda x, w: (x * w).sum(0), leaf(3, 4), weight)


def test_autocast() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w).float().softmax(1) @ w.t()

    found = check(function, leaf(4, 6), leaf(6, 5))
    dtypes = {b.dtype for b in found.programs[Phase.FORWARD].buffers.values()}
    assert torch.bfloat16 in dtypes


def test_multiple_results_of_which_some_are_unused() -> None:
    program = inference(check(lambda x: torch.topk(x, 2).indices, torch.randn(3, 5)))
    assert [len(op.results) for op in program.operations if isinstance(op, Extern) and "topk" in op.target] == [2]


# -- sizes that vary ------------------------------------------------------------------------------------------------


def test_sizes_that_change() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, int]:
        y = torch.cat([x, x.flip(0)]) @ w
        return y.view(2, -1, w.shape[1]).softmax(-1), x.shape[0] * 2

    compiled, found = traced(function, dynamic=True)
    for rows, inner, columns in ((3, 4, 5), (7, 2, 9), (2, 6, 3)):
        x, w = leaf(rows, inner), leaf(inner, columns)
        out, n = compiled(x, w)  # type: ignore[misc]
        expected, _ = function(x, w)
        compare_trees(out, expected, f"result at {rows}")
        assert n == 2 * rows
        ours, theirs = (torch.autograd.grad(total(o), (x, w)) for o in (out, expected))
        compare_trees(ours, theirs, f"gradient at {rows}")
    program = found.programs[Phase.FORWARD]
    assert len(program.hints) >= 3
    assert len(found.masks) == 1, "compiled again for another size"


def test_symbolic_results() -> None:
    compiled, found = traced(lambda x: (x + x.shape[0], x.shape[0] + 3, x.shape[0] > 2), dynamic=True)
    for n in (4, 9):
        out = compiled(torch.zeros(n))
        assert out[1:] == (n + 3, True)  # type: ignore[index]
    assert all(isinstance(o, (View, Symbolic, Literal)) for o in inference(found).outputs)


def test_sizes_known_only_afterwards() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.nonzero(x > 0)
        return x[x > 0] * 2, at.flatten() + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, found = traced(function)
        for k in range(3):
            x = torch.randn(20 + k) if k < 2 else -torch.ones(22)
            compare_trees(compiled(x), function(x), f"call {k}")
    program = inference(found)
    dynamic = [op for op in program.operations if isinstance(op, Extern) and op.symbols]
    assert dynamic
    assert {op.contract for op in dynamic} == {Contract.DYNAMIC}


def test_scalars_known_only_afterwards() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        count = n.item()
        torch._check(count >= 1)
        torch._check(count <= x.shape[0])
        return x.narrow(0, 0, count) * count + x.sum().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled, _ = traced(function)
        for n in (3, 5):
            x = torch.randn(8)
            compare_trees(compiled(x, torch.tensor(n)), function(x, torch.tensor(n)), f"{n}")


# -- operators of higher order, effects -----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond(sign: float) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.cos(), lambda t: t.sin() * 2, (x,))  # type: ignore[no-any-return]

    program = inference(check(function, torch.full((3,), sign)))
    assert [op.target for op in program.operations if isinstance(op, Extern) and op.target.startswith("callable:")]


def test_cond_that_trains() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.cos(), lambda t: t.sin() * 2, (x,)) * 3  # type: ignore[no-any-return]

    check(function, leaf(3))


def test_random_numbers_in_eagers_order() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.rand(3) + x, torch.randn_like(x), torch.randint(0, 9, (4,)), x.bernoulli(0.5), torch.randperm(5)

    compiled, found = traced(function, random="eager")
    torch.manual_seed(7)
    ours = compiled(torch.zeros(3))
    torch.manual_seed(7)
    compare_trees(ours, function(torch.zeros(3)), "result")
    program = inference(found)
    effects = [op.name for op in program.operations if isinstance(op, Extern) and op.effect]
    assert len(effects) == 5
    edges = set(order_edges(program.operations))
    assert all(pair in edges for pair in itertools.pairwise(effects))


# -- where it comes from, and what is refused -----------------------------------------------------------------------


def test_origins_name_the_users_line_and_module() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x).tanh()  # the line that is named
            return out

    compiled, found = traced(Named())
    compiled(leaf(2, 4)).sum().backward()  # type: ignore[attr-defined]
    operations = found.programs[Phase.FORWARD].operations
    origin = next(o for op in operations for o in op.origins if o.op.startswith("aten.tanh"))
    assert origin.file == __file__
    assert origin.code.endswith("# the line that is named")
    product = next(o for op in operations for o in op.origins if "mm" in o.op)
    assert product.module == "inner.0"
    backward = [o for op in found.programs[Phase.BACKWARD].operations for o in op.origins]
    assert any(o.file == __file__ and "tanh" in o.code for o in backward)


def test_what_aot_never_hands_over_is_refused_by_name() -> None:
    from memplan.capture.fx import capture

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    graph.output((graph.call_method("sin", (x,)),))
    with pytest.raises(UnsupportedError, match="call_method"):
        capture(torch.fx.GraphModule(nn.Module(), graph), Phase.INFERENCE, name="bad")


def test_as_strided_reaches_beyond_an_input() -> None:
    """What lies behind an input's own elements is read where it is; what lies before them cannot be."""
    storage = torch.arange(12.0)
    compiled = torch.compile(lambda x: x.as_strided((3, 2), (3, 1)) * 2, backend="memplan", dynamic=False)
    torch.testing.assert_close(compiled(storage[:4]), storage.as_strided((3, 2), (3, 1)) * 2)
    before = torch.compile(lambda x: x.as_strided((3,), (1,), 0) * 2, backend="memplan", dynamic=False)
    with pytest.raises(Exception, match=r"as_strided.* reads memory outside of the tensor .*(.|\n)*test_fx\.py"):
        before(storage[4:])


def test_a_complex_factor_is_conjugated_in_the_gradient() -> None:
    """Which is a call on a Python number."""
    check(lambda x: x * 2j, leaf(3, dtype=torch.complex64))
