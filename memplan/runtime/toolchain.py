"""The system's C++ compiler: which one, and what it can do.

Probing costs four short compilations; the result is kept per process, and on disk under the compiler's path,
modification time, size, version and the CPU's flags.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from memplan.ir.errors import CompilerError

from .cache import Cache, cache_key

CANDIDATES = ("g++", "clang++", "c++")
"""Compilers looked for on PATH, in this order, when none is named."""

_PROBE_SECONDS = 60.0

_PROBE_SOURCE = """\
extern "C" float probe(const float* a, int n) {
    float sum = 0.0f;
    #pragma omp parallel for simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += a[i] * a[i];
    return sum;
}
"""


_MVEC_SOURCE = """\
extern "C" __attribute__((simd("notinbranch"))) float erff(float) noexcept;
extern "C" void probe(const float* __restrict a, float* __restrict b) {
    #pragma omp simd
    for (int i = 0; i < 64; ++i) b[i] = erff(a[i]);
}
"""
"""erff came with glibc 2.35, as did all but six of the functions."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler that was seen to build a shared library.

    ``command`` is the compiler with the arguments that ``CXX`` gave it; ``version`` its own first line; ``native`` and
    ``openmp`` whether ``-march=native`` and ``-fopenmp`` build and link; ``mvec`` whether glibc's vector mathematics
    library, 2.35 or newer, does; ``cpu`` a digest of the CPU that ``-march=native`` was resolved on, so that a cache
    directory shared by different machines never hands one the other's code.
    """

    command: tuple[str, ...]
    version: str
    native: bool
    openmp: bool
    mvec: bool
    cpu: str

    def fingerprint(self) -> tuple[str, ...]:
        """What of the toolchain a compiled library depends on, for its cache key."""
        return (*self.command, self.version, self.cpu if self.native else platform.machine())


def find_toolchain(cxx: str | None = None, *, cache: Cache | None = None) -> Toolchain:
    """The C++ compiler to use.

    ``cxx`` is a command, arguments allowed (``"ccache g++"``); default: the environment's ``CXX``, then g++, clang++
    and c++ on PATH.  A compiler that is named and does not work is an error, never replaced by another one.

    Raises CompilerError when there is none, or none works, saying what was looked for and what to install.
    """
    named = cxx if cxx is not None else os.environ.get("CXX")
    cache = cache if cache is not None else Cache()
    path = os.environ.get("PATH", "")
    with _found_lock:
        known = _found.get((named or None, path))
        if known is None:
            known = _found[named or None, path] = _find(named or None, path, cache)
        return known


_found: dict[tuple[str | None, str], Toolchain] = {}
"""Probed once per process, compiler name and PATH: a changed PATH is looked through again."""
_found_lock = threading.Lock()


def _find(named: str | None, path: str, cache: Cache) -> Toolchain:
    failures: list[str] = []
    for candidate in (named,) if named is not None else CANDIDATES:
        command = shlex.split(candidate)
        executable = shutil.which(command[0], path=path) if command else None
        if executable is None:
            failures.append(f"{candidate}: not found")
            continue
        try:
            return _probe((executable, *command[1:]), cache)
        except CompilerError as error:
            failures.append(f"{candidate}: {error}")
    source = "the compiler that CXX names does not work" if named is not None else "no working C++ compiler was found"
    tried = "\n  ".join(failures)
    raise CompilerError(
        f"{source}. Looked for:\n  {tried}\n"
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) "
        "or set CXX to a compiler that understands C++17."
    )


def available_cpus() -> int:
    """CPUs this process may run on, its affinity mask respected."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: Of the flags of /proc/cpuinfo those that name instructions which a compiler may use.
_INSTRUCTIONS = re.compile(
    r"(mmx|sse|ssse|avx|fma|f16c|bmi|movbe|popcnt|abm|aes|vaes|pclmul|vpclmul|sha|gfni|amx|adx|rdrnd|rdrand|rdseed|lahf|"
    r"cx16|fsgsbase|xsave|clflush|clwb|movdir|serialize|tbm|xop|lwp|prefetchw|3dnow)"
)


