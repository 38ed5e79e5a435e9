"""The C++ printer of wrapper lines: one function over handles of torch's small C interface, in a library of its own.

The text includes no header of torch or Python (see ``cpp_wrapper_prelude.h``). What the C interface cannot do exactly
(operators that it lacks, callables, sizes that a call makes known) is printed as a Python function of its own, by the
Python printer, and called through the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..ir.communication import Memory
from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.program import (
    Buffer,
    BufferKind,
    Literal,
    OpaqueInput,
    ProgramOutput,
    Symbolic,
    SymbolInput,
    TensorInput,
    UserKernel,
    View,
)
from .cpp_frame import Frame, GridKernel, PythonLine, dtype_code, identifier
from .cpp_frame_python import call_python, python_body
from .cpp_wrapper_calls import copy, extern
from .cpp_wrapper_launch import launch, launch_user
from .cpp_wrapper_source import translation_unit
from .python_wrapper import origin_text, python_line
from .wrapper_lines import (
    Align,
    Allocate,
    AllocatePool,
    CallExtern,
    Comment,
    CopyInto,
    End,
    Forget,
    Free,
    FreePool,
    GiveBack,
    Launch,
    LaunchUser,
    Line,
    Place,
    Return,
    Reuse,
    WrapperProgram,
    Zero,
    ZeroWorkspace,
)

#: -O1 is what a sequence of calls can use; more only costs time
CPP_WRAPPER_FLAGS = ("-O1", "-fno-exceptions", "-fvisibility=hidden")
_LINES_A_PART = 400


@dataclass(frozen=True)
class CppWrapper:
    """Source of the library, and what the loader has to give to a call of it.

    Attributes
    ----------
    inputs:
        For each positional input ``"tensor"`` (only its address is used), ``"held"`` (operators get it), ``"empty"``
        (without elements; may be None: a token of effects), ``"number"`` or ``"object"``.
    outputs:
        For each output ``("tensor", position among tensors)``, ``("number", position)``, ``("object", input)`` or
        ``("literal", value)``.
    kernels, constants:
        Names, in the order of the call's tables.
    lines:
        What Python runs, by number; number 0 is the host's own (an allocation that failed).
    operators:
        Global names of those lines: name -> torch operator.
    """

    source: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, object], ...]
    kernels: tuple[str, ...]
    constants: tuple[str, ...]
    lines: tuple[PythonLine, ...]
    operators: Mapping[str, str]
    tensors_out: int
    numbers_out: int


def print_line(frame: Frame, line: Line) -> None:
    """Print one wrapper line."""
    match line:
        case Comment(origins):
            if len(frame.parts[-1]) > _LINES_A_PART:
                frame.parts.append([])
            for text in dict.fromkeys(origin_text(o.node, o.op, o.location, o.code) for o in origins[:6]):
                frame.line("// " + re.sub(r"[^\x20-\x7e]", "?", text).replace("\\", "/").rstrip())
            frame.line(f"f.call->step = {frame.steps};")
            frame.steps += 1
        case AllocatePool(pool):
            name = frame.member(pool.name)
            if pool.memory is Memory.PLAIN:
                _allocate(frame, pool.device, torch.uint8, (pool.nbytes,), (1,), name)
            else:
                call_python(frame, f"    return ({pool.name}_memory(),)\n", [], [], [], [], [name], [])
            frame.addresses[identifier(pool.name)] = None
            frame.line(f"MP(aoti_torch_get_data_ptr({name}, (void**)&p.{identifier(pool.name)}));")
            if frame.poison:
                call_python(frame, "    poison_tensor(pool)\n", ["pool"], [name], [], [], [], [])
        case FreePool(pool):
            frame.line(f"mp::drop({frame.member(pool.name)});")
        case Allocate(buffer, view):
            _allocate(frame, buffer.device, view.dtype, view.sizes, view.strides, frame.member(buffer.name))
            frame.tensors.add(buffer.name)
            _poisoned(frame, buffer.name)
        case Place(buffer):
            if buffer.name in frame.program.tensors:
                frame.need_tensor(buffer.name)
        case Reuse(buffer, old):
            _reuse(frame, buffer, old)
        case Zero(buffer):
            frame.need_tensor(buffer.name)
            frame.line(f"MP(aoti_torch_zero_({frame.handle(buffer.name)}));")
        case Launch():
            launch(frame, line)
        case ZeroWorkspace(buffer):
            _workspace(frame, line, buffer)
        case LaunchUser(op):
            _launch_user(frame, line, op)
        case CallExtern(op):
            extern(frame, line, op)
        case CopyInto(op):
            copy(frame, op)
        case Free(buffer) | Forget(buffer) | End(buffer):
            _ends(frame, line, buffer)
        case Return(outputs):
            _returns(frame, outputs)
        case Align(buffers):
            _align(frame, buffers)
        case GiveBack(changed):
            for name in changed:
                made = frame.member(f"aligned_{name}")
                frame.line(f"if ({made}) MP(aoti_torch_copy_(f.given[input::{identifier(name)}], {made}, 0));")
        case _:
            raise UnsupportedError(f"the C++ wrapper does not know the line {type(line).__name__}")


def _allocate(
    frame: Frame, device: str, dtype: torch.dtype, sizes: tuple[Size, ...], strides: tuple[Size, ...], name: str
) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise UnsupportedError(f"the C++ wrapper does not know the device {device!r}")
    where = f"{dtype_code(dtype)}, {int(kind == 'cuda')}, {index or (0 if kind == 'cuda' else -1)}"
    shape = f"{len(sizes)}, {frame.array(sizes)}, {frame.array(strides)}"
    frame.line(f"MP_HOST(mp::empty(*f.call, {where}, {shape}, &{name}));")


def _poisoned(frame: Frame, buffer: str) -> None:
    if frame.poison:
        python_body(frame, f"    poison_tensor({buffer})\n", {}, (), ())


def _launch_user(frame: Frame, line: LaunchUser, op: UserKernel) -> None:
    """Straight to the driver where one variant of the kernel serves all calls, else through Python, which looks at the
    arguments and times configurations on them."""
    fixed = frame.users.get(line.kernel)
    if fixed is not None:
        launch_user(frame, line, fixed)
        return
    python_body(frame, _on_stream(op.device) + python_line(frame.program, line).source, {}, (), op.mutates)


def _workspace(frame: Frame, line: ZeroWorkspace, buffer: Buffer) -> None:
    """Through Python, which keeps the workspaces of streams."""
    body = _on_stream(buffer.device) + python_line(frame.program, line).source
    python_body(frame, body, {buffer.name: frame.member(buffer.name)}, (), ())
    frame.tensors.add(buffer.name)


def _on_stream(device: str) -> str:
    index = int(device.partition(":")[2] or 0)
    return f"    stream{index} = current_stream({index})\n" if device.startswith("cuda") else ""


def _reuse(frame: Frame, buffer: Buffer, old: Buffer) -> None:
    if frame.pool_place(buffer.name) is not None and old.name not in frame.tensors:
        if buffer.name in frame.program.tensors:
            frame.need_tensor(buffer.name)
        return
    wanted = frame.poison or buffer.name in frame.program.tensors
    ours = not frame.poison and old.name not in (*frame.inputs, *frame.constants)
    if ours and (not wanted or frame.same_base(buffer.name, old.name)):
        frame.take_over(buffer.name, old.name)
        return
    base, held, name = frame.program.base[buffer.name], frame.program.base[old.name], frame.member(buffer.name)
    if wanted:
        frame.make_view(
            frame.handle(old.name), held.dtype, View(buffer.name, base.dtype, base.sizes, base.strides), name
        )
    else:  # only its address is wanted
        frame.line(f"MP(aoti_torch_new_tensor_handle({frame.handle(old.name)}, &{name}));")
    frame.tensors.add(buffer.name)


def _ends(frame: Frame, line: Free | Forget | End, buffer: Buffer) -> None:
    name = buffer.name
    if frame.poison and isinstance(line, End):
        place = frame.pool_place(name)
        if place is not None:
            numbers = [frame.size(place.offset), frame.size(buffer.nbytes)]
            given, body = ["pool", "a0", "a1"], "    poison_range(pool, a0, a1)\n"
            call_python(frame, body, given, [frame.member(place.pool)], numbers, [], [], [])
    if name not in frame.tensors:
        return
    frame.tensors.discard(name)
    if name in frame.handed:
        return  # its handle lives on under another name
    frame.addressed.discard(frame.first.get(name, name))
    theirs = buffer.kind in (BufferKind.INPUT, BufferKind.PARAMETER) and not buffer.donated
    if frame.poison and isinstance(line, Free) and not theirs:
        frame.tensors.add(name)
        if buffer.kind is BufferKind.WORKSPACE and buffer.zero_fill:
            python_body(frame, f"    left_zero({name}, {name!r})\n", {}, (), ())
        else:
            _poisoned(frame, name)
        frame.tensors.discard(name)
    if name in frame.inputs:
        frame.line(f"f.call->host->release(f.call, input::{identifier(name)});")
        if f"aligned_{identifier(name)}" in frame.members:
            frame.line(f"mp::drop({frame.member(f'aligned_{name}')});")
    elif name not in frame.constants:
        frame.line(f"mp::drop({frame.handle(name)});")


def _align(frame: Frame, buffers: tuple[str, ...]) -> None:
    for name in buffers:
        made = frame.member(f"aligned_{name}")
        frame.line(f"if (mp::misaligned({frame.handle(name)})) {{")
        call_python(frame, f"    return (aligned({name}),)\n", [name], [frame.handle(name)], [], [], [made], [])
        frame.line(f"    {frame.handle(name)} = {made};")
        frame.line("}")


def _returns(frame: Frame, outputs: tuple[ProgramOutput, ...]) -> None:
    views = [o for o in outputs if isinstance(o, View)]
    whole = {v.buffer: k for k, v in enumerate(views) if frame.is_base(v)}
    taken, tensors, numbers = [], 0, 0
    for out in outputs:
        match out:
            case View():
                frame.need_tensor(out.buffer)
                target, handle = f"f.call->outputs[{tensors}]", frame.handle(out.buffer)
                held = out.buffer in frame.inputs or out.buffer in frame.constants
                if not frame.is_base(out):
                    frame.make_view(handle, frame.program.base[out.buffer].dtype, out, target)
                elif held or whole[out.buffer] != tensors:
                    frame.line(f"MP(aoti_torch_new_tensor_handle({handle}, &{target}));")
                else:
                    taken.append(f"{target} = mp::take({handle});")
                frame.outputs.append(("tensor", tensors))
                tensors += 1
            case Symbolic(expr) if str(expr).removeprefix("opaque_") in frame.objects and expr.is_Symbol:
                frame.outputs.append(("object", frame.objects[str(expr).removeprefix("opaque_")]))
            case Symbolic(expr):
                if not expr.is_integer:
                    raise UnsupportedError(f"the C++ wrapper cannot return {expr}, which is no integer")
                frame.line(f"f.call->numbers_out[{numbers}] = {frame.size(expr)};")
                frame.outputs.append(("number", numbers))
                numbers += 1
            case Literal(value):
                frame.outputs.append(("literal", value))
    for text in taken:
        frame.line(text)


def print_cpp(
    program: WrapperProgram,
    grids: Mapping[str, GridKernel] | None = None,
    *,
    users: Mapping[str, tuple[int | None, ...]] | None = None,
    poison: bool = False,
) -> CppWrapper:
    """The wrapper as C++ source; deterministic.

    Parameters
    ----------
    grids:
        For each GPU kernel, what its grid is computed from.
    users:
        For each user's kernel that has one variant, the bits of its arguments, None for those that are addresses.

    Raises
    ------
    UnsupportedError
        For what only the Python wrapper can do, naming it.
    """
    frame = Frame(program, grids or {}, users or {}, poison)
    kinds = []
    for i in program.inputs:
        match i:
            case TensorInput(position, view):
                frame.inputs[view.buffer] = position
                frame.tensors.add(view.buffer)
                kinds.append("empty" if view.numel == 0 else "held" if view.buffer in program.tensors else "tensor")
            case SymbolInput(_, symbol):
                if symbol.is_integer is False:
                    raise UnsupportedError(f"the C++ wrapper cannot take the number {symbol}, which is no integer")
                frame.symbols[symbol] = f"s.{identifier(str(symbol))}"
                kinds.append("number")
            case OpaqueInput(position, name):
                frame.objects[name] = position
                kinds.append("object")
    for b in program.plan.program.buffers.values():
        if b.kind is BufferKind.CONSTANT:
            frame.constants[b.name] = len(frame.constants)
            frame.tensors.add(b.name)
    for line in program.lines:
        print_line(frame, line)
    count = {kind: sum(k == kind for k, _ in frame.outputs) for kind in ("tensor", "number")}
    return CppWrapper(
        translation_unit(frame),
        tuple(kinds),
        tuple(frame.outputs),
        tuple(frame.kernels),
        tuple(frame.constants),
        tuple(frame.lines),
        frame.operators,
        count["tensor"],
        count["number"],
    )


__all__ = ["CPP_WRAPPER_FLAGS", "CppWrapper", "GridKernel", "PythonLine", "print_cpp"]
