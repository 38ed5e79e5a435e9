"""C++ source to shared library, cached by everything that decides its bytes.

Flags
-----
``-O3 -march=native`` with IEEE results: ``-ffast-math`` and each of its parts that changes an answer stay off, so NaN,
infinities, signed zeros and the order of additions are kept.  Two of its parts are on because they only give up what no
kernel can observe: ``-fno-math-errno`` (nobody reads ``errno``) and ``-fno-trapping-math`` (nobody enables floating
point traps or reads the sticky flags); without them no loop with a square root, a comparison or a ``floor`` vectorises.
``-ffp-contract=off`` keeps ``a * b + c`` two roundings as in eager, so that the answer does not depend on how an
expression was fused; where the prelude wants a fused multiply-add it says so.  Sums are reassociated only in loops that
ask for it (``#pragma omp simd reduction``), which ``-fopenmp-simd`` allows without the OpenMP runtime.

Measured on g++ 12.2, two shared Zen 3 cores: a one-loop library takes 0.09 s without headers, ``<cmath>`` adds 0.2 s,
``<algorithm>`` 0.1 s, ``<cstdint>`` and ``<omp.h>`` 0.02 s each; ``-march=native`` and ``-fopenmp`` cost no time that
can be measured (below 0.02 s).  So kernels include neither ``<cmath>`` nor ``<algorithm>`` (``codegen/cpp_prelude.h``
uses the compiler's builtins), and there is nothing left for a precompiled header to save.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from memplan.ir.errors import CacheError, CompilerError

from .cache import Cache, cache_key
from .toolchain import Toolchain, available_cpus, find_toolchain, first_errors, run_compiler

DEFAULT_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-semantic-interposition",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
)
"""See the module's text."""

_COMPILE_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class BuildJob:
    """One library to build; the fields are `build_library`'s arguments."""

    source: str
    name: str
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    include_dirs: tuple[str, ...] = ()
    openmp: bool = True
    native: bool = True
    extra_key: tuple[str, ...] = ()


def build_library(
    source: str,
    *,
    name: str,
    flags: tuple[str, ...] = (),
    libraries: tuple[str, ...] = (),
    include_dirs: tuple[str, ...] = (),
    openmp: bool = True,
    native: bool = True,
    extra_key: tuple[str, ...] = (),
    cache: Cache | None = None,
    cxx: str | None = None,
) -> Path:
    """Compile one C++ source into a shared library and return its path; a second call returns the cached one.

    Parameters
    ----------
    source
        The whole translation unit.
    name
        For file names and messages; not part of what is cached.
    flags
        After the default ones, so that they win.
    libraries
        ``"z"`` becomes ``-lz``; a path is linked as it is, with its directory as run path.  libm, and libmvec where
        there is one, are linked always.
    include_dirs
        Searched for headers. Their paths are part of the cache key, their contents are not: give the version of what
        lies there in ``extra_key``.
    openmp, native
        Ask for ``-fopenmp`` and ``-march=native``; each is left out where the compiler does not support it (without
        OpenMP a ``#pragma omp parallel`` is ignored and the loop runs on one thread).

    Raises
    ------
    CompilerError
        No compiler, or it refused the source: with its first errors and the path where the source was kept.
    CacheError
        Neither the cache nor a temporary directory can be written.
    """
    job = BuildJob(source, name, flags, libraries, include_dirs, openmp, native, extra_key)
    cache = cache if cache is not None else Cache()
    return _build(job, find_toolchain(cxx, cache=cache), cache)


def build_many(
    jobs: tuple[BuildJob, ...] | list[BuildJob], *, cache: Cache | None = None, cxx: str | None = None
) -> list[Path]:
    """`build_library` for each job, as many at once as this process has CPUs; paths in the order of ``jobs``.

    When some fail, the others are finished (and cached) first, and the error of the first job that failed is raised.
    """
    if not jobs:
        return []
    cache = cache if cache is not None else Cache()
    toolchain = find_toolchain(cxx, cache=cache)
    with ThreadPoolExecutor(min(len(jobs), available_cpus()), thread_name_prefix="memplan-build") as pool:
        futures: list[Future[Path]] = [pool.submit(_build, job, toolchain, cache) for job in jobs]
    return [future.result() for future in futures]


def compile_command(job: BuildJob, toolchain: Toolchain) -> tuple[str, ...]:
    """The compiler's command line, all but the input and output files."""
    command = [*toolchain.command, *DEFAULT_FLAGS]
    if job.native and toolchain.native:
        command.append("-march=native")
    if job.openmp and toolchain.openmp:
        command.append("-fopenmp")
    if toolchain.mvec:
        command.append("-DMP_MVEC")  # codegen/cpp_prelude.h then asks for vector versions of libm's functions
    command.extend(f"-I{folder}" for folder in job.include_dirs)
    command.extend(job.flags)
    return tuple(command)


def _link_arguments(libraries: tuple[str, ...], toolchain: Toolchain) -> tuple[str, ...]:
    arguments: list[str] = []
    for library in libraries:
        if os.sep in library:
            arguments += [library, f"-Wl,-rpath,{os.path.dirname(os.path.abspath(library))}"]
        else:
            arguments.append(f"-l{library}")
    mathematics = ("-lmvec", "-lm") if toolchain.mvec else ("-lm",)
    return (*arguments, "-Wl,--as-needed", *mathematics)


def _build(job: BuildJob, toolchain: Toolchain, cache: Cache) -> Path:
    command = compile_command(job, toolchain)
    links = _link_arguments(job.libraries, toolchain)
    key = cache_key("library 1", job.source, command, links, toolchain.fingerprint(), job.extra_key)

    def build(target: Path) -> None:
        # Relative names and a fixed one: the same source gives the same bytes, wherever it is compiled.
        (target.parent / "kernel.cpp").write_text(job.source, encoding="utf-8")
        line = (*command, "kernel.cpp", "-o", target.name, *links)
        done = run_compiler(line, target.parent, _COMPILE_SECONDS)
        if done.returncode != 0:
            kept = _keep_source(job, key, cache)
            raise CompilerError(
                f"the C++ compiler refused {job.name} (status {done.returncode}):\n{first_errors(done.stderr)}\n"
                f"source: {kept}\ncommand: {shlex.join(line)}"
            )
        if not target.is_file():
            raise CompilerError(f"the C++ compiler wrote nothing for {job.name}, and ended with status 0")

    return cache.get_or_build(key, build, suffix=f"-{_file_name(job.name)}.so")


def _keep_source(job: BuildJob, key: str, cache: Cache) -> str:
    try:
        return str(cache.keep(f"{_file_name(job.name)}-{key[:16]}.cpp", job.source.encode()))
    except CacheError as error:
        return f"not kept ({error})"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)[:60] or "library"


_loaded: dict[Path, ctypes.CDLL] = {}
_loaded_lock = threading.Lock()


def load_library(path: Path) -> ctypes.CDLL:
    """Load a shared library, once per path and process.  Raises CompilerError when the loader refuses it."""
    with _loaded_lock:
        library = _loaded.get(path)
        if library is None:
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                raise CompilerError(f"the built library {path} cannot be loaded: {error}") from error
            _loaded[path] = library
        return library
