"""Plans and the code that runs them, kept between processes.

An entry is content addressed: its key is made of the captured program's canonical form (`program_identity`), the
options, the versions of everything that has a say (memplan's own source text among them), the C++ compiler, the CPU and
the GPU. So an entry never goes stale: what changes has another key. Its value is JSON that can only make classes of
`memplan.ir` and the wrapper's text (`saving_encoding`, no pickle), read by `runtime.cache`, which loads a file only
when it is this user's and its bytes have the digest that its name tells.

Whatever is wrong with an entry, the program is compiled as if there were none.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sympy
import torch

from .artifact import Artifact
from .call_scratch import decides
from .capture.fx import HigherOrderCall
from .communicating import group_of
from .ir.config import Config
from .ir.errors import CacheError, CompilerError, SavedModelError
from .ir.plan import Plan
from .ir.program import Origin, Program, UserKernel
from .passes.expose_clones import expose_clones
from .program_identity import Identity, UnknownCallableError, carried_over, identify
from .runtime.cache import Cache, KeyPart, cache_key
from .runtime.convolution import cudnn_flags
from .runtime.toolchain import find_toolchain
from .saving_encoding import allow, decode, encode

log = logging.getLogger("memplan.cache")

_FORMAT = "plan 1"
#: packages that a user's kernel may import from: their versions are in the key, Python's with its own library
_VERSIONED = frozenset({"triton", "torch", "math", "copy"})
_PACKAGES = ("", ".ir", ".capture", ".lowering", ".runtime", ".passes", ".codegen")


@dataclass(frozen=True, slots=True)
class Head:
    """The part of an entry that is always read: names and symbols of the program that it was made for, a digest of its
    origins, and what runs."""

    names: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    origins: str
    artifact: Artifact


allow(Head)


@dataclass(frozen=True)
class Entry:
    """Where the result for one program is kept, whether it is there or not."""

    key: str
    identity: Identity
    program: Program
    store: Cache

    def read(self) -> Found | None:
        """What is kept, or None."""
        data = self.store.get_bytes(self.key)
        if data is None:
            return None
        try:
            length = int.from_bytes(data[:8], "little")
            head = decode(zlib.decompress(data[8 : 8 + length]))
            if not isinstance(head, Head):
                raise SavedModelError(f"it holds a {type(head).__name__}")
        except (SavedModelError, TypeError, ValueError, zlib.error) as error:
            log.warning("an entry of the plan cache cannot be read and is made again: %s", error)
            return None
        made_for = replace(self.identity, names=head.names, symbols=head.symbols)
        if self.program.callables and head.names != self.identity.names:
            return None  # passes name callables after others; they are not followed
        log.info("the plan of %s is from the cache", self.program.name)
        same_origins = head.origins == _digest_of_origins(self.identity)
        return Found(head.artifact, made_for, same_origins, data[8 + length :], self)

    def write(self, artifact: Artifact, plan: Plan) -> None:
        """Keep a result; what cannot be kept is made again next time."""
        identity = self.identity
        numbers: dict[Origin, int] = {}
        for k, origin in enumerate(identity.origins):
            numbers.setdefault(origin, k)
        bare = replace(plan, program=replace(plan.program, constants={}, callables={}))
        try:
            head = Head(identity.names, identity.symbols, _digest_of_origins(identity), artifact)
            first, body = (zlib.compress(encode(head), 1), zlib.compress(encode(bare, numbers), 1))
            self.store.put(self.key, len(first).to_bytes(8, "little") + first + body, suffix=".plan")
        except (SavedModelError, CacheError) as error:
            log.info("the plan of %s is not kept: %s", self.program.name, error)


@dataclass(frozen=True)
class Found:
    """What the cache had for a program. ``document`` is the plan, unread; ``made_for`` the program it was made for."""

    artifact: Artifact
    made_for: Identity
    same_origins: bool
    document: bytes
    entry: Entry

    def plan(self) -> Plan:
        """The plan, with the names and source lines of the program at hand."""
        identity, program = self.entry.identity, self.entry.program
        plan = decode(zlib.decompress(self.document), identity.origins)
        assert isinstance(plan, Plan)
        plan = carried_over(plan, self.made_for, identity)
        whole = replace(plan.program, name=program.name, constants=program.constants, callables=self.callables())
        return replace(plan, program=whole)

    def constants(self) -> dict[str, torch.Tensor]:
        """The program's constants under the names that the wrapper has for them."""
        then = dict(zip(self.entry.identity.names, self.made_for.names, strict=True))
        return {then[n]: t for n, t in self.entry.program.constants.items()}

    def callables(self) -> Mapping[str, object]:
        """What the wrapper calls that is no operator, of the program at hand."""
        program = self.entry.program
        return expose_clones(program).callables if program.callables else {}


