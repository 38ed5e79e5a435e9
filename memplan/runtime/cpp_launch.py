"""Calling CPU kernels: functions of a shared library with addresses and sizes as arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .build import load_library

#: For each function: (pointer arguments, int64 arguments after them, whether it checks indices). One that does gives
#: None where all are in range, else bytes of text.
Signatures = Mapping[str, tuple[int, int, bool]]


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """A built library of kernels."""

    path: Path
    signatures: Signatures


def load_kernels(path: Path, signatures: Signatures) -> dict[str, Callable[..., object]]:
    """The functions of a kernel library.  Raises CompilerError when the loader refuses it."""
    library = load_library(path)
    found: dict[str, Callable[..., object]] = {}
    for name, (pointers, integers, checks) in signatures.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
        function.restype = ctypes.c_char_p if checks else None
        found[name] = function
    return found
