"""Readable text of kernels, operations, programs and plans: for dumps, goldens and error messages.

The text is for people and for comparing; nothing reads it back. It is deterministic: equal data prints equally.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

import sympy
import torch

from .communication import Memory
from .in_flight import Collective, HostCopy, Wait
from .loops import (
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Level,
    Load,
    Node,
    Random,
    Range,
    Reduce,
    Size,
    Store,
    StoreMode,
)
from .plan import External, InPlaceOf, InPool, Own, Placement, Plan
from .program import (
    Argument,
    Buffer,
    Copy,
    Extern,
    KernelOp,
    Literal,
    OpaqueInput,
    Operation,
    Origin,
    Program,
    ProgramInput,
    ProgramOutput,
    SizeSource,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    UserKernel,
    View,
    evaluate,
)
from .user_kernel import Fixed, format_fixed

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def dtype_name(dtype: torch.dtype) -> str:
    """``f32`` for ``torch.float32``; torch's own name for the rare ones."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def format_bytes(count: int) -> str:
    """``4.2 MB``: decimal units, as the device vendors and the measured tables use."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("the loop returns")


def format_node(node: Node) -> str:
    """One value, its operands as ``v<k>``."""
    match node:
        case Load():
            masked = "" if node.mask is None else f" if v{node.mask} else {node.other}"
            return f"{node.buffer}[{node.index}]{masked} : {dtype_name(node.dtype)}"
        case Index():
            return f"index({node.expr}) : {dtype_name(node.dtype)}"
        case Constant():
            return f"{node.value} : {dtype_name(node.dtype)}"
        case Call() | Reduce():
            name = f"reduce_{node.op}" if isinstance(node, Reduce) else node.op
            return f"{name}({', '.join(f'v{k}' for k in node.args)}) : {dtype_name(node.dtype)}"
        case Cast():
            return f"cast(v{node.arg}) : {dtype_name(node.dtype)}"
        case Item():
            return f"v{node.arg}.{node.item} : {dtype_name(node.dtype)}"
        case Random():
            return f"{node.kind}(seed=v{node.seed}, offset=v{node.offset}) : {dtype_name(node.dtype)}"
        case _:
            assert_never(node)


def format_store(store: Store) -> str:
    """``b[index] = v3 : f32``, with ``add=`` and so on for atomic ones and ``total=`` for totals."""
    sign = "=" if store.mode is StoreMode.SET else f"{store.mode.value}="
    masked = "" if store.mask is None else f" if v{store.mask}"
    return f"{store.buffer}[{store.index}] {sign} v{store.value}{masked} : {dtype_name(store.dtype)}"


def format_kernel(kernel: Kernel, indent: str = "") -> str:
    """``for x0 < 4, x1 < 8 | r0 < 16:`` and a line per value and store; row ranges come after the bar.

    Values that are the same for a whole row are marked with ``=``, those that are constant with ``:=``, those of a
    point with ``<-``.
    """
    head = _format_ranges(kernel.outer) or "once"
    if kernel.row:
        head += f" | {_format_ranges(kernel.row)}"
    marks = {Level.CONSTANT: ":=", Level.OUTER: "=", Level.POINT: "<-"} if kernel.row else {}
    lines = [f"{indent}for {head}:"]
    for k, (node, level) in enumerate(zip(kernel.nodes, kernel.levels, strict=True)):
        lines.append(f"{indent}  v{k} {marks.get(level, '=')} {format_node(node)}")
    lines += [f"{indent}  {format_store(s)}" for s in kernel.stores]
    return "\n".join(lines)


def _format_ranges(ranges: Iterable[Range]) -> str:
    return ", ".join(f"{r.symbol} < {r.size}" for r in ranges)


def format_view(view: View) -> str:
    """``b:f32[4, 8]``, strides and offset only where they are not the plain ones."""
    text = f"{view.buffer}:{dtype_name(view.dtype)}[{', '.join(map(str, view.sizes))}]"
    if view.strides != _dense_strides(view.sizes):
        text += f" strides ({', '.join(map(str, view.strides))})"
    return text if view.offset == 0 else f"{text} + {view.offset}"


def _dense_strides(sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for s in reversed(sizes):
        strides.append(step)
        step = step * s
    return tuple(reversed(strides))


def format_argument(argument: Argument) -> str:
    """An argument of an extern call."""
    match argument:
        case View():
            return format_view(argument)
        case Literal():
            return str(argument.value) if not isinstance(argument.value, str) else repr(argument.value)
        case Symbolic():
            return str(argument.expr)
        case Tuple():
            return f"[{', '.join(format_argument(a) for a in argument.items)}]"
        case _:
            assert_never(argument)


def format_origin(origin: Origin) -> str:
    """``addmm: y = self.fc(x)  (model.py:12)``, as much of it as is known."""
    code = " ".join(origin.code.split())
    parts = [origin.node or origin.op]
    if code:
        parts.append(f"{code}  ({origin.location})" if origin.location else code)
    elif origin.location:
        parts.append(origin.location)
    elif origin.module:
        parts.append(origin.module)
    return ": ".join(p for p in parts if p)


def format_origins(origins: tuple[Origin, ...], indent: str = "") -> list[str]:
    """Comment lines: FX nodes that share a user line are joined, in order of first appearance."""
    by_line: dict[tuple[str, str], list[str]] = {}
    for o in origins:
        by_line.setdefault((o.location or o.module, " ".join(o.code.split())), []).append(o.node or o.op)
    lines = []
    for (where, code), nodes in by_line.items():
        text = ", ".join(dict.fromkeys(n for n in nodes if n))
        if code:
            text += f": {code}" if text else code
        if where:
            text += f"  ({where})"
        if text:
            lines.append(f"{indent}# {text}")
    return lines


def format_operation(op: Operation, indent: str = "") -> str:
    """An operation over several lines: what the user wrote (as comments), then what it does."""
    lines = format_origins(op.origins, indent)
    mutates = f", mutates {', '.join(op.mutates)}" if op.mutates else ""
    match op:
        case KernelOp():
            lines.append(f"{indent}{op.name}: kernel on {op.device}{mutates}")
            lines.append(format_kernel(op.kernel, indent + "  "))
        case Extern():
            arguments = [format_argument(a) for a in op.args]
            arguments += [f"{k}={format_argument(a)}" for k, a in op.kwargs]
            results = ", ".join("_" if v is None else format_view(v) for v in op.results) or "()"
            lines.append(f"{indent}{op.name}: {op.contract.value} {_called(op)} on {op.device}{mutates}")
            lines.append(f"{indent}  {results} = {op.target}({', '.join(arguments)})")
            if op.scratch != 0:
                lines.append(f"{indent}  scratch {op.scratch} bytes")
            lines += [f"{indent}  {symbol} = result {position}" for position, symbol in op.symbols]
        case Copy():
            lines.append(f"{indent}{op.name}: copy on {op.device}{mutates}")
            lines.append(f"{indent}  {format_view(op.target)} = {format_view(op.source)}")
        case UserKernel():
            lines.append(f"{indent}{op.name}: user kernel on {op.device}{mutates}")
            lines += [f"{indent}  {text}" for text in format_user_kernel(op)]
        case _:
            assert_never(op)
    return "\n".join(lines)


def _called(op: Extern) -> str:
    if isinstance(op, Collective):
        return f"collective of group {op.group!r}"
    if isinstance(op, HostCopy):
        return "offload" if op.offloads else "prefetch"
    return "wait" if isinstance(op, Wait) else "extern"


def format_user_kernel(op: UserKernel) -> list[str]:
    """The launch of a user's Triton kernel: its arguments, and a line for each configuration."""
    made = dict(op.descriptors)
    arguments = []
    for name, value in op.arguments:
        text = format_fixed(value.value) if isinstance(value, Fixed) else format_argument(value)
        if name in made:
            text = f"descriptor({text}, block [{', '.join(map(str, made[name].block))}])"
        arguments.append(f"{name}={text}")
    lines = [f"{op.kernel.function.name}({', '.join(arguments)})"]
    for config, grid in zip(op.kernel.configs, op.grids, strict=True):
        values = [f"{n}={format_fixed(v)}" for n, v in (*config.constants, *config.options, *op.options)]
        lines.append(f"grid ({', '.join(map(str, grid))}){': ' if values else ''}{', '.join(values)}")
    tuning = {"key": op.kernel.key, "restore": op.kernel.restore_value, "zero": op.kernel.reset_to_zero}
    lines += [f"{what} {', '.join(names)}" for what, names in tuning.items() if names]
    return lines