@dataclass(frozen=True)
class Beside:
    """The program that another one is planned with, and how they hang together.

    ``forward``: of the two, the one that is compiled is the forward; ``joins``: (its buffer, the backward's input).
    """

    other: Program
    forward: bool
    joins: tuple[tuple[str, str], ...]

    def key(self, identity: Identity) -> KeyPart:
        """What of it decides the plan of the program of this identity."""
        other = identify(self.other, _fingerprint)
        ahead, behind = (identity, other) if self.forward else (other, identity)
        first, last = ({n: k for k, n in enumerate(i.names)} for i in (ahead, behind))
        numbers = tuple((first.get(a, -1), last.get(b, -1)) for a, b in self.joins)
        return (self.forward, other.form, numbers)


def find_entry(program: Program, config: Config, beside: Beside | None = None) -> Entry | None:
    """Where the result for a program is kept; None if it is not to be kept, or nobody can say what decides it."""
    if not config.plan_cache or config.dump or torch.compiler.config.force_disable_caches:
        return None
    programs = (program,) if beside is None else (program, beside.other)
    if any(group_of(op) is not None for p in programs for op in p.operations):
        return None  # what other ranks tell has a say in the plan
    users = [op.kernel for p in programs for op in p.operations if isinstance(op, UserKernel)]
    foreign = sorted({package for kernel in users for package in kernel.imported} - _VERSIONED)
    if foreign:
        log.info("the plan of %s is not cached: its kernels import from %s", program.name, ", ".join(foreign))
        return None
    store = Cache(config.cache_dir) if config.cache_dir else Cache()
    try:
        identity = identify(program, _fingerprint)
        around = (versions(), settings(), _machine(program, store), beside.key(identity) if beside else ())
        key = cache_key(_FORMAT, identity.form, config.cache_key(), *around)
    except (SavedModelError, UnknownCallableError, CompilerError, CacheError) as error:
        log.info("the plan of %s is not cached: %s", program.name, error)
        return None
    return Entry(key, identity, program, store)


def _fingerprint(call: object) -> tuple[object, ...]:
    """What passes see of a higher-order call: its arguments. What it runs is taken from the program at hand."""
    if not isinstance(call, HigherOrderCall):
        raise UnknownCallableError(f"a {type(call).__name__} as a callable")
    name = str(getattr(call.operator, "_name", ""))
    if not name or name.startswith("triton_kernel_wrapper"):
        raise UnknownCallableError(f"the callable {name or type(call.operator).__name__}")
    shown = tuple(_plain(v) for v in call.template)
    return (name, shown, str(call.spec), call.slots, call.offsets)


def _plain(value: object) -> str:
    """An argument as text; of a subgraph only that it is one, since no pass looks into it."""
    if isinstance(value, torch.nn.Module):
        return "module"
    plain = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    if value is None or isinstance(value, (*plain, torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return f"{type(value).__name__} {value}"
    raise UnknownCallableError(f"a {type(value).__name__} as an argument of a callable")


def _digest_of_origins(identity: Identity) -> str:
    return hashlib.sha256(encode(identity.origins)).hexdigest()


def settings() -> KeyPart:
    """What of torch's global state is read while compiling."""
    cudnn = (torch._C._get_cudnn_enabled(), *cudnn_flags())
    return (torch.are_deterministic_algorithms_enabled(), str(torch.get_default_dtype()), *cudnn)


def _machine(program: Program, store: Cache) -> KeyPart:
    """The devices of the program as far as code depends on them, and the compiler."""
    found: list[KeyPart] = [find_toolchain(cache=store).fingerprint(), decides(program)]
    for device in sorted({b.device for b in program.buffers.values()}):
        if device.startswith("cuda") and torch.cuda.is_available():
            about = torch.cuda.get_device_properties(device)
            found.append((device, about.name, about.major, about.minor, about.multi_processor_count))
        else:
            found.append(device)
    return tuple(found)


@functools.cache
def versions() -> KeyPart:
    """The versions of all that makes code, memplan's own as a digest of its files."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    cuda = torch.version.cuda
    return (source_digest(), torch.__version__, torch.version.git_version, cuda, triton, sys.version)


@functools.cache
def source_digest() -> str:
    """Digest of all files of memplan that compiling depends on."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for folder in import_module(f"memplan{package}").__path__:
            for path in sorted(Path(folder).iterdir()):
                if path.suffix in (".py", ".h", ".cpp"):
                    data = path.read_bytes()
                    digest.update(f"{package}/{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
