"""The translation unit around a C++ wrapper's lines: prelude, imports by name, the frame, the entry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from ..ir.program import SymbolInput
from .cpp_frame import Frame, identifier
from .printers import cexpr

_VISIBLE = '__attribute__((visibility("default")))'
_LOCALS = """\
    auto &t = f.t; auto &p = f.p; auto &s = f.s; auto* in = f.call->inputs; (void)t, (void)p, (void)s;
    auto *kernels = f.call->kernels; auto *constants = f.call->constants;
    (void)in, (void)kernels, (void)constants;"""


@cache
def _header(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").replace("#pragma once\n", "")


def translation_unit(frame: Frame) -> str:
    """The whole source of a wrapper's library."""
    headers = ("cpp_wrapper_prelude.h", "cpp_sizes.h", *(["cpp_wrapper_cuda.h"] if frame.gpus else []))
    out = [_header(h) for h in headers]
    out += [f"static int32_t(*{s.name}){s.signature};" for s in frame.shims.values()]
    out += _imports(frame)
    out += [f"static const int64_t {n}[] = {{{', '.join(map(cexpr, k))}}};" for k, n in frame.arrays.items()]
    inputs = [f"constexpr int32_t {identifier(n)} = {k};" for n, k in frame.inputs.items()]
    out.append("namespace input {\n" + "\n".join(inputs) + "\n}")
    out += _frame(frame)
    for k, part in enumerate(frame.parts):
        out += [f"static int32_t part{k}(Frame& f) {{", _LOCALS, *part, "    return 0;", "}"]
    out += _entry(frame)
    return "\n".join(out) + "\n"


def _imports(frame: Frame) -> list[str]:
    """The table of functions that the loader finds by name."""
    tables = "MP_TORCH(MP_IMPORT)" + (" MP_CUDA(MP_IMPORT)" if frame.gpus else "")
    shims = "".join(f'    {{"{n}", (void**)&{n}}},\n' for n in frame.shims)
    return [
        f'extern "C" {{\n{_VISIBLE} Import memplan_imports[] = {{{tables}\n{shims}}};',
        f"{_VISIBLE} int32_t memplan_import_count = sizeof memplan_imports / sizeof *memplan_imports;\n}}",
    ]


def _frame(frame: Frame) -> list[str]:
    given = f"AtenTensorHandle given[{max(1, len(frame.program.inputs))}];"
    gpus = [f"void* stream{d};" for d in frame.gpus] + (["void* context;"] if frame.gpus else [])
    return [
        _struct("Tensors", [f"AtenTensorHandle {n};" for n in frame.members]),
        _struct("Addresses", [f"char* {n};" for n in frame.addresses]),
        _struct("Symbols", [f"int64_t {text.removeprefix('s.')};" for text in frame.symbols.values()]),
        _struct("Frame", ["Call* call;", "Tensors t;", "Addresses p;", "Symbols s;", given, *gpus]),
    ]


def _entry(frame: Frame) -> list[str]:
    """Sizes and streams are known, the frame is empty; what is left of it at the end is let go."""
    out = [
        f'extern "C" {_VISIBLE} int32_t memplan_run(Call* call) {{',
        "    Frame f;",
        "    __builtin_memset(&f, 0, sizeof f);",
        "    f.call = call;",
        f"    __builtin_memcpy(f.given, call->inputs, sizeof(AtenTensorHandle) * {len(frame.program.inputs)});",
    ]
    for i in frame.program.inputs:
        if isinstance(i, SymbolInput):
            out.append(f"    f.{frame.symbols[i.symbol]} = call->numbers[{i.position}];")
    for device in frame.gpus:
        out.append(f"    MP(aoti_torch_get_current_cuda_stream({device}, &f.stream{device}));")
    if frame.gpus:
        out.append("    MP(cuCtxGetCurrent(&f.context));")
    out.append(f"    const int32_t status = {' || '.join(f'part{k}(f)' for k in range(len(frame.parts)))};")
    if frame.members:
        out.append("    auto* held = reinterpret_cast<AtenTensorHandle*>(&f.t);")
        out.append(f"    for (int i = 0; i < {len(frame.members)}; ++i) mp::drop(held[i]);")
    return [*out, "    return status;", "}"]


def _struct(name: str, members: Sequence[str]) -> str:
    return f"struct {name} {{\n" + "".join(f"    {m}\n" for m in members) + "};"