def format_buffer(buffer: Buffer) -> str:
    """One line: name, kind, bytes and where it comes from."""
    flags = (", donated" if buffer.donated else "") + (", zero-filled" if buffer.zero_fill else "")
    if buffer.memory is not Memory.PLAIN:
        flags += f", {buffer.memory.value} memory of group {buffer.group!r}"
    origin = format_origin(buffer.origin)
    text = f"{buffer.name}: {buffer.kind.value} {dtype_name(buffer.dtype)}, {_format_size(buffer.nbytes)}, "
    return f"{text}{buffer.device}{flags}" + (f"  # {origin}" if origin else "")


def _format_size(nbytes: Size) -> str:
    if isinstance(nbytes, (int, sympy.Integer)):
        return f"{int(nbytes)} bytes"
    return f"{nbytes} bytes"


def format_input(item: ProgramInput) -> str:
    match item:
        case TensorInput():
            return format_view(item.view)
        case SymbolInput():
            return f"{item.symbol}: integer{_format_source(item.source)}"
        case OpaqueInput():
            return f"{item.name}: passed on"
        case _:
            assert_never(item)


def _format_source(source: SizeSource | None) -> str:
    if source is None:
        return ""
    read = f"{'stride' if source.stride else 'size'} {source.dim} of input {source.position}"
    if (source.factor, source.offset) != (1, 0):
        read = f"({read} - {source.offset}) / {source.factor}"
    return f", {read}"


