// Launching kernels of a GPU, in a C++ wrapper: straight to the driver, whose library the loader opens.
#pragma once
namespace mp {
// cuda.h: CUlaunchAttribute, CUlaunchConfig, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
struct LaunchAttribute {
    int32_t id, padding, value;
    char rest[60];
};
struct LaunchConfig {
    uint32_t grid[3], block[3], shared;
    void* stream;
    LaunchAttribute* attributes;
    uint32_t count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "what cuda.h has");
constexpr int32_t starts_early = 6;
}  // namespace mp
#define MP_CUDA(X) \
    X(cuLaunchKernel, (void*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, void*, void**, void**)) \
    X(cuLaunchKernelEx, (const mp::LaunchConfig*, void*, void**, void**)) \
    X(cuGetErrorString, (int32_t, const char**)) \
    X(cuCtxGetCurrent, (void**)) \
    X(cuCtxPushCurrent_v2, (void*)) \
    X(cuCtxPopCurrent_v2, (void**)) \
    X(aoti_torch_get_current_cuda_stream, (int32_t, void**))
MP_CUDA(MP_DECLARE)

namespace mp {

static int32_t driver_failed(Call& call, const char* where, int32_t status) {
    call.failed = where;
    if (cuGetErrorString(status, &call.reason)) call.reason = "the driver has no text for its error";
    return 1;
}

// `values`: pointers and sizes, all eight bytes wide, then room for two pointers to scratch memory, which are null.
template <int count>
static inline int32_t launch(Call& call, void* context, const Kernel& kernel, const char* name, int64_t grid, void* stream,
                             uint64_t (&values)[count], int64_t grid_y = 1, int64_t grid_z = 1) {
    if (grid <= 0 || grid_y <= 0 || grid_z <= 0) return 0;
    if (__builtin_expect(grid > 0x7fffffff || grid_y > 0x7fffffff || grid_z > 0x7fffffff, 0)) {
        call.reason = "its grid has more than 2147483647 program instances";
        return call.failed = name, 1;
    }
    void* parameters[count];
    for (int i = 0; i < count; ++i) parameters[i] = &values[i];
    // another GPU than the current one, or a thread that has no context yet because it has not used a GPU before
    const bool elsewhere = context != kernel.context;
    int32_t status = elsewhere ? cuCtxPushCurrent_v2(kernel.context) : 0;
    if (__builtin_expect(status != 0, 0)) return driver_failed(call, name, status);
    const uint32_t x = uint32_t(grid), y = uint32_t(grid_y), z = uint32_t(grid_z), threads = uint32_t(kernel.threads);
    const uint32_t shared = uint32_t(kernel.shared);
    if (kernel.early) {
        LaunchAttribute attribute = {starts_early, 0, 1, {}};
        const LaunchConfig config = {{x, y, z}, {threads, 1, 1}, shared, stream, &attribute, 1};
        status = cuLaunchKernelEx(&config, kernel.function, parameters, nullptr);
    } else {
        status = cuLaunchKernel(kernel.function, x, y, z, threads, 1, 1, shared, stream, parameters, nullptr);
    }
    if (elsewhere) cuCtxPopCurrent_v2(&context);
    return __builtin_expect(status != 0, 0) ? driver_failed(call, name, status) : 0;
}

}  // namespace mp

#define MP_LAUNCH(index, name, grid, stream, values) \
    MP_HOST(mp::launch(*f.call, f.context, kernels[index], name, grid, stream, values))
#define MP_LAUNCH_USER(index, name, x, y, z, stream, values) \
    MP_HOST(mp::launch(*f.call, f.context, kernels[index], name, x, stream, values, y, z))
