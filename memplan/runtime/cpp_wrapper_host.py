"""The native module that calls C++ wrappers: built once for a Python, with no header of torch.

A tensor's handle in torch's small C interface is the address of a pointer to its implementation. Where in a Python
tensor that pointer lies is found out when the module starts, by looking for the value that ``Tensor._cdata`` tells; if
it is not found, ``_cdata`` itself is asked at every call. Results become Python tensors by libtorch_python's own
``THPVariable_Wrap``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from importlib.resources import files
from types import ModuleType

import torch

from memplan.ir.errors import UnsupportedError

from .build import build_library, load_library
from .cache import Cache

#: Overloads of libtorch_python's function; each takes the address of a tensor, whichever way it takes the tensor
_WRAP = (
    "_Z16THPVariable_WrapRKN2at10TensorBaseE",
    "_Z16THPVariable_WrapN2at10TensorBaseE",
    "_Z16THPVariable_WrapON2at10TensorBaseE",
)


@functools.cache
def torch_libraries() -> tuple[ctypes.CDLL, ...]:
    """torch's own libraries, which are loaded already, and the driver where there is one."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    names = ["libtorch_cpu.so", "libtorch_python.so"]
    if torch.version.cuda is not None:
        names.append("libtorch_cuda.so")
    found = []
    for name in names:
        try:
            found.append(ctypes.CDLL(os.path.join(folder, name)))
        except OSError as error:
            raise UnsupportedError(f"the C++ wrapper needs torch's {name}: {error}") from error
    if torch.cuda.is_available():
        found.append(ctypes.CDLL("libcuda.so.1"))
    return tuple(found)


def find_symbol(name: str) -> int | None:
    """The address of a function of torch or of the driver; None where there is none."""
    for library in torch_libraries():
        try:
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        except AttributeError:
            continue
    return None


def _source() -> str:
    return (files(__package__) / "cpp_wrapper_host.cpp").read_text(encoding="utf-8")


def build_host(cache: Cache | None = None) -> ModuleType:
    """The native module, built or from the cache, not yet started.

    Raises
    ------
    CompilerError
        No C++ compiler, or no headers of Python.
    """
    path = build_library(
        _source(),
        name="wrapper_host",
        flags=("-O2", "-fno-exceptions", "-Wno-invalid-offsetof"),
        include_dirs=(sysconfig.get_paths()["include"],),
        openmp=False,
        native=False,
        extra_key=(sys.version, str(sysconfig.get_config_var("SOABI"))),
        cache=cache,
    )
    load_library(path)
    loader = importlib.machinery.ExtensionFileLoader("memplan_wrapper_host", str(path))
    spec = importlib.util.spec_from_file_location("memplan_wrapper_host", str(path), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_host: ModuleType | None = None


def host(cache: Cache | None = None) -> ModuleType:
    """The module that makes graphs, one for the process.

    Raises
    ------
    UnsupportedError
        If torch lacks what it stands on.
    CompilerError, CacheError
        If it cannot be built.
    """
    global _host
    if _host is None:
        addresses = [next((a for a in map(find_symbol, _WRAP) if a), None)]
        addresses += [find_symbol("aoti_torch_delete_tensor_object"), find_symbol("aoti_torch_new_tensor_handle")]
        if not all(addresses):
            raise UnsupportedError(f"torch {torch.__version__} lacks functions that the C++ wrapper stands on")
        module = build_host(cache)
        samples = (torch.empty(1), torch.empty(2, dtype=torch.int64), torch.nn.Parameter(torch.empty(1)))
        what = find_symbol("torch_exception_get_what_without_backtrace") or 0
        module.start(torch._C.TensorBase, samples, *addresses, what)
        _host = module
    return _host
