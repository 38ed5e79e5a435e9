// Launching kernels of a GPU, in a C++ wrapper: straight to the driver, whose library the loader opens.
#pragma once
static int32_t (*cuLaunchKernel)(void*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, void*, void**,
                                 void**);
static int32_t (*aoti_torch_get_current_cuda_stream)(int32_t, void**);

namespace mp {

// `values`: pointers and sizes, all eight bytes wide, then room for two pointers to scratch memory, which are null.
template <int count> static inline int32_t launch(const Kernel& kernel, int64_t grid, void* stream, uint64_t (&values)[count]) {
    if (grid <= 0) return 0;
    void* parameters[count];
    for (int i = 0; i < count; ++i) parameters[i] = &values[i];
    return cuLaunchKernel(kernel.function, uint32_t(grid), 1, 1, uint32_t(kernel.threads), 1, 1, uint32_t(kernel.shared),
                          stream, parameters, nullptr);
}

}  // namespace mp
