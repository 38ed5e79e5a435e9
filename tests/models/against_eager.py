"""A module under ``torch.compile(backend="memplan")`` against its eager copy: results, gradients, buffers, inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.tolerances import assert_near

Function = Callable[..., object]


def check(
    module: nn.Module,
    inputs: Sequence[object],
    *,
    training: bool = True,
    steps: int = 2,
    dynamic: bool | None = False,
    fullgraph: bool = True,
    dtype: torch.dtype | None = None,
    **options: object,
) -> nn.Module:
    """Run both copies ``steps`` times from the same random state and compare everything; returns the compiled one."""
    module = module.train() if training else module.eval()
    compiled_module = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(
        compiled_module, backend="memplan", dynamic=dynamic, fullgraph=fullgraph, options=options or None
    )
    for step in range(steps):
        answers = []
        for function in (module, compiled):
            torch.manual_seed(step)
            arguments = clone_inputs(inputs)
            with torch.set_grad_enabled(training):
                out = function(*arguments)
            if training:
                total(out).backward()
            answers.append((out, arguments))
        (expected, eager_inputs), (actual, our_inputs) = answers
        compare_trees(actual, expected, "result", dtype=dtype)
        compare_trees(our_inputs, eager_inputs, "input", dtype=dtype)
        compare_gradients(our_inputs, eager_inputs, dtype=dtype)
        compare_modules(compiled_module, module, dtype=dtype)
    return compiled  # type: ignore[return-value]


def clone_inputs(inputs: Sequence[object]) -> list[object]:
    """Fresh leaves with the same values, strides and requires_grad."""

    def fresh(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return [pytree.tree_map(fresh, value) for value in inputs]


def total(out: object) -> Tensor:
    """A scalar that depends on every floating result, differently on each element."""
    leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    parts = []
    for t in leaves:
        weight = torch.linspace(0.5, 1.5, t.numel(), device=t.device).reshape(t.shape)
        parts.append((t.real.float() * weight).sum() if t.is_complex() else (t.float() * weight).sum())
    return torch.stack(parts).sum()


def compare_trees(actual: object, expected: object, what: str, *, dtype: torch.dtype | None = None) -> None:
    ours, spec = pytree.tree_flatten(actual)
    theirs, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec, f"{what}: structure {spec} where eager has {expected_spec}"
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor), f"{what} {k}: {type(a).__name__} where eager has a tensor"
            assert a.requires_grad == b.requires_grad, f"{what} {k}: requires_grad {a.requires_grad}"
            assert_near(a, b, f"{what} {k}", dtype=dtype)
        else:
            assert a == b, f"{what} {k}: {a!r} where eager has {b!r}"


def compare_gradients(actual: object, expected: object, *, dtype: torch.dtype | None = None) -> None:
    ours = [t for t in pytree.tree_leaves(actual) if isinstance(t, Tensor)]
    theirs = [t for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        _compare_gradient(a, b, f"gradient of input {k}", dtype)


def compare_modules(ours: nn.Module, eager: nn.Module, *, dtype: torch.dtype | None = None) -> None:
    """Parameters, their gradients, and buffers."""
    for (name, a), (_, b) in zip(ours.named_parameters(), eager.named_parameters(), strict=True):
        assert_near(a.detach(), b.detach(), f"parameter {name}", dtype=dtype)
        _compare_gradient(a, b, f"gradient of {name}", dtype)
    for (name, a), (_, b) in zip(ours.named_buffers(), eager.named_buffers(), strict=True):
        assert_near(a, b, f"buffer {name}", dtype=dtype)


def _compare_gradient(a: Tensor, b: Tensor, what: str, dtype: torch.dtype | None) -> None:
    assert (a.grad is None) == (b.grad is None), f"{what} is {'missing' if a.grad is None else 'there'}, unlike eager's"
    if b.grad is not None:
        assert a.grad is not None
        assert_near(a.grad, b.grad, what, dtype=dtype)
