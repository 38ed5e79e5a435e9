"""Brings to light the clones that functional calls make: ``r = f(x, ...)`` becomes ``r = clone(x); f_(r, ...)``.

What a call costs does not change by that: it made the clone inside. Known are ATen's functional forms of mutation
(a table), `auto_functionalized` of both versions (custom operators), and `triton_kernel_wrapper_functional`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch.utils import _pytree as pytree

from ..ir.index import expand
from ..ir.loops import Size
from ..ir.program import (
    Argument,
    Contract,
    Copy,
    Extern,
    Literal,
    Operation,
    Program,
    Symbolic,
    TensorInput,
    Tuple,
    View,
)

#: ATen calls whose one result is their first argument with some elements changed: the in-place form takes the same
#: arguments and returns the changed one.
_CHANGED_FIRST: dict[str, str] = {
    "aten.index_put.default": "aten.index_put_.default",
    "aten._unsafe_index_put.default": "aten.index_put_.default",
    "aten.scatter.src": "aten.scatter_.src",
    "aten.scatter.value": "aten.scatter_.value",
    "aten.scatter.reduce": "aten.scatter_.reduce",
    "aten.scatter.value_reduce": "aten.scatter_.value_reduce",
    "aten.scatter_add.default": "aten.scatter_add_.default",
    "aten.scatter_reduce.two": "aten.scatter_reduce_.two",
    "aten.index_add.default": "aten.index_add_.default",
    "aten.index_copy.default": "aten.index_copy_.default",
    "aten.index_reduce.default": "aten.index_reduce_.default",
    "aten.index_fill.int_Scalar": "aten.index_fill_.int_Scalar",
    "aten.index_fill.int_Tensor": "aten.index_fill_.int_Tensor",
    "aten.masked_scatter.default": "aten.masked_scatter_.default",
    "aten.masked_fill.Scalar": "aten.masked_fill_.Scalar",
    "aten.masked_fill.Tensor": "aten.masked_fill_.Tensor",
    "aten.put.default": "aten.put_.default",
    "_c10d_functional.all_reduce.default": "_c10d_functional.all_reduce_.default",
    "_c10d_functional.broadcast.default": "_c10d_functional.broadcast_.default",
}

#: ATen calls over lists, each result one element of the first list changed.
_CHANGED_LIST = ("_foreach_add", "_foreach_sub", "_foreach_mul", "_foreach_div", "_foreach_lerp", "_foreach_addcmul",
                 "_foreach_addcdiv", "_foreach_sqrt", "_foreach_neg", "_foreach_clamp_min", "_foreach_clamp_max",
                 "_foreach_maximum", "_foreach_minimum", "_foreach_pow", "_foreach_exp", "_foreach_abs",
                 "_foreach_reciprocal", "_foreach_sigmoid", "_foreach_copy", "_foreach_zero")  # fmt: skip


@runtime_checkable
class HigherOrderCall(Protocol):
    """What `Program.callables` holds for a higher-order operator.

    ``template`` is the flat argument list, ``spec`` its pytree, ``slots`` the positions in it that are filled from the
    call's arguments.
    """

    operator: object
    template: tuple[object, ...]
    spec: pytree.TreeSpec
    slots: tuple[int, ...]


def expose_clones(program: Program) -> Program:
    """The same program, the clones inside of functional calls made into `Copy` operations of their own."""
    callables = dict(program.callables)
    operations: list[Operation] = []
    for op in program.operations:
        found = _exposed(op, program, callables) if isinstance(op, Extern) else None
        operations.extend((op,) if found is None else found)
    if len(operations) == len(program.operations):
        return program
    return replace(program, operations=tuple(operations), callables=callables)


def _exposed(op: Extern, program: Program, callables: dict[str, object]) -> list[Operation] | None:
    if op.mutates or op.symbols or op.contract not in (Contract.FRESH, Contract.OUT):
        return None
    if op.target in _CHANGED_FIRST:
        return _changed_first(op)
    namespace, _, rest = op.target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace == "_c10d_functional" and name == "all_reduce_coalesced":
        return _changed_list(op, f"_c10d_functional.all_reduce_coalesced_.{overload}")
    if namespace == "aten" and name in _CHANGED_LIST:
        return _changed_list(op, f"aten.{name}_.{overload}")
    call = program.callables.get(op.target.removeprefix("callable:")) if op.target.startswith("callable:") else None
    if isinstance(call, HigherOrderCall):
        match getattr(call.operator, "_name", ""):
            case "auto_functionalized":
                return _auto_functionalized(op, call)
            case "auto_functionalized_v2":
                return _auto_functionalized_v2(op, call, program)
            case "triton_kernel_wrapper_functional":
                return _triton(op, call, callables)
            case _:
                pass
    return None


def _clone(op: Extern, number: int, source: View, target: View) -> Copy:
    return Copy(f"{op.name}_clone{number}", source, target, op.device, op.origins)


def _same_shape(source: Argument, target: View | None) -> bool:
    return (
        isinstance(source, View)
        and target is not None
        and source.sizes == target.sizes
        and source.dtype is target.dtype
    )


def _changed_first(op: Extern) -> list[Operation] | None:
    base, result = op.args[0] if op.args else None, op.results[0] if op.results else None
    if not _same_shape(base, result):  # type: ignore[arg-type]
        return None
    assert isinstance(base, View)
    assert result is not None
    changed = replace(
        op,
        target=_CHANGED_FIRST[op.target],
        args=(result, *op.args[1:]),
        contract=Contract.MUTATE,
        mutates=(result.buffer,),
    )
    return [_clone(op, 0, base, result), changed]


def _changed_list(op: Extern, target: str) -> list[Operation] | None:
    first = op.args[0] if op.args else None
    if not isinstance(first, Tuple) or len(first.items) != len(op.results) or not _exists(target):
        return None
    if not all(_same_shape(a, r) for a, r in zip(first.items, op.results, strict=True)):
        return None
    results = [r for r in op.results if r is not None]
    clones = [
        _clone(op, k, a, r) for k, (a, r) in enumerate(zip(first.items, results, strict=True)) if isinstance(a, View)
    ]
    changed = replace(
        op,
        target=target,
        args=(Tuple(tuple(results)), *op.args[1:]),
        contract=Contract.MUTATE,
        mutates=tuple(r.buffer for r in results),
    )
    return [*clones, changed]


def _exists(target: str) -> bool:
    found: object = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
    return found is not None


# -- higher-order operators -------------------------------------------------------------------------------------------


def _arguments(op: Extern, call: HigherOrderCall) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call's arguments as given: views and sizes as `Argument`, the rest as the values that they are."""
    leaves = list(call.template)
    for position, value in zip(call.slots, op.args, strict=True):
        leaves[position] = value
    args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", pytree.tree_unflatten(leaves, call.spec))
    return tuple(args), dict(kwargs)


