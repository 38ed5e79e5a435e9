"""The wrapper as data: one line a thing that happens, made once from the plan and printed by each language.

A line decides nothing: what is allocated, where, in which order and when it is freed is in the plan already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ..ir.loops import Size
from ..ir.plan import InPlaceOf, InPool, Own, Plan, Pool
from ..ir.program import (
    EXTERNAL_KINDS,
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Operation,
    Origin,
    ProgramInput,
    ProgramOutput,
    TensorInput,
    UserKernel,
    View,
)
from ..ir.template import Template


@dataclass(frozen=True, slots=True)
class Comment:
    """Where the next lines come from."""

    origins: tuple[Origin, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class AllocatePool:
    pool: Pool


@dataclass(frozen=True, slots=True)
class FreePool:
    pool: Pool


@dataclass(frozen=True, slots=True)
class Allocate:
    """An own allocation; ``view`` is the shape that most of its users want."""

    buffer: Buffer
    view: View


@dataclass(frozen=True, slots=True)
class Place:
    """The buffer starts to live at ``offset`` bytes of a pool."""

    buffer: Buffer
    pool: Pool
    offset: Size


@dataclass(frozen=True, slots=True)
class Reuse:
    """The buffer takes the storage of another, which ends here."""

    buffer: Buffer
    old: Buffer


@dataclass(frozen=True, slots=True)
class Zero:
    """Fill with zeros."""

    buffer: Buffer


@dataclass(frozen=True, slots=True)
class ZeroWorkspace:
    """The buffer is the stream's workspace of zeros, which its user leaves zero again."""

    buffer: Buffer


@dataclass(frozen=True, slots=True)
class Launch:
    """Run one of our kernels: ``kernel`` names the source, ``buffers`` and ``symbols`` are its arguments.

    ``offsets`` are bytes to add to each buffer's address; empty for none. ``checks`` says, for a kernel of the CPU that
    checks indices, whose they are; empty where it checks none.
    """

    operation: str
    kernel: str
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    device: str
    offsets: tuple[int, ...] = ()
    checks: str = ""


@dataclass(frozen=True, slots=True)
class LaunchUser:
    """Run a user's Triton kernel: ``kernel`` names what was built of it.

    ``tensors`` are the parameters that it gets as tensors: TMA descriptors are made of them, or runs are timed and what
    they change is put back. The rest it gets as addresses.
    """

    operation: UserKernel
    kernel: str
    tensors: frozenset[str]


@dataclass(frozen=True, slots=True)
class CallExtern:
    """Call a torch operator; with contract OUT it writes into ``operation.results``' buffers."""

    operation: Extern


@dataclass(frozen=True, slots=True)
class CopyInto:
    operation: Copy


@dataclass(frozen=True, slots=True)
class Free:
    """Give the storage back (an own allocation or a donated input)."""

    buffer: Buffer


@dataclass(frozen=True, slots=True)
class End:
    """The buffer's place in its pool is free from here on (a comment, unless poison mode fills it)."""

    buffer: Buffer


@dataclass(frozen=True, slots=True)
class Forget:
    """The name ends; its storage lives on under the name that took it, and must not be held by two."""

    buffer: Buffer


@dataclass(frozen=True, slots=True)
class Return:
    outputs: tuple[ProgramOutput, ...]


