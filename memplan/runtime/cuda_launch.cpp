// Loading and launching kernels through the CUDA driver, for Python. All arguments of a kernel are eight bytes wide.
// The driver is opened at run time; `DRIVER` lists the functions of cuda.h that are used.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <cstdint>
#include <cstring>

#define DRIVER(X) \
  X(cuLaunchKernel, (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**)) \
  X(cuLaunchKernelEx, (const driver::LaunchConfig*, void*, void**, void**)) \
  X(cuGetErrorString, (int, const char**)) \
  X(cuDriverGetVersion, (int*)) \
  X(cuInit, (unsigned)) \
  X(cuDeviceGet, (int*, int)) \
  X(cuDeviceGetAttribute, (int*, int, int)) \
  X(cuDevicePrimaryCtxRetain, (void**, int)) \
  X(cuCtxGetCurrent, (void**)) \
  X(cuCtxPushCurrent_v2, (void*)) \
  X(cuCtxPopCurrent_v2, (void**)) \
  X(cuModuleLoadData, (void**, const void*)) \
  X(cuModuleUnload, (void*)) \
  X(cuModuleGetFunction, (void**, void*, const char*)) \
  X(cuFuncSetAttribute, (void*, int, int))

namespace driver {
// cuda.h: CUlaunchAttribute, CUlaunchConfig
struct LaunchAttribute {
  int id, padding, value;
  char rest[60];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "what cuda.h has");
#define MP_DECLARE(name, arguments) int(*name) arguments = nullptr;
DRIVER(MP_DECLARE)
}  // namespace driver

namespace {

constexpr Py_ssize_t most_arguments = 256;
// after its own arguments a Triton kernel takes two pointers to scratch memory, null where it needs none
constexpr int scratch_pointers = 2;
// cuda.h: CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int most_shared = 97, allowed_shared = 8;
// more has to be asked for
constexpr int plain_shared = 48 * 1024;
// cuda.h: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; and the first driver (CUDA 12.3) that records such
// launches into CUDA graphs
constexpr int starts_early = 6, first_driver = 12030;

struct Kernel {
  void *function, *context;
  unsigned grid, threads, shared;
  unsigned grid_y = 1, grid_z = 1;
  bool early = false;  // started before the kernel in front of it has ended, for which it waits itself
};

PyObject* failed(const char* what, int status) {
  const char* text = nullptr;
  if (driver::cuGetErrorString) driver::cuGetErrorString(status, &text);
  return PyErr_Format(PyExc_RuntimeError, "%s failed with error %d of the CUDA driver: %s", what, status,
                      text ? text : "it has no text for it");
}

// Another GPU than the current one, or a thread without a context because it has not used a GPU before, changes the
// context for the launch.
int start(const Kernel& kernel, void* stream, void** parameters) {
  void* context = nullptr;
  int status = driver::cuCtxGetCurrent(&context);
  const bool elsewhere = context != kernel.context;
  if (!status && elsewhere) status = driver::cuCtxPushCurrent_v2(kernel.context);
  if (status) return status;
  if (kernel.early) {
    driver::LaunchAttribute attribute = {starts_early, 0, 1, {}};
    const driver::LaunchConfig config = {{kernel.grid, kernel.grid_y, kernel.grid_z}, {kernel.threads, 1, 1},
                                         kernel.shared, stream, &attribute, 1};
    status = driver::cuLaunchKernelEx(&config, kernel.function, parameters, nullptr);
  } else {
    status = driver::cuLaunchKernel(kernel.function, kernel.grid, kernel.grid_y, kernel.grid_z, kernel.threads, 1, 1,
                                    kernel.shared, stream, parameters, nullptr);
  }
  if (elsewhere) driver::cuCtxPopCurrent_v2(&context);
  return status;
}

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
  status = start(kernel, reinterpret_cast<void*>(values[0]), parameters);
  Py_END_ALLOW_THREADS
  if (status != 0) return failed("cuLaunchKernel", status);
  Py_RETURN_NONE;
}

PyObject* launch_bound(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  std::memcpy(&kernel, PyBytes_AS_STRING(self), sizeof kernel);
  return launch_on(kernel, args, count);
}

PyMethodDef bound = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch_bound)), METH_FASTCALL,
                     "launch(stream, *arguments)"};

// function, context, grid, threads, shared
bool read_kernel(PyObject* const* args, Kernel& kernel) {
  kernel.function = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(args[0]));
  kernel.context = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(args[1]));
  unsigned* fields[] = {&kernel.grid, &kernel.threads, &kernel.shared};
  for (int i = 0; i < 3 && !PyErr_Occurred(); ++i) {
    const unsigned long value = PyLong_AsUnsignedLong(args[i + 2]);
    if (value > 0x7fffffff && !PyErr_Occurred())
      PyErr_Format(PyExc_OverflowError, "a grid of %lu program instances is more than a launch can have", value);
    *fields[i] = static_cast<unsigned>(value);
  }
  return !PyErr_Occurred();
}

