"""What runs a plan, as data: the wrapper's text and the built kernels. It is cached, saved and loaded as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .codegen.cpp_wrapper import CppWrapper, PythonLine
from .codegen.python_wrapper import PythonWrapper
from .communicating import Communicating
from .runtime.cache import Cache, key_of
from .runtime.cpp_launch import CpuLibrary, Signatures, load_kernels
from .runtime.triton_launch import Launcher
from .saving_encoding import allow

Callables = Mapping[str, Callable[..., object]]


@dataclass(frozen=True, slots=True)
class CachedLibrary:
    """A library of kernels by its key in the cache."""

    key: str
    signatures: Signatures


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled program.

    Attributes
    ----------
    python, cpp:
        The wrapper in each language; the C++ one runs where there is one.
    library:
        Kernels of the CPU; None without any.
    waterfall:
        (name of a decision, peak of live bytes after it).
    """

    python: PythonWrapper
    cpp: CppWrapper | None
    library: CachedLibrary | None
    waterfall: tuple[tuple[str, int], ...]


for _class in (Artifact, CachedLibrary, PythonWrapper, CppWrapper, PythonLine):
    allow(_class)


@dataclass(frozen=True)
class Linked:
    """What a wrapper calls and reads, under the names that it uses."""

    kernels: Callables
    launchers: Mapping[str, Launcher]
    callables: Mapping[str, object]
    constants: Mapping[str, torch.Tensor]
    communicating: Communicating | None = None


def cached(library: CpuLibrary | None) -> CachedLibrary | None:
    """A built library by its key."""
    return None if library is None else CachedLibrary(key_of(library.path), library.signatures)


def load_cached(library: CachedLibrary | None, store: Cache) -> Callables | None:
    """The kernels of a library in the cache; None if it is not there any more.

    Raises
    ------
    CompilerError
        If the loader refuses it.
    """
    if library is None:
        return {}
    path = store.get(library.key)
    return None if path is None else load_kernels(path, library.signatures)
