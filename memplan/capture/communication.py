"""Collectives and waits in a captured program: what is in flight, from which call to which wait.

Operators that start a collective return tensors that hold nothing yet; ``wait_tensor`` returns its own argument. So a
wait is an operation that changes its argument's buffer, and everything that reads the result comes after it. What the
collective still reads until then is among the wait's arguments, which keeps it alive and as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.fx

from ..ir.communication import collective_form
from ..ir.errors import UnsupportedError
from ..ir.in_flight import Collective, Wait
from ..ir.loops import Size
from ..ir.program import Buffer, Contract, Copy, Extern, Literal, Operation, Origin, View, argument_views

#: higher-order operators that call an operator which changes its arguments, on new tensors
_WRAPPERS = frozenset({"auto_functionalized", "auto_functionalized_v2"})
WAIT = "_c10d_functional.wait_tensor.default"


#: what is called with ``out=`` and what returns its result, by name
_RETURNING = {
    "all_gather_into_tensor_out": "all_gather_into_tensor",
    "reduce_scatter_tensor_out": "reduce_scatter_tensor",
}


def call_by_name(module: torch.fx.GraphModule) -> None:
    """Collectives inside of torch's wrapper for operators with ``out=`` become calls of their own, in place.

    The wrapper gives a new tensor, and hides that it is not there yet when the call returns.

    Raises
    ------
    UnsupportedError
        For a collective in such a wrapper of which no other form is known.
    """
    changed = False
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "_name", "") not in _WRAPPERS:
            continue
        operator = node.args[0]
        if not isinstance(operator, torch._ops.OpOverload) or collective_form(str(operator)) is None:
            continue
        name = _RETURNING.get(operator._schema.name.rpartition(":")[2])
        if name is None or not isinstance(node.meta.get("val"), torch.Tensor):
            where = next(iter(reversed(str(node.meta.get("stack_trace", "")).splitlines())), node.name).strip()
            raise UnsupportedError(f"{operator} inside of {node.target} cannot be followed to its wait", where=where)
        node.target = getattr(torch.ops._c10d_functional, name).default
        node.args = tuple(node.kwargs[a.name] for a in node.target._schema.arguments)
        node.kwargs = {}
        changed = True
    if changed:
        module.recompile()


def started(op: Extern, buffers: dict[str, Buffer]) -> list[Operation]:
    """The call as a `Collective` where it starts one; else the call itself.

    Libraries return contiguous tensors whatever layout was traced. Where that differs, the result is waited for at
    once and copied; ``buffers`` gets the contiguous one.

    Raises
    ------
    UnsupportedError
        If the group is not given by its name.
    """
    if collective_form(op.target) is None:
        return [op]
    given = dict(op.kwargs).get("group_name", op.args[-1] if op.args else None)
    if not isinstance(given, Literal) or not isinstance(given.value, str):
        where = op.origins[0].location if op.origins else op.name
        raise UnsupportedError(f"{op.target} names its process group by {given!r}, which is no text", where=where)
    after: list[Operation] = []
    results: list[View | None] = []
    for view in op.results:
        if view is not None and view.buffer not in op.mutates and view != contiguous(view):
            whole = replace(contiguous(view), buffer=f"{view.buffer}_contiguous")
            nbytes = whole.numel * whole.dtype.itemsize
            buffers[whole.buffer] = replace(buffers[view.buffer], name=whole.buffer, nbytes=nbytes)
            after.append(wait_for(whole, f"{view.buffer}_wait", op.device, op.origins))
            after.append(Copy(f"{view.buffer}_copy", whole, view, op.device, op.origins))
            view = whole
        results.append(view)
    values = {f.name: getattr(op, f.name) for f in fields(op)}
    return [Collective(**{**values, "results": tuple(results)}, group=given.value), *after]


def wait_for(view: View, name: str, device: str, origins: tuple[Origin, ...]) -> Wait:
    """The operation that waits for what is in flight to the view's buffer."""
    return Wait(name, WAIT, (view,), (), (view,), Contract.MUTATE, device, origins, mutates=(view.buffer,))


def contiguous(view: View) -> View:
    """The same sizes from the buffer's first element on, without gaps."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(view.sizes):
        strides.append(step)
        step = step * size
    return replace(view, strides=tuple(reversed(strides)), offset=0)


def joined(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations, each wait with what it keeps in flight; what nobody waits for is waited for at the end."""
    flying: dict[str, Collective] = {}  # by a result that nobody has waited for
    out: list[Operation] = []
    waits: dict[str, list[int]] = {}  # by collective: its waits' places in ``out``
    for op in operations:
        if isinstance(op, Collective):
            flying.update(dict.fromkeys(op.in_flight_results, op))
            waits[op.name] = []
        elif isinstance(op, Wait):
            found = flying.pop(op.mutates[0], None)
            if found is not None:
                waits[found.name].append(len(out))
        out.append(op)
    for result, op in flying.items():
        view = next(v for v in _all_views(op) if v.buffer == result)
        waits[op.name].append(len(out))
        out.append(wait_for(view, f"{op.name}_{result}_end", op.device, op.origins))
    for op in operations:
        if isinstance(op, Collective):
            kept = op.in_flight_arguments
            views = {v.buffer: v for v in _all_views(op) if v.buffer in kept}
            for place in waits[op.name]:
                wait = out[place]
                assert isinstance(wait, Wait)
                out[place] = replace(wait, args=(wait.args[0], *views.values()))
    return tuple(out)


def _all_views(op: Extern) -> list[View]:
    given = argument_views((*op.args, *(a for _, a in op.kwargs)))
    return [*(v for v in op.results if v is not None), *given]
