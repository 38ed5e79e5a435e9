"""User code of every ordinary kind: mutation, views, breaks, hooks, threads, odd sizes; against eager."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from memplan.ir.errors import OptionError
from tests.models.against_eager import check, compare_trees
from tests.tolerances import assert_near


class Block(nn.Module):
    """A small MLP with a LayerNorm: a matmul, a reduction and pointwise work each way."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Function(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: object) -> object:
        return self.function(*inputs)


def compiled(function: Callable[..., object], **options: object) -> Callable[..., Tensor]:
    return torch.compile(function, backend="memplan", options=options or None)  # type: ignore[return-value]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


# -- training, more than once ---------------------------------------------------------------------------------------


def test_convolutions_with_running_statistics() -> None:
    # a bias before a batch norm has a gradient of zero and noise: there is none
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    check(model, [torch.randn(2, 3, 8, 8, requires_grad=True)], steps=3)


def test_retain_graph() -> None:
    model = Block()
    x = leaf(3, 12)
    loss = compiled(model)(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert_near(first, expected, "first gradient")
    assert_near(second, expected, "second gradient")


def test_double_backward_is_refused_and_eager_still_does_it() -> None:
    """AOTAutograd has no double backward: what is said is torch's own error, and no wrong number."""
    x = leaf(3, 4)
    function = compiled(lambda t: torch.tanh(t).square())
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


def test_several_forwards_before_their_backwards() -> None:
    model = Block()
    function = compiled(model)
    inputs = [leaf(3, 12) for _ in range(3)]
    losses = [function(x).square().sum() for x in inputs]
    for loss in reversed(losses):
        loss.backward()
    ours = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
        model(x).square().sum().backward()
    for x, gradient in zip(inputs, ours, strict=True):
        assert gradient is not None
        assert x.grad is not None
        assert_near(gradient, x.grad, "gradient")


def test_a_backward_that_never_comes() -> None:
    model = Block()
    function = compiled(model)
    for _ in range(3):
        function(leaf(3, 12))
    x = leaf(3, 12)
    assert_near(function(x).detach(), model(x).detach(), "result")


def test_exception_in_backward_leaves_the_next_step_whole() -> None:
    model = Block()
    function = compiled(model)

    def refuse(_: Tensor) -> None:
        raise ValueError("stopped half-way")

    out = function(leaf(3, 12))
    out.register_hook(refuse)
    with pytest.raises(ValueError, match="half-way"):
        out.sum().backward()
    x = leaf(3, 12)
    function(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert x.grad is not None
    assert_near(x.grad, expected, "gradient")


def test_saved_tensor_hooks_see_each_tensor() -> None:
    """Offloading moves single tensors: what a hook gets never drags a larger storage along."""
    model = Block()
    function = compiled(model)
    x = leaf(3, 12)
    function(x).sum().backward()
    x.grad = None
    seen: list[tuple[int, int]] = []

    def pack(t: Tensor) -> Tensor:
        seen.append((t.untyped_storage().nbytes(), t.numel() * t.element_size()))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(x)
    out.sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert x.grad is not None
    assert_near(x.grad, expected, "gradient")
    assert seen
    assert all(storage <= own + 512 for storage, own in seen), seen


def test_threads() -> None:
    model = Block().requires_grad_(False)
    function = compiled(model)
    inputs = [torch.randn(3, 12) for _ in range(8)]
    expected = [model(x) for x in inputs]
    function(inputs[0])
    actual: list[Tensor | None] = [None] * len(inputs)

    def run(k: int) -> None:
        for _ in range(20):
            actual[k] = function(inputs[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(actual, expected, strict=True):
        assert a is not None
        assert_near(a, b, "a thread's result")


def test_checkpointed_block() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
            return x

    check(Checkpointed(), [leaf(3, 12)])


def test_gradient_of_some_inputs_only() -> None:
    check(Function(lambda a, b: (a * b.exp()).sum(1)), [leaf(3, 4), torch.randn(3, 4)])


def test_detach_and_no_grad_inside() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale = x.abs().amax()
        return x / scale, (x * 2).detach()

    check(Function(function), [leaf(3, 4)])


def test_parameter_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids).tanh() @ self.embedding.weight.t()

    check(Tied(), [torch.randint(0, 11, (2, 5))])


# -- results that are views, inputs that are written ----------------------------------------------------------------


def test_input_mutation() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y[1:].mul_(x[1:])
        return x + y

    check(Function(function), [torch.randn(3, 4), torch.randn(3, 4)], training=False)


def test_buffer_mutation() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.count += 1
            return x - self.mean

    check(Counter(), [leaf(3, 4)], steps=3)


def test_results_that_alias_inputs_and_each_other() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = x.sin()
        return x, x.t(), y, y[:, 1:]

    module = Function(function)
    check(module, [torch.randn(3, 4)], training=False)
    x = torch.randn(3, 4)
    out = compiled(function)(x)
    assert out[0].data_ptr() == x.data_ptr()
    assert out[1].data_ptr() == x.data_ptr()
    assert out[3].data_ptr() == out[2].data_ptr() + out[2].element_size()


def test_the_same_input_twice() -> None:
    x = torch.randn(3, 4)

    def function(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a * b

    y = x.clone()
    assert_near(compiled(function)(x, x), function(y, y), "result")
    assert_near(x, y, "the input")


def test_overlapping_views_as_inputs() -> None:
    base, other = torch.arange(10.0), torch.arange(10.0)

    def function(a: Tensor, b: Tensor) -> Tensor:
        a.mul_(2)
        return a + b

    assert_near(compiled(function)(base[:6], base[3:9]), function(other[:6], other[3:9]), "result")
    assert_near(base, other, "the base")


@pytest.mark.parametrize("stride", ["expanded", "transposed", "sliced", "offset"])
def test_input_layouts(stride: str) -> None:
    base = torch.randn(6, 8)
    x = {
        "expanded": torch.randn(6, 1).expand(6, 8),
        "transposed": torch.randn(8, 6).t(),
        "sliced": torch.randn(12, 16)[::2, ::2],
        "offset": torch.randn(7, 8)[1:],
    }[stride]
    function = compiled(lambda a, b: torch.softmax(a * b + a.sum(1, keepdim=True), 1))
    expected = torch.softmax(x * base + x.sum(1, keepdim=True), 1)
    assert_near(function(x, base), expected, stride)


# -- odd sizes, odd dtypes ------------------------------------------------------------------------------------------


def test_zero_size() -> None:
    check(Function(lambda x: (x.relu().sum(0), torch.cat([x, x]), x.t() @ x)), [torch.randn(0, 4, requires_grad=True)])


def test_zero_dimensions() -> None:
    check(Function(lambda x, y: (x * y, (x + 1).reshape(1), x.square().sum())), [leaf(), leaf()])


def test_no_tensors_at_all() -> None:
    torch._dynamo.reset()
    assert compiled(lambda n: n + 1)(3) == 4


def test_a_result_that_needs_no_kernel() -> None:
    check(Function(lambda x: x.t()), [torch.randn(3, 4)], training=False)
    check(Function(lambda x: torch.ones(3) if x is not None else x), [torch.randn(3, 4)], training=False)


def test_none_and_numbers_among_the_results() -> None:
    check(Function(lambda x: {"a": x.cos(), "b": None, "c": (3, "text")}), [leaf(3, 4)])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_integers(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2 if dtype is torch.bool else 100, (5, 7)).to(dtype)
    check(Function(lambda t: (t.sum(1), t.cumsum(0), t == t[0], torch.where(t > 0, t, t[0]))), [x], training=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_floats(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, dtype=dtype)
    check(Function(lambda t: (t.sum(1), t * t.mean(), torch.tanh(t))), [x.requires_grad_()])


def test_mixed_dtypes_promote_as_in_eager() -> None:
    half, scalar = torch.randn(4, dtype=torch.float16), torch.tensor(2.5, dtype=torch.float64)
    function = Function(lambda a, b, c, d: (a + b, b / 2, c * d, a * c, b * d))
    check(function, [torch.randn(4), torch.arange(4), half, scalar], training=False)


def test_what_a_scatter_overwrites_is_gathered_before() -> None:
    """Reads and writes at one computed index are not those of one point: two points may compute the same."""

    def f(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2 + 1
        gathered = y.gather(-1, at)
        return gathered * 3, y.scatter(-1, at, gathered * 2)

    check(Function(f), [torch.randn(4, 9), torch.randint(0, 9, (4, 6))], training=False)


def test_sorting_and_what_has_no_lowering() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        values, order = x.sort(1)
        return values, order, torch.fft.rfft(x).abs(), torch.linalg.solve(x @ x.t() + 10 * torch.eye(4), x)

    check(Function(function), [leaf(4, 6)])


# -- sizes known late or changing ------------------------------------------------------------------------------------


def test_dynamic_batch() -> None:
    model = Block()
    function = torch.compile(model, backend="memplan", dynamic=True)
    for rows in (3, 7, 2):
        x = leaf(rows, 12)
        out = function(x)
        out.square().sum().backward()
        gradient, x.grad = x.grad, None
        model(x).square().sum().backward()
        assert gradient is not None
        assert x.grad is not None
        assert_near(out.detach(), model(x).detach(), f"result at {rows}")
        assert_near(gradient, x.grad, f"gradient at {rows}")


def test_shapes_that_change_recompile_by_themselves() -> None:
    function = compiled(lambda x: torch.cat([x, x.flip(0)]).softmax(0))
    for rows in (3, 5, 4, 1, 0):
        x = torch.randn(rows, 4)
        assert_near(function(x), torch.cat([x, x.flip(0)]).softmax(0), f"result at {rows}")


def test_size_known_only_afterwards() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        function = compiled(lambda x: x[x > 0].sum() + torch.nonzero(x).sum())
        for _ in range(2):
            x = torch.randn(20)
            assert_near(function(x), x[x > 0].sum() + torch.nonzero(x).sum(), "result")


def test_sizes_known_only_afterwards_are_checked_after_them() -> None:
    """(The order that needs least puts the other call first.)"""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        function = compiled(lambda x: (x.nonzero(), x[x > 0]))
        x = torch.randn(4, 6)
        compare_trees(function(x), (x.nonzero(), x[x > 0]), "result")


def test_item() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function = compiled(lambda x: x * x.sum().item())
        x = torch.randn(20)
        assert_near(function(x), x * x.sum().item(), "result")


# -- several graphs, control flow -----------------------------------------------------------------------------------


def test_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x).relu()

    check(Broken(), [leaf(3, 12)], fullgraph=False)


def test_data_dependent_branch_breaks_the_graph() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            return y + 1 if y.sum() > 0 else y - 1

    check(Branch(), [torch.ones(3, requires_grad=True)], fullgraph=False)
    check(Branch(), [-torch.ones(3).requires_grad_()], fullgraph=False)


def test_cond() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.cos(), lambda t: t.sin() * 2, (x,))  # type: ignore[no-any-return]

    for sign in (1.0, -1.0):
        x = torch.full((3,), sign)
        torch._dynamo.reset()
        assert_near(compiled(function)(x), function(x), f"result at {sign}")


def test_exception_in_the_model_reaches_the_user() -> None:
    def function(x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("three rows are not allowed")
        return x.sin()

    with pytest.raises(ValueError, match="three rows"):
        compiled(function)(torch.randn(3))
    x = torch.randn(4)
    assert_near(compiled(function)(x), x.sin(), "result")


# -- random numbers -------------------------------------------------------------------------------------------------


def test_eagers_random_numbers() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.dropout(x, 0.3, training=True), x + torch.rand_like(x)

    check(Function(function), [leaf(8, 9)], random="eager")


def test_fast_dropout_has_the_right_mean_and_the_same_mask_in_the_backward() -> None:
    function = compiled(lambda x: nn.functional.dropout(x, 0.25, training=True))
    x = torch.ones(200, 100, requires_grad=True)
    out = function(x)
    out.sum().backward()
    kept = out.detach() != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.02)
    assert x.grad is not None
    assert_near(x.grad, kept / 0.75, "gradient")
    assert not torch.equal(function(x).detach() != 0, kept)
    torch.manual_seed(5)
    first = function(x)
    torch.manual_seed(5)
    assert torch.equal(first, function(x))


# -- options --------------------------------------------------------------------------------------------------------


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(Exception, match=r"unknown option 'wraper'.*wrapper") as raised:
        compiled(lambda x: x + 1, wraper="python")(torch.randn(2))
    assert isinstance(raised.value, OptionError) or "OptionError" in repr(raised.value)


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(Exception, match="inplace"):
        compiled(lambda x: x + 1, disable=["in_place"])(torch.randn(2))


def test_every_pass_off() -> None:
    from memplan.passes.pipeline import PASS_NAMES

    check(Block(), [leaf(3, 12)], disable=list(PASS_NAMES))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    function = torch.compile(lambda x: (x.sin() + 1).sum(0), backend="memplan", mode=mode)
    x = torch.randn(5, 6)
    compare_trees(function(x), (x.sin() + 1).sum(0), mode)