@functools.cache
def cpu_instructions() -> frozenset[str]:
    """Names of the instruction sets that this CPU has (``/proc/cpuinfo``); all of its features on other than x86."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is not None:
        return frozenset(f for f in flags[1].split() if _INSTRUCTIONS.match(f))
    features = re.search(r"^Features\s*:(.*)$", text, re.MULTILINE)
    return frozenset(features[1].split()) if features is not None else frozenset()


@functools.cache
def cpu_identity() -> str:
    """Digest of the first CPU's vendor, family, model and instruction set flags (``/proc/cpuinfo``)."""
    wanted = re.compile(r"(vendor_id|cpu family|model|flags|Features|CPU (implementer|architecture|variant|part))\s*:")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n", 1)[0]
    except FileNotFoundError:
        text = platform.processor()
    lines = [line for line in text.splitlines() if wanted.match(line)] or [text]
    return cache_key(platform.machine(), *sorted(" ".join(sorted(line.split())) for line in lines))[:32]


def run_compiler(command: tuple[str, ...], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler in ``cwd``; CompilerError where it cannot be started or does not end.  Messages are in English."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{shlex.join(command)} did not end within {timeout:.0f} s") from error
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run: {error}") from error


def _probe(command: tuple[str, ...], cache: Cache) -> Toolchain:
    version = _version(command)
    resolved = Path(command[0]).resolve()
    status = resolved.stat()
    key = cache_key(
        "toolchain 2", command, str(resolved), status.st_mtime_ns, status.st_size, version, cpu_identity()
    )  # fmt: skip
    stored = cache.get_bytes(key)
    if stored is not None:
        fields = json.loads(stored)
        return Toolchain(**(fields | {"command": command}))
    found = _try_flags(command, version)
    cache.put(key, json.dumps(asdict(found)).encode(), suffix=".json")
    return found


def _version(command: tuple[str, ...]) -> str:
    done = run_compiler((*command, "--version"), Path("/"), _PROBE_SECONDS)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode != 0 or not lines:
        raise CompilerError(f"`{shlex.join(command)} --version` ended with status {done.returncode}")
    return lines[0]


def _try_flags(command: tuple[str, ...], version: str) -> Toolchain:
    with tempfile.TemporaryDirectory(prefix="memplan-probe-") as folder:

        def builds(source: str, *flags: str) -> subprocess.CompletedProcess[str]:
            (Path(folder) / "probe.cpp").write_text(source, encoding="utf-8")
            line = (*command, "-std=c++17", "-O3", "-fPIC", "-shared", "probe.cpp", "-o", "probe.so", *flags)
            return run_compiler(line, Path(folder), _PROBE_SECONDS)

        plain = builds(_PROBE_SOURCE)
        if plain.returncode != 0:
            raise CompilerError(f"cannot build a shared library:\n{first_errors(plain.stderr)}")
        try:
            ctypes.CDLL(str(Path(folder) / "probe.so"))
        except OSError as error:  # it wrote none, or one for another machine
            raise CompilerError(f"what it builds cannot be loaded: {error}") from error
        native = builds(_PROBE_SOURCE, "-march=native").returncode == 0
        openmp = builds(_PROBE_SOURCE, "-fopenmp").returncode == 0
        mvec_flags = ("-fno-math-errno", "-fopenmp-simd", "-Wl,-z,defs", "-lmvec", "-lm")
        mvec = builds(_MVEC_SOURCE, *mvec_flags).returncode == 0
    return Toolchain(command, version, native, openmp, mvec, cpu_identity())


def first_errors(output: str, lines: int = 30) -> str:
    """The beginning of a compiler's output, from its first error on where there is one."""
    every = output.strip().splitlines()
    start = next((number for number, line in enumerate(every) if "error" in line), 0)
    start = max(0, start - 2)  # the function that the error is in
    shown = every[start : start + lines]
    rest = len(every) - start - len(shown)
    return "\n".join([*shown, f"... {rest} more lines"] if rest > 0 else shown)
