"""Launching CUDA kernels whose arguments are all eight bytes wide (pointers and int64), by one small native module.

Triton 3.6 compiles a launcher in C for every signature (half a second each), and both it and 3.7 pass through Python
on every launch. This module (``cuda_launch.cpp``) is built once, loads cubins, and turns a loaded kernel into a
callable that goes straight to ``cuLaunchKernel``. The driver is opened at run time, so that building needs no CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from memplan.ir.errors import CacheError, CompilerError

from .build import build_library

_log = logging.getLogger("memplan.triton")

#: where the driver is; opened by the first kernel that is loaded
DRIVER = "libcuda.so.1"


#: a built module that came with a saved model
_given: list[Path] = []


def _soabi() -> str:
    """The name of the Python interface that a native module is built for."""
    return str(sysconfig.get_config_var("SOABI"))


def _source() -> str:
    return (files(__package__) / "cuda_launch.cpp").read_text(encoding="utf-8")


def module_name() -> str:
    """What the built module is called in a saved model: after its source and the Python that it is built for, so that
    no other version of memplan and no other Python takes it."""
    return f"cuda_launch.{hashlib.sha256(_source().encode()).hexdigest()[:8]}.{_soabi()}.so"


def use_module(path: Path) -> None:
    """Take this built module where none is loaded yet, instead of building one."""
    _given[:] = [path]


def module_path() -> Path:
    """The built native module.

    Raises
    ------
    CompilerError
        No C++ compiler, or no headers of Python.
    """
    return build_library(
        _source(),
        name="cuda_launch",
        flags=("-O2",),
        include_dirs=(sysconfig.get_paths()["include"],),
        openmp=False,
        native=False,
        extra_key=(sys.version, _soabi()),
    )


def build_module() -> ModuleType:
    """The native module, without a driver.  Raises CompilerError as `module_path` does."""
    path = _given[0] if _given else module_path()
    loader = importlib.machinery.ExtensionFileLoader("memplan_cuda_launch", str(path))
    spec = importlib.util.spec_from_file_location("memplan_cuda_launch", str(path), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def native_launch() -> ModuleType | None:
    """The module with the driver opened; None (said once, as a warning) where it cannot be had."""
    try:
        module = build_module()
        module.open_driver(DRIVER)
    except (CompilerError, CacheError, OSError, ImportError) as error:
        _log.warning("kernels are launched through Triton, which is slower: %s", error)
        return None
    return module


Bound = Callable[..., None]
"""``bound(stream, *arguments)`` launches."""