def format_output(item: ProgramOutput) -> str:
    return format_argument(item)


def format_program(program: Program) -> str:
    """The whole program: inputs, buffers, operations in program order, outputs."""
    lines = [f"program {program.name} ({program.phase.value})"]
    if program.hints:
        lines.append(
            "hints " + ", ".join(f"{s} = {n}" for s, n in sorted(program.hints.items(), key=lambda i: i[0].name))
        )
    lines.append("inputs")
    lines += [f"  {i.position}: {format_input(i)}" for i in program.inputs]
    lines.append("buffers")
    lines += [f"  {format_buffer(b)}" for b in program.buffers.values()]
    lines.append("operations")
    lines += [format_operation(op, "  ") for op in program.operations]
    lines.append("outputs")
    lines += [f"  {format_output(o)}" for o in program.outputs]
    return "\n".join(lines) + "\n"


def summarize_program(program: Program) -> str:
    """One line of counts, for logs and for the head of a comparison."""
    kinds = {KernelOp: "kernels", Extern: "externs", Copy: "copies", UserKernel: "user kernels"}
    counts = {name: sum(isinstance(op, kind) for op in program.operations) for kind, name in kinds.items()}
    total = sum(evaluate(b.nbytes, program.hints) for b in program.buffers.values())
    counts = {name: n for name, n in counts.items() if n or name != "user kernels"}
    return ", ".join(f"{n} {name}" for name, n in counts.items()) + f", {format_bytes(total)} in buffers"


def format_plan(plan: Plan) -> str:
    """Steps with their live bytes, then each buffer's lifetime and place, then the certificate."""
    lines = [f"plan of {plan.program.name}"]
    for step, (name, live) in enumerate(zip(plan.order, plan.timeline, strict=True)):
        lines.append(f"  {step:>5}  {name:<28} {live} bytes live")
    lines.append("buffers")
    for name, lifetime in plan.lifetimes.items():
        place = format_placement(plan.placements[name])
        lines.append(f"  {name:<28} [{lifetime.start}, {lifetime.stop})  {place}")
    for pool in plan.pools:
        lines.append(
            f"pool {pool.name}: {_format_size(pool.nbytes)} on {pool.device}, "
            f"[{pool.lifetime.start}, {pool.lifetime.stop})"
            + ("" if pool.memory is Memory.PLAIN else f", {pool.memory.value} memory of group {pool.group!r}")
        )
    c = plan.certificate
    lines.append(
        f"peak {c.peak} bytes (program order {c.program_peak}, lower bound {c.order_bound}); "
        f"placed {c.placed_peak}, of it alignment {c.alignment}{'; ' + c.note if c.note else ''}"
    )
    lines += [f"note {where}: {why}" for where, why in plan.notes]
    lines += [f"predicted peak on {device}: {count} bytes" for device, count in plan.predicted_peak.items()]
    return "\n".join(lines) + "\n"


def format_placement(placement: Placement) -> str:
    match placement:
        case External():
            return "the caller's"
        case Own():
            return "an allocation of its own"
        case InPool():
            return f"pool {placement.pool} + {placement.offset}"
        case InPlaceOf():
            return f"in place of {placement.buffer}"
        case _:
            assert_never(placement)
