"""Functions that are compiled as in a new process, their results, and what AOTAutograd was asked to trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Options = dict[str, object]
Function = Callable[..., Any]


class Block(nn.Module):
    """A constant, saved values, dropout's place, a kernel and products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(self.norm(x) * scale)))
        return out


class Moved(Block):
    """The same graph from other lines."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(self.norm(x) * scale)))
        return out


def leaves(value: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def ran(function: Function, inputs: Sequence[object], backward: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of what takes part: parameters, inputs; then the inputs, which may have been changed."""
    torch.manual_seed(1)
    out = function(*inputs)
    results = [t.detach().clone() for t in leaves(out)]
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    wanted = [t for t in leaves(out) if t.requires_grad]
    if backward and wanted:
        torch.stack([t.abs().square().sum() for t in wanted]).sum().backward()
    grads = [t.grad.clone() for t in (*parameters, *leaves(inputs)) if t.is_leaf and t.grad is not None]
    return results, grads + [t.detach().clone() for t in leaves(inputs)]


def check(
    options: Options,
    make: Callable[[], Function] = Block,
    inputs: Callable[[], Sequence[object]] = lambda: (torch.randn(5, 8, requires_grad=True),),
    *,
    backward: bool = True,
    dynamic: bool | None = False,
) -> None:
    """A compiled function against eager, in what is a new process to Dynamo."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function = make()
    torch.manual_seed(0)
    given = inputs()
    torch.manual_seed(0)
    again = inputs()
    twin = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    expected = ran(function, given, backward)
    compiled = torch.compile(twin, backend="memplan", options=options, dynamic=dynamic)
    found = ran(compiled, again, backward)
    for e, f in zip(expected, found, strict=True):
        assert len(e) == len(f)
        for a, b in zip(e, f, strict=True):
            torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)


def entries(options: Options, suffix: str = ".trace") -> list[Path]:
    return sorted(Path(str(options["cache_dir"])).rglob(f"*{suffix}"))


TRAINING = ["forward", "backward"]


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8).requires_grad_(), torch.randn(6, 8)
