"""Calling CPU kernels: functions of a shared library with addresses and sizes as arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path

from .build import load_library


def load_kernels(path: Path, signatures: Mapping[str, tuple[int, int]]) -> dict[str, Callable[..., object]]:
    """The functions of a kernel library.

    Parameters
    ----------
    signatures:
        For each function: (pointer arguments, int64 arguments after them).
    """
    library = load_library(path)
    found: dict[str, Callable[..., object]] = {}
    for name, (pointers, integers) in signatures.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
        function.restype = None
        found[name] = function
    return found
