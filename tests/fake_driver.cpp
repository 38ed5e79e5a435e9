// A CUDA driver, and the few functions of torch's C interface that need a GPU, for a machine without one.
//
// What is launched is written down, and then computed: a "cubin" here is an ELF magic number and the index of a registered
// function of the CPU that takes the kernel's own arguments. Device memory is memory of the CPU.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

struct Registered {
  void* function;
  int arguments;
};
struct Module {
  uint64_t kernel;
  void* context;
};
struct Launch {
  uint64_t kernel, grid[3], block[3], shared, stream, context, early, count, arguments[128];
};
// cuda.h: CUlaunchAttribute, CUlaunchConfig
struct Attribute {
  int id, padding, value;
  char rest[60];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};
std::vector<Registered> registered;
std::vector<Launch> launches;
std::mutex lock;
thread_local std::vector<void*> contexts;
using Many = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                      uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                      uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                      uint64_t, uint64_t);

}  // namespace

extern "C" {

// What tests set and read.
int fake_status = 0;  // what the next launches return
int fake_shared_asked = 0;
int fake_version = 12080;
int fake_out_of_memory = 0;  // whether allocations fail, as torch's do: with Python's error set
int64_t fake_allocations = 0;
int32_t (*fake_empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**) = nullptr;

uint64_t fake_register(void* function, int arguments) {
  registered.push_back({function, arguments});
  return registered.size() - 1;
}
uint64_t fake_launch_count() { return launches.size(); }
const Launch* fake_launch(uint64_t k) { return &launches[k]; }
void fake_reset() { launches.clear(), fake_status = 0, fake_out_of_memory = 0, fake_shared_asked = 0, fake_allocations = 0, fake_version = 12080; }
void fake_bind(void* context) { contexts.assign(context ? 1 : 0, context); }
void* fake_current() { return contexts.empty() ? nullptr : contexts.back(); }

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = fake_version, 0; }
int cuGetErrorString(int status, const char** text) {
  *text = status == 700 ? "an illegal memory access was encountered" : "some other error";
  return 0;
}
int cuDeviceGet(int* device, int index) { return *device = index, index > 3 ? 101 : 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 232448, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(0x1000 + static_cast<uint64_t>(device));
  return 0;
}
int cuCtxGetCurrent(void** context) { return *context = fake_current(), 0; }
int cuCtxPushCurrent_v2(void* context) { return contexts.push_back(context), 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = fake_current(), contexts.pop_back(), 0; }
int cuModuleLoadData(void** module, const void* image) {
  uint64_t kernel;
  if (std::memcmp(image, "\x7f" "ELF", 4)) return 200;
  std::memcpy(&kernel, static_cast<const char*>(image) + 4, 8);
  if (!fake_current() || kernel >= registered.size()) return 201;
  *module = new Module{kernel, fake_current()};
  return 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char*) { return *function = module, 0; }
int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute == 8) fake_shared_asked = value;
  return 0;
}
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void**) {
  const Module& module = *static_cast<Module*>(function);
  uint64_t early = 0;
  for (unsigned i = 0; i < config->count; ++i)  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early |= config->attributes[i].id == 6 && config->attributes[i].value == 1;
  const unsigned* g = config->grid;
  const unsigned* b = config->block;
  if (module.context != fake_current()) return 400;  // invalid handle
  if (fake_status) return fake_status;
  const Registered& kernel = registered[module.kernel];
  Launch made = {module.kernel, {g[0], g[1], g[2]}, {b[0], b[1], b[2]}, config->shared,
                 reinterpret_cast<uint64_t>(config->stream), reinterpret_cast<uint64_t>(module.context), early,
                 static_cast<uint64_t>(kernel.arguments), {}};
  for (int i = 0; i < kernel.arguments + 2; ++i) std::memcpy(&made.arguments[i], parameters[i], 8);
  if (made.arguments[kernel.arguments] || made.arguments[kernel.arguments + 1]) return 1;  // scratch that nobody asked for
  {
    std::lock_guard<std::mutex> hold(lock);
    launches.push_back(made);
  }
  const uint64_t* a = made.arguments;
  reinterpret_cast<Many>(kernel.function)(
      a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17],
      a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31]);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const Config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(0x5000 + static_cast<uint64_t>(device));
  return 0;
}
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                                 int32_t index, void** out) {
  fake_allocations += device == 1;
  if (fake_out_of_memory && device == 1) {
    const auto ensure = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure"));
    const auto release = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "PyGILState_Release"));
    const auto set = reinterpret_cast<void (*)(void*, const char*)>(dlsym(RTLD_DEFAULT, "PyErr_SetString"));
    const int held = ensure();
    set(*static_cast<void**>(dlsym(RTLD_DEFAULT, "PyExc_RuntimeError")), "left behind");
    release(held);
    return 1;
  }
  return fake_empty_strided(dim, sizes, strides, dtype, 0, device == 1 ? -1 : index, out);
}

}  // extern "C"
