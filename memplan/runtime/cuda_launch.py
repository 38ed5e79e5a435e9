"""Launching CUDA kernels whose arguments are all eight bytes wide (pointers and int64), by one small native module.

Triton 3.6 compiles a launcher in C for every signature (half a second each), and both it and 3.7 pass through Python
on every launch. This module is built once, and turns a loaded kernel into a callable that goes straight to
``cuLaunchKernel``. The driver is opened at run time, so that building needs no CUDA.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Callable
from types import ModuleType

from memplan.ir.errors import CacheError, CompilerError

from .build import build_library

_log = logging.getLogger("memplan.triton")

_SOURCE = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <cstdint>
#include <cstring>

namespace {

using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                       void**);
using ErrorText = int (*)(int, const char**);
Launch cu_launch_kernel = nullptr;
ErrorText cu_get_error_string = nullptr;

constexpr Py_ssize_t most_arguments = 256;
// after its own arguments a Triton kernel takes two pointers to scratch memory, null where it needs none
constexpr int scratch_pointers = 2;

struct Kernel {
  void* function;
  unsigned grid, threads, shared;
};

PyObject* launch_on(const Kernel& kernel, PyObject* const* args, Py_ssize_t count) {
  if (count < 1 || count - 1 > most_arguments) {
    PyErr_SetString(PyExc_TypeError, "a launch takes a stream and at most 256 arguments");
    return nullptr;
  }
  uint64_t values[most_arguments + 1 + scratch_pointers];
  void* parameters[most_arguments + scratch_pointers];
  for (Py_ssize_t i = 0; i < count; ++i) {
    values[i] = PyLong_AsUnsignedLongLongMask(args[i]);
    if (values[i] == static_cast<uint64_t>(-1) && PyErr_Occurred()) return nullptr;
  }
  for (int i = 0; i < scratch_pointers; ++i) values[count + i] = 0;
  for (Py_ssize_t i = 0; i < count - 1 + scratch_pointers; ++i) parameters[i] = &values[i + 1];
  if (kernel.grid == 0) Py_RETURN_NONE;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = cu_launch_kernel(kernel.function, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.shared,
                            reinterpret_cast<void*>(values[0]), parameters, nullptr);
  Py_END_ALLOW_THREADS
  if (status != 0) {
    const char* text = nullptr;
    if (cu_get_error_string) cu_get_error_string(status, &text);
    PyErr_Format(PyExc_RuntimeError, "cuLaunchKernel failed with error %d: %s", status, text ? text : "unknown");
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* launch_bound(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  std::memcpy(&kernel, PyBytes_AS_STRING(self), sizeof kernel);
  return launch_on(kernel, args, count);
}

PyMethodDef bound = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch_bound)), METH_FASTCALL,
                     "launch(stream, *arguments)"};

bool read_kernel(PyObject* const* args, Kernel& kernel) {
  kernel.function = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(args[0]));
  unsigned* fields[] = {&kernel.grid, &kernel.threads, &kernel.shared};
  for (int i = 0; i < 3; ++i) *fields[i] = static_cast<unsigned>(PyLong_AsUnsignedLong(args[i + 1]));
  return !PyErr_Occurred();
}

PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "bind(function, grid, threads, shared)");
    return nullptr;
  }
  if (!read_kernel(args, kernel)) return nullptr;
  PyObject* self = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&kernel), sizeof kernel);
  if (!self) return nullptr;
  PyObject* out = PyCFunction_NewEx(&bound, self, nullptr);
  Py_DECREF(self);
  return out;
}

PyObject* launch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  if (count < 5) {
    PyErr_SetString(PyExc_TypeError, "launch(function, grid, threads, shared, stream, *arguments)");
    return nullptr;
  }
  if (!read_kernel(args, kernel)) return nullptr;
  return launch_on(kernel, args + 4, count - 4);
}

PyObject* open_driver(PyObject*, PyObject* path) {
  const char* name = PyUnicode_AsUTF8(path);
  if (!name) return nullptr;
  void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
  void* symbol = library ? dlsym(library, "cuLaunchKernel") : nullptr;
  if (!symbol) {
    PyErr_Format(PyExc_OSError, "no CUDA driver: %s", dlerror());
    return nullptr;
  }
  cu_launch_kernel = reinterpret_cast<Launch>(symbol);
  cu_get_error_string = reinterpret_cast<ErrorText>(dlsym(library, "cuGetErrorString"));
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {{"bind", fast(bind), METH_FASTCALL, nullptr},
                         {"launch", fast(launch), METH_FASTCALL, nullptr},
                         {"open_driver", open_driver, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "memplan_cuda_launch", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_memplan_cuda_launch() { return PyModule_Create(&definition); }
"""


def build_module() -> ModuleType:
    """The native module, without a driver.

    Raises
    ------
    CompilerError
        No C++ compiler, or no headers of Python.
    """
    path = build_library(
        _SOURCE,
        name="cuda_launch",
        flags=("-O2",),
        include_dirs=(sysconfig.get_paths()["include"],),
        openmp=False,
        native=False,
        extra_key=(sys.version, str(sysconfig.get_config_var("SOABI"))),
    )
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
        module.open_driver("libcuda.so.1")
    except (CompilerError, CacheError, OSError, ImportError) as error:
        _log.warning("kernels are launched through Triton, which is slower: %s", error)
        return None
    return module


Bound = Callable[..., None]
"""``bound(stream, *arguments)`` launches."""