@dataclass(frozen=True, slots=True)
class Align:
    """Inputs that GPU kernels use must start at multiples of 16 bytes, as the kernels are built to expect.

    One that does not is replaced by a copy of itself; ``changed`` are those of ``buffers`` that the program changes and
    its caller keeps: `GiveBack` copies them back.
    """

    buffers: tuple[str, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveBack:
    """What was changed in copies that `Align` made goes to the inputs themselves."""

    changed: tuple[str, ...]


Line = (
    Comment | AllocatePool | FreePool | Allocate | Place | Reuse | Zero | ZeroWorkspace | Launch | LaunchUser
    | CallExtern | CopyInto | Free | End | Forget | Return | Align | GiveBack
)  # fmt: skip


@dataclass(frozen=True)
class WrapperProgram:
    """Everything a printer needs: the inputs, the lines, and each buffer's base view."""

    name: str
    inputs: tuple[ProgramInput, ...]
    lines: tuple[Line, ...]
    base: Mapping[str, View]
    plan: Plan
    #: buffers that some line needs as a tensor (not only as an address)
    tensors: frozenset[str]


def wrapper_lines(
    plan: Plan,
    kernels: Mapping[str, tuple[str, tuple[str, ...], tuple[sympy.Symbol, ...]]],
    offsets: Mapping[str, tuple[int, ...]] | None = None,
) -> WrapperProgram:
    """The plan as lines.

    Parameters
    ----------
    kernels:
        For each kernel operation: (name of its source, its buffers in argument order, its size symbols).
    offsets:
        For kernel operations that want them, bytes to add to the address of each of those buffers.
    """
    offsets = offsets or {}
    program = plan.program
    base = base_views(plan)
    starts: dict[int, list[str]] = {}
    stops: dict[int, list[str]] = {}
    for name, life in plan.lifetimes.items():
        b = program.buffers[name]
        if b.kind not in EXTERNAL_KINDS:
            starts.setdefault(life.start, []).append(name)
        stops.setdefault(life.stop, []).append(name)
    pool_by_name = {p.name: p for p in plan.pools}
    taken = {p.buffer for p in plan.placements.values() if isinstance(p, InPlaceOf)}
    align = alignment_check(plan)
    lines: list[Line] = [align] if align.buffers else []
    for k, op_name in enumerate(plan.order):
        op = program.by_name[op_name]
        lines.append(Comment(op.origins))
        lines.extend(AllocatePool(p) for p in plan.pools if p.lifetime.start == k)
        returned = _returned(op)
        for name in starts.get(k, ()):
            line = _birth(plan, name, base, pool_by_name, returned)
            if line is not None:
                lines.append(line)
            if program.buffers[name].zero_fill and not isinstance(line, ZeroWorkspace):
                lines.append(Zero(program.buffers[name]))
        lines.extend(_run(op, kernels, offsets.get(op_name, ())))
        for name in stops.get(k + 1, ()):
            lines.extend(_death(plan, name, taken, pool_by_name))
        lines.extend(FreePool(p) for p in plan.pools if p.lifetime.stop == k + 1)
    if align.changed:
        lines.append(GiveBack(align.changed))
    lines.extend(FreePool(p) for p in plan.arenas)
    lines.append(Return(program.outputs))
    return WrapperProgram(
        program.name, program.inputs, tuple(lines), base, plan, _tensors_needed(plan, frozenset(base))
    )


def alignment_check(plan: Plan) -> Align:
    """The inputs that GPU kernels read or write."""
    program = plan.program
    used: set[str] = set()
    changed: set[str] = set()
    for op in program.operations:
        changed.update(plan.storage_of(b) for b in (*op.mutates, *op.writes))
        if isinstance(op, KernelOp) and op.device.startswith("cuda"):
            used.update(op.kernel.read_buffers, op.kernel.written_buffers)
        if isinstance(op, UserKernel | Template) and op.device.startswith("cuda"):
            used.update(op.reads)
    inputs = [i.view.buffer for i in program.inputs if isinstance(i, TensorInput)]
    checked = tuple(dict.fromkeys(b for b in inputs if b in used))
    return Align(checked, tuple(b for b in checked if b in changed and not program.buffers[b].donated))


def _returned(op: Operation) -> frozenset[str]:
    """Buffers that come out of the call itself."""
    if isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC):
        return frozenset(v.buffer for v in op.results if v is not None)
    return frozenset()


def _birth(
    plan: Plan, name: str, base: Mapping[str, View], pools: Mapping[str, Pool], returned: frozenset[str]
) -> Line | None:
    buffer = plan.program.buffers[name]
    match plan.placements[name]:
        case Own() if buffer.kind is BufferKind.WORKSPACE and buffer.zero_fill:
            return ZeroWorkspace(buffer)
        case Own():
            return None if name in returned else Allocate(buffer, base[name])
        case InPool(pool, offset):
            return Place(buffer, pools[pool], offset)
        case InPlaceOf(old):
            return Reuse(buffer, plan.program.buffers[old])
        case _:
            return None


def _death(plan: Plan, name: str, taken: set[str], pools: Mapping[str, Pool]) -> list[Line]:
    buffer = plan.program.buffers[name]
    if name in taken:
        return [Forget(buffer)]
    if buffer.kind in EXTERNAL_KINDS:
        return [Free(buffer)] if buffer.donated and name not in plan.program.output_buffers else []
    placement = plan.placements[plan.storage_of(name)]
    if isinstance(placement, InPool):
        return [End(buffer)]
    return [Free(buffer)]


