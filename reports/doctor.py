"""What works on this machine, found out by trying it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .text import size

State = Literal["ok", "note", "BAD"]
_PROGRAM = '#include <cmath>\n#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; ``BAD`` stops memplan from working, ``note`` takes something away."""

    state: State
    title: str
    detail: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Everything that memplan depends on, in order of need."""
    return [check() for check in CHECKS]


def _python() -> Finding:
    version, supported = platform.python_version(), (3, 11) <= sys.version_info[:2] <= (3, 13)
    where = f"{version}, {platform.system()} {platform.machine()}"
    return Finding("ok" if supported else "BAD", "Python", where, "" if supported else "use Python 3.11 to 3.13")


def _torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Finding("BAD", "torch", str(error), "pip install 'torch>=2.11'")
    version = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        return Finding("BAD", "torch", torch.__version__, "memplan needs torch 2.11 or newer")
    if torch.version.hip is not None:
        return Finding("BAD", "torch", f"{torch.__version__} for ROCm", "use a build for NVIDIA or for the CPU")
    return Finding("ok", "torch", torch.__version__)


def _backend() -> Finding:
    found = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "memplan"]
    if not found:
        return Finding(
            "BAD", "backend", "torch.compile does not know memplan", "install memplan again: pip install -e ."
        )
    try:
        found[0].load()
    except Exception as error:
        return Finding("BAD", "backend", f"{found[0].value} does not load: {type(error).__name__}: {error}")
    return Finding("ok", "backend", f'torch.compile(model, backend="memplan") -> {found[0].value}')


def _compiler() -> Finding:
    named = os.environ.get("CXX")
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if path is None:
        return Finding("BAD", "C++ compiler", f"none found{f' (CXX={named})' if named else ''}", "apt install g++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text(_PROGRAM)
        command = [path, "-std=c++17", "-O1", "-fopenmp", "-shared", "-fPIC", str(source), "-o", f"{folder}/try.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding("BAD", "C++ compiler", f"{path}: {error}")
    if done.returncode:
        return Finding("BAD", "C++ compiler", f"{path} fails: {done.stderr.strip()[:200]}", "apt install g++ libgomp1")
    return Finding("ok", "C++ compiler", f"{path}, with OpenMP")


def _triton() -> Finding:
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return Finding("note", "Triton", "not installed: no GPU kernels", "pip install 'triton>=3.6'")
    return Finding("ok", "Triton", triton.__version__)


def _gpu() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Finding("note", "GPU", "unknown without torch")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return Finding("note", "GPU", f"none to be used ({built}); plans and CPU kernels work without one")
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    detail = f"{torch.cuda.get_device_name()} (sm {capability}), {free >> 20} of {total >> 20} MiB free"
    return Finding("ok", "GPU", f"{detail}, CUDA {torch.version.cuda}")


def _cache() -> Finding:
    from ..ir.config import Config, from_environment

    named = from_environment(Config()).cache_dir
    folder = Path(named) if named else Path(importlib.import_module("platformdirs").user_cache_dir("memplan"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("note", "cache", f"{folder}: {error}", "set MEMPLAN_CACHE_DIR to a folder that can be written")
    nbytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return Finding("ok", "cache", f"{folder}, {size(nbytes)}")


def _notebook() -> Finding:
    try:
        version = importlib.metadata.version("anywidget")
    except importlib.metadata.PackageNotFoundError:
        detail = "anywidget is not installed: notebooks show a still picture"
        return Finding("note", "notebook", detail, "pip install 'memplan[notebook]'")
    return Finding("ok", "notebook", f"anywidget {version}")


CHECKS: tuple[Callable[[], Finding], ...] = (_python, _torch, _backend, _compiler, _triton, _gpu, _cache, _notebook)