def _argument(value: object) -> Argument:
    if isinstance(value, (View, Literal, Symbolic, Tuple)):
        return value
    if isinstance(value, (list, tuple)):
        return Tuple(tuple(_argument(v) for v in value))
    return Literal(value)  # type: ignore[arg-type]


def _call(op: Extern, operator: object, kwargs: Mapping[str, object], returned: Sequence[View | None],
          changed: Sequence[str]) -> Extern:  # fmt: skip
    """The custom operator itself, changing its arguments."""
    fresh = any(r is not None for r in returned)
    return replace(
        op,
        target=str(operator),
        args=(),
        kwargs=tuple((k, _argument(v)) for k, v in kwargs.items()),
        results=tuple(returned),
        contract=Contract.FRESH if fresh else Contract.MUTATE,
        mutates=tuple(dict.fromkeys(changed)),
    )


def _returns(operator: torch._ops.OpOverload) -> int:
    """How many flat results come before the clones: a call that returns nothing gives one None."""
    return max(1, len(operator._schema.returns))


def _auto_functionalized(op: Extern, call: HigherOrderCall) -> list[Operation] | None:
    """Version 1: the changed arguments are named by the schema, their clones follow the results."""
    args, kwargs = _arguments(op, call)
    operator = args[0]
    if not isinstance(operator, torch._ops.OpOverload):
        return None
    names = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    results = list(op.results[_returns(operator) :])
    clones: list[Operation] = []
    for name in names:
        given = kwargs.get(name)
        if given is None:
            results[:1] = []
        elif isinstance(given, View) and results and _same_shape(given, results[0]):
            made = results.pop(0)
            assert made is not None
            clones.append(_clone(op, len(clones), given, made))
            kwargs[name] = made
        else:
            return None
    changed = [c.target.buffer for c in clones if isinstance(c, Copy)]
    if not changed or results:
        return None
    return [*clones, _call(op, operator, kwargs, op.results[: _returns(operator)], changed)]


@dataclass(frozen=True)
class _Seen:
    """How a changed argument is a view of its base: the keyword arguments ``_<name>_...`` of version 2."""

    fields: Mapping[str, object]

    def view(self, base: View, start: Size | None) -> View | None:
        """The argument as a view; ``start`` is the base's absolute offset, which strided views are relative to."""
        if "slice_dim" in self.fields:
            return self._slice(base)
        if "size" not in self.fields:
            return base
        size, stride = self._sizes("size"), self._sizes("stride")
        offset = _size(self.fields.get("storage_offset"))
        if size is None or stride is None or offset is None or start is None:
            return None
        return replace(base, sizes=size, strides=stride, offset=_sum(base.offset, _sum(offset, -start)))

    def _slice(self, base: View) -> View | None:
        dim, first, stop = (_size(self.fields.get(f"slice_{f}")) for f in ("dim", "start", "end"))
        if not isinstance(dim, int) or not isinstance(first, int) or not isinstance(stop, int):
            return None
        extent = base.sizes[dim]
        if not isinstance(extent, int):
            return None
        first, stop = (min(max(v + extent if v < 0 else v, 0), extent) for v in (first, stop))
        sizes = (*base.sizes[:dim], max(stop - first, 0), *base.sizes[dim + 1 :])
        return replace(base, sizes=sizes, offset=_sum(base.offset, first * base.strides[dim]))

    def _sizes(self, name: str) -> tuple[Size, ...] | None:
        given = self.fields[name]
        if isinstance(given, Tuple):
            given = given.items
        found = [_size(v) for v in cast("Sequence[object]", given)]
        known = [v for v in found if v is not None]
        return tuple(known) if len(known) == len(found) else None


