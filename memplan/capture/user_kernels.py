"""User Triton kernels in FX graphs: `triton_kernel_wrapper_functional` and `_mutation` nodes as `UserKernel`.

A node names its kernel and its constants by positions in a table of torch's that lives in this process only. What the
table holds is taken out of it here, as data; nothing later looks there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.fx

from ..ir.errors import UnsupportedError
from ..ir.index import expand
from ..ir.loops import Size
from ..ir.program import (
    Argument,
    Copy,
    Descriptor,
    Literal,
    Operation,
    Origin,
    Symbolic,
    UserArgument,
    UserKernel,
    View,
)
from ..ir.user_kernel import Fixed
from .kernel_closure import fixed_value, kernel_source
from .sizes import extent

FUNCTIONAL = "triton_kernel_wrapper_functional"
MUTATION = "triton_kernel_wrapper_mutation"


@dataclass(frozen=True)
class Captured:
    """The operations of a node, and the view that each changed argument becomes, by parameter."""

    operations: tuple[Operation, ...]
    changed: Mapping[str, View]


class _Node:
    """The keyword arguments of a node."""

    def __init__(self, node: torch.fx.Node) -> None:
        given = node.kwargs
        self.kernel: int = given["kernel_idx"]  # type: ignore[assignment]
        self.constants: int = given["constant_args_idx"]  # type: ignore[assignment]
        self.grid: Sequence[Sequence[object]] = given["grid"]  # type: ignore[assignment]
        self.descriptors: Mapping[str, tuple[str, tuple[object, ...]]] = given["tma_descriptor_metadata"]  # type: ignore[assignment]
        self.arguments: Mapping[str, object] = given["kwargs"]  # type: ignore[assignment]
        self.clones: Sequence[str] = given.get("tensors_to_clone", ())  # type: ignore[assignment]
        #: torch 2.14 passes options of the launch apart
        self.launch: Mapping[str, object] = given.get("launch_kwargs") or {}  # type: ignore[assignment]


def capture_user_kernel(
    node: torch.fx.Node,
    argument: Callable[[object], Argument],
    fresh: Callable[[str, torch.Tensor], View],
    device_of: Callable[[View], str],
    origin: Origin,
) -> Captured | None:
    """The launch as data, after clones of what it changes; None (with a warning) where it has to stay torch's call.

    Parameters
    ----------
    argument:
        The value of an FX node (or of a constant) in the program.
    fresh:
        Makes a buffer of a name for a fake tensor.
    device_of:
        The device of a view's buffer.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    given = _Node(node)
    table = wrap.kernel_side_table
    try:
        source, constants = kernel_source(
            table.get_kernel(given.kernel), {**table.get_constant_args(given.constants), **_plain(given.arguments)}
        )
        arguments = {n: _argument(argument(v), n) for n, v in given.arguments.items() if n not in constants}
        arguments.update((n, Fixed(v)) for n, v in constants.items())
        grids = tuple(_grid(g, argument) for g in given.grid)
        descriptors = tuple((n, _descriptor(kind, fields, argument)) for n, (kind, fields) in given.descriptors.items())
        options = tuple((n, fixed_value(v)) for n, v in sorted(given.launch.items()))
    except UnsupportedError as error:
        warnings.warn(
            f"a user's Triton kernel ({node.name}{' at ' + origin.location if origin.location else ''}) runs as "
            f"torch's own call, with a copy of what it changes: {error}",
            stacklevel=2,
        )
        return None
    clones: list[Operation] = []
    changed: dict[str, View] = {}
    if operator_is(node, FUNCTIONAL):
        values: Mapping[str, torch.Tensor] = node.meta["val"]
        for name, value in values.items():
            before = arguments[name]
            assert isinstance(before, View)
            made = fresh(f"{node.name}_{name}", value)
            clones.append(_clone(f"{node.name}_clone{len(clones)}", before, made, device_of(before), origin))
            arguments[name] = changed[name] = made
        mutates = tuple(dict.fromkeys(v.buffer for v in changed.values()))
    else:
        mutates = tuple(dict.fromkeys(v.buffer for v in arguments.values() if isinstance(v, View)))
    views = [a for a in arguments.values() if isinstance(a, View)]
    order = {n: k for k, n in enumerate(source.parameters)}
    launch = UserKernel(
        node.name,
        source,
        tuple(sorted(arguments.items(), key=lambda item: order.get(item[0], len(order)))),
        grids,
        device_of(views[0]) if views else "cpu",
        (origin,),
        mutates,
        descriptors,
        options,
    )
    return Captured((*clones, launch), changed)


def operator_is(node: torch.fx.Node, name: str) -> bool:
    """Whether the node calls the higher-order operator of that name."""
    return getattr(node.target, "_name", "") == name


def _plain(arguments: Mapping[str, object]) -> dict[str, object]:
    return {n: v for n, v in arguments.items() if not _holds_nodes(v)}


def _holds_nodes(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_nodes(v) for v in value)
    return isinstance(value, (torch.fx.Node, torch.SymInt))


def _argument(value: Argument, name: str) -> UserArgument:
    match value:
        case View() | Symbolic():
            return value
        case Literal(constant):
            return Fixed(fixed_value(constant))
        case _:
            raise UnsupportedError(f"the argument {name!r} is a tuple of tensors")


def _size(value: object, argument: Callable[[object], Argument]) -> Size:
    found = argument(value)
    match found:
        case Literal(int() as number):
            return number
        case Symbolic(expr) if isinstance(expr, sympy.Expr):
            return int(expr) if expr.is_Integer else expr
        case _:
            raise UnsupportedError(f"{found} where a size of a grid or of a descriptor is expected")


def _grid(grid: Sequence[object], argument: Callable[[object], Argument]) -> tuple[Size, Size, Size]:
    x, y, z = (*(_size(g, argument) for g in grid), 1, 1)[:3]
    return x, y, z


def _descriptor(kind: str, fields: tuple[object, ...], argument: Callable[[object], Argument]) -> Descriptor:
    def sizes(values: object) -> tuple[Size, ...]:
        assert isinstance(values, (list, tuple))
        return tuple(_size(v, argument) for v in values)

    if kind == "stable":
        return Descriptor(sizes(fields[0]))
    return Descriptor(sizes(fields[1]), sizes(fields[0]), _size(fields[2], argument))


def _clone(name: str, source: View, target: View, device: str, origin: Origin) -> Copy:
    """A copy of all elements, and of what lies between them where there are gaps: the kernel has a pointer only."""
    count = extent(source.sizes, source.strides)
    if expand(sympy.sympify(count) - source.numel) != 0:
        source = View(source.buffer, source.dtype, (count,), (1,), source.offset)
        target = View(target.buffer, target.dtype, (count,), (1,), target.offset)
    return Copy(name, source, target, device, (origin,))


__all__ = ["FUNCTIONAL", "MUTATION", "Captured", "capture_user_kernel", "operator_is"]
