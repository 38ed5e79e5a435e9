"""Launches in a C++ wrapper: functions of the CPU are called, kernels of a GPU go straight to the driver.

The text knows neither a kernel's address nor its block sizes: both stand in the call's table, which is filled in after
the kernels are built and tuned. So the wrapper can be compiled meanwhile, and no tuning changes it. A grid that depends
on no size is a number of that table too.
"""

from __future__ import annotations

import sympy

from ..ir.program import View
from .cpp_frame import Frame, GridKernel
from .cpp_frame_python import call_python
from .printers import cexpr
from .wrapper_lines import Launch, LaunchUser

_INT32_LIMIT = 2**31 - 1


def launch(frame: Frame, line: Launch) -> None:
    """Print one launch."""
    args = [frame.address(b) for b in line.buffers]
    for k, offset in enumerate(line.offsets):
        args[k] += f" + {offset}" if offset else ""
    index = frame.kernels.setdefault(line.kernel, len(frame.kernels))
    numbers = [frame.size(s) for s in line.symbols]
    if line.device == "cpu":
        kinds = ", ".join(["char*"] * len(args) + ["int64_t"] * len(numbers))
        result = "const char*" if line.checks else "void"
        call = f"(({result} (*)({kinds}))kernels[{index}].function)({', '.join([*args, *numbers])})"
        if not line.checks:
            frame.line(f"{call};  // {line.kernel}")
            return
        frame.line(f"if (const char* bad = {call}) {{  // {line.kernel}")
        raising = f"    raise_out_of_range(bad, {line.checks!r})\n"
        count = len(frame.lines)
        call_python(frame, raising, ["bad"], [], ["(int64_t)bad"], [], [], [])
        frame.lines_unneeded_from(count)
        frame.line("}")
        return
    kernel = frame.grids[line.kernel]
    names = {s: frame.size(v) for s, v in zip(kernel.symbols, line.symbols, strict=True)}
    device = int(line.device.partition(":")[2] or 0)
    frame.gpus[device] = None
    # all arguments are eight bytes wide; after them come two pointers to scratch memory, which no kernel of ours needs
    values = [f"(uint64_t)({a})" for a in (*args, *numbers)] + ["0", "0"]
    array = frame.local("uint64_t[]", "{" + ", ".join(values) + "}")
    start = f'MP_LAUNCH({index}, "{line.kernel}", {grid(kernel, index, names)}, f.stream{device}, {array});'
    if not kernel.index_limit:
        frame.line(start)
        return
    fits = " && ".join(f"({cexpr(e, names)}) <= {_INT32_LIMIT}L" for e in kernel.index_limit)
    frame.line(f"if (__builtin_expect({fits}, 1)) {{")
    frame.line(f"    {start}")
    frame.line("} else {  // more than the kernel can count: another one is built that counts in 64 bits")
    given = [f"a{k}" for k in range(len(args) + len(numbers))]
    text = f"    {line.kernel}({', '.join([f'current_stream({device})', *given])})\n"
    texts = [*(f"(int64_t)({a})" for a in args), *numbers]
    call_python(frame, text, given, [], texts, [], [], [])
    frame.line("}")


def launch_user(frame: Frame, line: LaunchUser, fixed: tuple[int | None, ...]) -> None:
    """Print the launch of a user's kernel of which the program fixes all but the addresses (None among ``fixed``)."""
    op = line.operation
    index = frame.kernels.setdefault(line.kernel, len(frame.kernels))
    addresses = []
    for _, value in op.arguments:
        if isinstance(value, View):
            offset = frame.size(value.offset * value.dtype.itemsize)
            addresses.append(frame.address(value.buffer) + (f" + {offset}" if offset != "0L" else ""))
    rest = iter(addresses)
    values = [f"(uint64_t)({next(rest)})" if bits is None else f"{bits}UL" for bits in fixed] + ["0", "0"]
    device = int(op.device.partition(":")[2] or 0)
    frame.gpus[device] = None
    array = frame.local("uint64_t[]", "{" + ", ".join(values) + "}")
    x, y, z = (frame.size(n) for n in op.grids[0])
    frame.line(f'MP_LAUNCH_USER({index}, "{line.kernel}", {x}, {y}, {z}, f.stream{device}, {array});')


def grid(kernel: GridKernel, index: int, names: dict[sympy.Symbol, str]) -> str:
    """The number of program instances as C++ text."""
    if all(isinstance(numel, int) or numel.is_Integer for numel, _ in kernel.axes):
        return f"kernels[{index}].grid"
    return "*".join(
        f"((({cexpr(numel, names)}) + kernels[{index}].blocks[{k}] - 1) / kernels[{index}].blocks[{k}])"
        for k, (numel, _) in enumerate(kernel.axes)
    )
