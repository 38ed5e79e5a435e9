"""Tensor subclasses, which AOTAutograd unwraps: nested tensors with ragged sizes, and those that users write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

from memplan.capture.size_inputs import size_inputs
from memplan.ir.errors import UnsupportedError
from memplan.ir.program import SizeSource, SymbolInput, TensorInput, View
from tests.models.against_eager import total
from tests.tolerances import assert_near

WIDTH = 16
N = sympy.Symbol("n", integer=True, positive=True)


def jagged(*lengths: int) -> Tensor:
    """A nested tensor of parts that long."""
    parts = [torch.randn(n, WIDTH) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def leaves(value: object) -> list[object]:
    """What can be compared: the plain tensors of a nest."""

    def parts(leaf: object) -> Sequence[object]:
        if not isinstance(leaf, Tensor):
            return (str(leaf),)  # (two ragged sizes are never equal)
        if isinstance(leaf, TwoTensor):
            return (*parts(leaf.a), *parts(leaf.b))
        return (leaf.values(), leaf.offsets()) if leaf.is_nested else (leaf,)

    return [part for leaf in pytree.tree_leaves(value) for part in parts(leaf)]


def check_both(
    module: nn.Module, batches: Sequence[Sequence[Tensor]], *, fullgraph: bool = True, wrapper: str = "auto"
) -> None:
    """Every batch through the module and its compiled copy: results, and gradients of inputs and parameters."""
    torch._dynamo.reset()
    ours, theirs = copy.deepcopy(module), module
    options = {"poison": True, "wrapper": wrapper}
    compiled = torch.compile(ours, backend="memplan", fullgraph=fullgraph, options=options)
    for batch in batches:
        found = []
        for function in (compiled, theirs):
            arguments = [t.detach().clone().requires_grad_(t.requires_grad) for t in batch]
            out = function(*arguments)
            if torch.is_grad_enabled():
                total([t.values() if t.is_nested else t for t in pytree.tree_leaves(out)]).backward()
            gradients = [t.grad for t in arguments if t.grad is not None]
            kinds = [type(leaf) for leaf in pytree.tree_leaves(out)]
            found.append((kinds, [*leaves(out), *leaves(gradients)]))
        assert found[0][0] == found[1][0]
        for k, (mine, eager) in enumerate(zip(found[0][1], found[1][1], strict=True)):
            if isinstance(eager, Tensor):
                assert isinstance(mine, Tensor)
                assert_near(mine.detach(), eager.detach(), f"leaf {k}")
            else:
                assert mine == eager
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        for mine, eager in zip(leaves(p.grad), leaves(q.grad), strict=True):
            if q.grad is not None:
                assert_near(mine, eager, f"gradient of {name}")  # type: ignore[arg-type]


class Layer(nn.Module):
    """Attention over the parts, a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        heads = [m(h).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.query, self.key, self.value)]
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Applied(nn.Module):
    """A function of a linear layer's result."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor, *others: Tensor) -> object:
        return self.function(self.linear(x), *others)


def _from_values(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets).sin().values()


def _nested(x: Tensor) -> object:
    norms = F.rms_norm(F.layer_norm(x, (WIDTH,)), (WIDTH,))
    views = torch.cat([x.chunk(2, -1)[1], x.cos()], -1)
    return x.sin() * 2, norms, x.softmax(1), x.softmax(-1), views, x @ torch.ones(WIDTH, 3), x.bfloat16() * 2


def _dense(x: Tensor) -> object:
    values = x.values()
    mean = F.mse_loss(values, torch.ones_like(values))  # one over a number of elements that no argument gives
    return torch.nested.to_padded_tensor(x, -1.0), x.amax(1), values * 2, mean, [part * 2 for part in x.unbind()]


@pytest.mark.parametrize("function", [_nested, _dense])
def test_nested_tensors(function: Callable[[Tensor], object]) -> None:
    """The second batch has as many parts, of other lengths."""
    check_both(Applied(function), [[jagged(2, 3)], [jagged(4, 1)]])


def test_attention_over_nested_tensors() -> None:
    """(Torch's attention on a CPU takes the parts one by one, out of the graph.)"""
    check_both(Layer(), [[jagged(4, 3, 5)], [jagged(2, 7)]], fullgraph=False)


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_nested_tensors_without_gradients(wrapper: str) -> None:
    """Also a ragged size as a result: it names the offsets, and is no number."""
    with torch.no_grad():
        check_both(
            Applied(lambda x: (x.relu(), x.sum(1), x.sum(-1))), [[jagged(2, 3)], [jagged(4, 1, 2)]], wrapper=wrapper
        )
        x = jagged(2, 3)
        compiled = torch.compile(lambda x: (x.cos(), x.size(1)), backend="memplan", options={"wrapper": wrapper})
        cosine, size = compiled(x)
        assert size == x.size(1) == cosine.size(1)


def test_strides_of_nested_tensors_as_results() -> None:
    x = jagged(2, 3)
    torch._dynamo.reset()
    assert torch.compile(lambda x: (x.sin(), x.stride()), backend="memplan")(x)[1] == x.stride()


def test_nested_tensors_made_inside() -> None:
    values, offsets = torch.randn(6, WIDTH, requires_grad=True), torch.tensor([0, 2, 6])
    check_both(Applied(_from_values), [[values, offsets]])


def test_sizes_are_read_off_the_tensors_that_tell_them() -> None:
    """An argument of its own is asked first, then a plain size, then one that tells it by arithmetic."""
    a, b = View("a", torch.float32, (2 * N + 1, 4), (4, 1)), View("b", torch.float32, (3, N), (N, 1))
    first, second = TensorInput(0, a), TensorInput(1, b)
    assert size_inputs([first]) == (SymbolInput(1, N, SizeSource(0, 0, 2, 1)),)
    assert size_inputs([first, second]) == (SymbolInput(2, N, SizeSource(1, 1)),)
    assert size_inputs([first, SymbolInput(1, N)]) == ()
    with pytest.raises(UnsupportedError, match=r"the size .* of the input c is not told"):
        size_inputs([TensorInput(0, View("c", torch.float32, (N * N,), (1,)))])


class Quantised(Tensor):
    """8-bit rows with a scale each, computed with as floats."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: object, size: object, stride: object) -> Quantised:
        return Quantised(parts["codes"], parts["scales"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...],
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            (given,) = args
            assert isinstance(given, Quantised)
            return Quantised(function(given.codes), function(given.scales))  # type: ignore[arg-type]
        plain = pytree.tree_map_only(Quantised, lambda t: t.codes.to(t.scales.dtype) * t.scales, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def quantised(weight: Tensor) -> Quantised:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return Quantised((weight / scales).round().to(torch.int8), scales)


def test_a_quantised_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(quantised(layer.weight.detach()), requires_grad=False)
    x = torch.randn(5, 8, requires_grad=True)
    results = []
    torch._dynamo.reset()
    for function in (model, torch.compile(model, backend="memplan", options={"poison": True})):
        out = function(x)
        results.append((out, *torch.autograd.grad(total(out), [x, model[0].bias, model[2].bias])))
    for mine, eager in zip(results[1], results[0], strict=True):
        assert_near(mine.detach(), eager.detach(), "quantised")


def two(*shape: int) -> TwoTensor:
    return TwoTensor(torch.randn(*shape), torch.randn(*shape)).requires_grad_()


def test_a_subclass_of_two_tensors() -> None:
    """Computed with, as a parameter, inside of itself, changed in place, and as a result that it is."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(two(4, 4).detach())
    check_both(layer, [[torch.randn(3, 4, requires_grad=True)]])
    pair = TwoTensor(two(3, 4).detach(), two(3, 4).detach()).requires_grad_()
    check_both(nn.Tanh(), [[two(3, 4)], [pair]])

    def change(x: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2)
        return x, x.view(-1)

    mine = two(3, 4).detach()
    eager = mine.clone()
    same, flat = torch.compile(change, backend="memplan")(mine)
    change(eager)
    assert same is mine
    assert flat.a.data_ptr() == mine.a.data_ptr()
    for a, b in zip(leaves(mine), leaves(eager), strict=True):
        assert_near(a, b, "changed in place")  # type: ignore[arg-type]


def test_masked_tensors() -> None:
    data, mask = torch.randn(3, 4), torch.arange(12).reshape(3, 4) % 3 > 0
    torch._dynamo.reset()

    def greatest(x: Tensor) -> Tensor:
        return (x * 2).amax(-1)

    eager, mine = (f(masked_tensor(data, mask)) for f in (greatest, torch.compile(greatest, backend="memplan")))
    assert torch.equal(mine.get_mask(), eager.get_mask())
    assert_near(mine.to_tensor(0.0), eager.to_tensor(0.0), "masked")
