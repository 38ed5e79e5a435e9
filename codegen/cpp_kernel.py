"""CPU kernels: a kernel as data becomes a C++ function.

`emit_cpp` gives one ``extern "C"`` function, `emit_cpp_library` a whole translation unit with the prelude in it. The
text includes no header but the prelude's; build it with `BUILD_FLAGS`, OpenMP where it is to use threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import sympy
import torch

from memplan.ir.canonical import CanonicalKernel
from memplan.ir.loops import Call, Kernel, Load, Store, StoreMode

from .cpp_in_place import safe_in_place
from .cpp_nest import Printer
from .cpp_schedule import plan_loops
from .cpp_values import SPECIAL, Texts, storage_type

__all__ = ["BUILD_FLAGS", "emit_cpp", "emit_cpp_library", "pointer_types", "prelude", "safe_in_place"]

#: Flags that the text needs: one storage may be read under one dtype and written under another (in-place reuse). Off
#: are two passes of g++ that move a comparison across the selections before it, into a form that does not vectorise
#: (measured: relu and max pooling in one kernel, channels last, 1.40 ms with them and 0.044 ms without).
BUILD_FLAGS = ("-fno-strict-aliasing", "-fno-tree-pre", "-fno-thread-jumps")


def emit_cpp(
    kernel: CanonicalKernel,
    *,
    name: str,
    hints: Mapping[sympy.Symbol, int],
    threads: bool = True,
    deterministic: bool = False,
) -> str:
    """The definition of ``extern "C" void name(T0* b0, ..., int64_t s0, ...)``.

    A kernel that checks indices returns ``const char*`` instead: what was out of range, or null.

    Parameters
    ----------
    kernel:
        What to compute; buffers become pointers to its element types (bool as ``uint8_t``), size symbols ``int64_t``.
    name:
        Of the function.
    hints:
        Values of size symbols that the choice of loops is made for; the function is right for all values.
    threads:
        Whether loops with enough work are spread over OpenMP threads.
    deterministic:
        Additions into the same element happen in program order: kernels with atomic additions of floats run on one
        thread, unless threads can own the elements that they add to. All others give the same bits on any number of
        threads anyway.

    Raises
    ------
    UnsupportedError
        For dtypes and functions that CPU kernels do not have.
    """
    body = kernel.kernel
    pointers = pointer_types(body)
    parameters = [f"{storage_type(pointers[b])}* {b}" for b in pointers]
    parameters += [f"int64_t {s.name}" for s in kernel.symbols]
    checks = body.checks_indices
    head = f'extern "C" {"const char*" if checks else "void"} {name}({", ".join(parameters)})'
    if any(r.size == 0 for r in body.outer) or (any(r.size == 0 for r in body.row) and not body.reductions):
        return f"{head} {{\n" + ("    return nullptr;\n" if checks else "") + "}\n"
    adds = any(s.mode is StoreMode.ADD and s.dtype.is_floating_point for s in body.stores)
    schedule = plan_loops(body, hints, threads=threads, in_order=deterministic and adds)
    lines = Printer(schedule, Texts(schedule.kernel, pointers), checks=checks).print()
    if checks:
        lines = ["    mp::Checks checks;", *lines, "    return checks.message();"]
    return f"{head} {{\n" + "\n".join(lines) + "\n}\n"


def pointer_types(kernel: Kernel) -> dict[str, torch.dtype]:
    """The element type of each buffer's pointer, in parameter order: that of its first load, else of its store."""
    found: dict[str, torch.dtype] = {}
    accesses: list[Load | Store] = [*kernel.loads, *kernel.stores]
    for access in accesses:
        found.setdefault(access.buffer, access.dtype)
    return found


def emit_cpp_library(
    kernels: Sequence[tuple[str, CanonicalKernel]],
    hints: Mapping[sympy.Symbol, int],
    *,
    threads: bool = True,
    deterministic: bool = False,
) -> str:
    """A translation unit with a function for every (name, kernel)."""
    texts = [emit_cpp(k, name=n, hints=hints, threads=threads, deterministic=deterministic) for n, k in kernels]
    special = any(isinstance(n, Call) and n.op in SPECIAL for _, k in kernels for n in k.kernel.nodes)
    return "\n".join([prelude(special=special), *texts])


def prelude(*, special: bool = False) -> str:
    """What functions of `emit_cpp` need before them; ``special`` with the functions named in `SPECIAL`."""
    headers = ("cpp_prelude.h", "cpp_sizes.h", *(["cpp_special.h"] if special else []), "cpp_rows.h")
    return "\n".join(map(_header, headers))


@cache
def _header(name: str) -> str:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return text.replace("#pragma once\n", "")