// the same, and whether it is started early
bool read_early(PyObject* const* args, Kernel& kernel) {
  const int early = read_kernel(args, kernel) ? PyObject_IsTrue(args[5]) : -1;
  kernel.early = early > 0;
  return early >= 0;
}

PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "bind(function, context, grid, threads, shared, early)");
    return nullptr;
  }
  if (!read_early(args, kernel)) return nullptr;
  PyObject* self = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&kernel), sizeof kernel);
  if (!self) return nullptr;
  PyObject* out = PyCFunction_NewEx(&bound, self, nullptr);
  Py_DECREF(self);
  return out;
}

PyObject* launch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Kernel kernel;
  if (count < 7) {
    PyErr_SetString(PyExc_TypeError, "launch(function, context, grid, threads, shared, early, stream, *arguments)");
    return nullptr;
  }
  if (!read_early(args, kernel)) return nullptr;
  return launch_on(kernel, args + 6, count - 6);
}

// A grid along three axes, none of them zero.
PyObject* launch_grid(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 8) {
    PyErr_SetString(PyExc_TypeError, "launch_grid(function, context, x, y, z, threads, shared, stream, *arguments)");
    return nullptr;
  }
  PyObject* const first[] = {args[0], args[1], args[2], args[5], args[6]};
  PyObject* const second[] = {args[0], args[1], args[3], args[4], args[6]};
  Kernel kernel, others;
  if (!read_kernel(first, kernel) || !read_kernel(second, others)) return nullptr;
  kernel.grid_y = others.grid, kernel.grid_z = others.threads;
  return launch_on(kernel, args + 7, count - 7);
}

// load(cubin, entry, shared, device) -> (function, context). The module stays loaded until the process ends: CUDA graphs
// may hold its function longer than anybody here knows.
PyObject* load(PyObject*, PyObject* args) {
  const char *cubin, *entry, *what = "cuInit";
  Py_ssize_t size;
  int shared, index;
  if (!PyArg_ParseTuple(args, "y#sii", &cubin, &size, &entry, &shared, &index)) return nullptr;
  void *context = nullptr, *module = nullptr, *function = nullptr, *popped = nullptr;
  int device = 0, most = 0;
  int status = driver::cuInit(0);
  if (!status) status = driver::cuDeviceGet(&device, index), what = "cuDeviceGet";
  if (!status) status = driver::cuDeviceGetAttribute(&most, most_shared, device), what = "cuDeviceGetAttribute";
  if (status) return failed(what, status);
  if (shared > most)
    return PyErr_Format(PyExc_RuntimeError, "%s needs %d bytes of shared memory, and cuda:%d has %d for a block", entry,
                        shared, index, most);
  Py_BEGIN_ALLOW_THREADS
  status = driver::cuDevicePrimaryCtxRetain(&context, device), what = "cuDevicePrimaryCtxRetain";
  if (!status) status = driver::cuCtxPushCurrent_v2(context), what = "cuCtxPushCurrent";
  if (!status) {
    status = driver::cuModuleLoadData(&module, cubin), what = "cuModuleLoadData";
    if (!status) status = driver::cuModuleGetFunction(&function, module, entry), what = "cuModuleGetFunction";
    if (!status && shared > plain_shared)
      status = driver::cuFuncSetAttribute(function, allowed_shared, shared), what = "cuFuncSetAttribute";
    if (status && module) driver::cuModuleUnload(module);
    driver::cuCtxPopCurrent_v2(&popped);
  }
  Py_END_ALLOW_THREADS
  if (status) return failed(what, status);
  return Py_BuildValue("KK", reinterpret_cast<unsigned long long>(function),
                       reinterpret_cast<unsigned long long>(context));
}

PyObject* open_driver(PyObject*, PyObject* path) {
  const char* name = PyUnicode_AsUTF8(path);
  if (!name) return nullptr;
  void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
  if (!library) return PyErr_Format(PyExc_OSError, "no CUDA driver: %s", dlerror());
#define MP_FIND(function, arguments) \
  driver::function = reinterpret_cast<decltype(driver::function)>(dlsym(library, #function)); \
  if (!driver::function) return PyErr_Format(PyExc_OSError, "the CUDA driver %s has no %s", name, #function);
  DRIVER(MP_FIND)
  Py_RETURN_NONE;
}

// Whether the driver can start kernels early, recorded CUDA graphs included.
PyObject* launches_early(PyObject*, PyObject*) {
  int version = 0;
  const int status = driver::cuDriverGetVersion(&version);
  if (status) return failed("cuDriverGetVersion", status);
  return PyBool_FromLong(version >= first_driver);
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {{"bind", fast(bind), METH_FASTCALL, nullptr},
                         {"launch", fast(launch), METH_FASTCALL, nullptr},
                         {"launch_grid", fast(launch_grid), METH_FASTCALL, nullptr},
                         {"launches_early", launches_early, METH_NOARGS, nullptr},
                         {"load", load, METH_VARARGS, nullptr},
                         {"open_driver", open_driver, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "memplan_cuda_launch", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_memplan_cuda_launch() { return PyModule_Create(&definition); }