def _run(
    op: Operation,
    kernels: Mapping[str, tuple[str, tuple[str, ...], tuple[sympy.Symbol, ...]]],
    offsets: tuple[int, ...],
) -> tuple[Line, ...]:
    match op:
        case KernelOp():
            source, buffers, symbols = kernels[op.name]
            checks = _indexed_at(op) if op.device == "cpu" and op.kernel.checks_indices else ""
            return (Launch(op.name, source, buffers, symbols, op.device, offsets, checks),)
        case Template():
            source, buffers, symbols = kernels[op.name]
            names = (source,) if op.product is None else op.product.launches(source)
            return tuple(Launch(op.name, name, buffers, symbols, op.device, offsets) for name in names)
        case Extern():
            return (CallExtern(op),)
        case Copy():
            return (CopyInto(op),)
        case UserKernel():
            return (LaunchUser(op, kernels[op.name][0], tensor_parameters(op)),)


def tensor_parameters(op: UserKernel) -> frozenset[str]:
    """Parameters of a user's kernel that its launcher needs as tensors.

    On a CPU all are: nothing but Triton's interpreter runs a kernel there, and that takes no addresses.
    """
    if op.device == "cpu":
        return frozenset(n for n, a in op.arguments if isinstance(a, View))
    names = {n for n, _ in op.descriptors}
    if len(op.kernel.configs) > 1:
        names |= {n for n, a in op.arguments if isinstance(a, View) and a.buffer in op.mutates}
    return frozenset(names)


#: what operators that take indices have in their names
_INDEXED = ("embedding", "gather", "index", "scatter", "take", "nll_loss")


def _indexed_at(op: KernelOp) -> str:
    """The operators of a kernel that take indices, with the user's lines."""
    found = [o for o in op.origins if any(word in o.op for word in _INDEXED)] or list(op.origins)
    return "; ".join(dict.fromkeys(" ".join(filter(None, (o.op, o.location))) for o in found)) or op.name


def base_views(plan: Plan) -> dict[str, View]:
    """For each buffer the shape to allocate it in: what the caller gets, else what an extern wants, else flat."""
    program = plan.program
    found: dict[str, View] = {}

    def offer(view: View | None) -> None:
        if view is None or view.buffer in found or view.offset != 0:
            return
        b = program.buffers[view.buffer]
        if view.dtype == b.dtype and _covers(view, b):
            found[view.buffer] = view

    for i in program.inputs:
        if isinstance(i, TensorInput):
            found[i.view.buffer] = i.view
    for op in program.operations:
        if isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC):
            for view in op.results:
                if view is not None:
                    found[view.buffer] = view
    for out in program.outputs:
        if isinstance(out, View):
            offer(out)
    for op in program.operations:
        if isinstance(op, Extern):
            for view in op.results:
                offer(view)
            for a in op.args:
                if isinstance(a, View):
                    offer(a)
        elif isinstance(op, Copy):
            offer(op.source)
            offer(op.target)
        elif isinstance(op, UserKernel):
            for view in op.views:
                offer(view)
    for b in program.buffers.values():
        if b.kind is BufferKind.CONSTANT and b.name in program.constants:
            t = program.constants[b.name]
            found[b.name] = View(b.name, t.dtype, tuple(t.shape), tuple(t.stride()), 0)
        if b.name not in found:
            count = _elements(b)
            found[b.name] = View(b.name, b.dtype, (count,), (1,), 0)
    return found


def _elements(b: Buffer) -> Size:
    if isinstance(b.nbytes, int):
        return -(-b.nbytes // b.dtype.itemsize)
    return sympy.expand_mul(b.nbytes / b.dtype.itemsize)


def _covers(view: View, b: Buffer) -> bool:
    extent: Size = 1
    for n, s in zip(view.sizes, view.strides, strict=True):
        if n == 0:
            return False
        extent = extent + (n - 1) * s
    return bool(sympy.expand(extent * view.dtype.itemsize - b.nbytes) == 0)


def _tensors_needed(plan: Plan, known: frozenset[str]) -> frozenset[str]:
    """Buffers used as tensors: by extern calls and copies, or returned."""
    program = plan.program
    need: set[str] = set(program.output_buffers)
    for op in program.operations:
        if isinstance(op, Template):
            continue
        if isinstance(op, (Extern, Copy)):
            need.update(op.reads)
            need.update(op.writes)
        elif isinstance(op, UserKernel):
            tensors = tensor_parameters(op)
            need.update(a.buffer for n, a in op.arguments if n in tensors and isinstance(a, View))
    return frozenset(need & known)