def _size(value: object) -> Size | None:
    if isinstance(value, Literal):
        value = value.value
    if isinstance(value, Symbolic):
        return int(value.expr) if value.expr.is_Integer else value.expr
    return value if isinstance(value, int) else None


def _sum(a: Size, b: Size) -> Size:
    out = a + b
    return out if isinstance(out, int) else expand(out)


def _only_writes(operator: torch._ops.OpOverload) -> bool:
    """Whether what the operator changes is a buffer for its result, whose old values it does not read.

    Operators can be marked so since torch 2.12.
    """
    mark = getattr(torch.Tag, "out", None)
    return mark is not None and mark in operator.tags


def _auto_functionalized_v2(op: Extern, call: HigherOrderCall, program: Program) -> list[Operation] | None:
    """Version 2: bases are cloned, and the changed arguments are views of these."""
    args, kwargs = _arguments(op, call)
    operator = args[0]
    if not isinstance(operator, torch._ops.OpOverload) or _only_writes(operator):
        return None
    bases = cast("list[object]", kwargs.pop("_all_bases"))
    results = op.results[_returns(operator) :]
    if len(results) != len(bases):
        return None
    clones = []
    made: list[View | None] = []
    for k, (base, result) in enumerate(zip(bases, results, strict=True)):
        if result is None or not isinstance(base, View) or not _same_shape(base, result):
            return None
        clones.append(_clone(op, k, base, result))
        made.append(result)
    changed: dict[str, None] = {}
    for a in operator._schema.arguments:
        if a.alias_info is None or not a.alias_info.is_write:
            continue
        prefix = f"_{a.name}_"
        fields = {k.removeprefix(prefix): kwargs.pop(k) for k in list(kwargs) if k.startswith(prefix)}
        index = fields.get("base_index")
        if "length" in fields or not (index is None or isinstance(index, int)):
            return None
        view = None
        if index is not None:
            base, target = bases[index], made[index]
            assert isinstance(base, View)
            assert target is not None
            start = _absolute_start(program, call, op, base)
            view = _Seen(fields).view(target, start)
            if view is None:
                return None
            changed[view.buffer] = None
        kwargs[a.name] = view
    untouched = {c.target.buffer for c in clones} - changed.keys()
    if untouched or not changed:
        return None
    return [*clones, _call(op, operator, kwargs, op.results[: _returns(operator)], tuple(changed))]


def _absolute_start(program: Program, call: HigherOrderCall, op: Extern, base: View) -> Size | None:
    """Offset of the base in its storage when the graph was traced, in elements: strided views count from there.

    Buffers made inside of the program begin at their first element. For inputs the capture has noted it.
    """
    for view, offset in zip(op.args, getattr(call, "offsets", ()), strict=False):
        if view == base:
            return cast("Size", offset)
    inputs = {i.view.buffer for i in program.inputs if isinstance(i, TensorInput)}
    return None if base.buffer in inputs else base.offset


def _triton(op: Extern, call: HigherOrderCall, callables: dict[str, object]) -> list[Operation] | None:
    """A user's Triton kernel: the tensors to clone become arguments that the kernel changes."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    args, kwargs = _arguments(op, call)
    names = kwargs.get("tensors_to_clone")
    given = kwargs.get("kwargs")
    if not isinstance(names, (list, tuple)) or not isinstance(given, dict):
        return None
    if any(not isinstance(given.get(n), View) for n in names):
        return None
    flat = [n for n in given if n in names]  # the order in which the call returns them
    if len(flat) != len(op.results):
        return None
    given = dict(given)
    clones: list[Operation] = []
    for name, result in zip(flat, op.results, strict=True):
        if result is None or not _same_shape(given[name], result):
            return None
        clones.append(_clone(op, len(clones), given[name], result))
        given[name] = result
    kwargs = {k: given if k == "kwargs" else v for k, v in kwargs.items() if k != "tensors_to_clone"}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    slots = tuple(k for k, v in enumerate(leaves) if isinstance(v, (View, Symbolic)))
    template = tuple(None if k in slots else v for k, v in enumerate(leaves))
    key = f"{op.target.removeprefix('callable:')}_in_place"
    fields = {"operator": wrap.triton_kernel_wrapper_mutation, "template": template, "spec": spec, "slots": slots}
    if hasattr(call, "offsets"):
        fields["offsets"] = (0,) * len(slots)
    callables[key] = replace(call, **fields)  # type: ignore[type-var]
    changed = tuple(r.buffer for r in op.results if r is not None)
    return [
        *clones,
        replace(
            op,
            target=f"callable:{key}",
            args=tuple(_argument(leaves[k]) for k in slots),
            contract=Contract.MUTATE,
            mutates=changed,
        ),
    ]
