// What every C++ wrapper of memplan stands on. No header at all: a wrapper compiles in a fraction of a second.
//
// A wrapper holds no state: all that differs between two graphs of one text (kernels, constants) comes with the call.
// It knows neither Python nor torch's C++ interface. Functions of torch are those of its small C interface, found by name
// when the library is loaded (`memplan_imports`); what that interface cannot do is done by `Host::python`.
// Handles are owned by the one variable that holds them, but for those of inputs and constants, which are the caller's.
#pragma once
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
struct AtenTensorOpaque;
typedef AtenTensorOpaque* AtenTensorHandle;

#define MP_TORCH(X) \
    X(aoti_torch_delete_tensor_object, (AtenTensorHandle)) \
    X(aoti_torch_new_tensor_handle, (AtenTensorHandle, AtenTensorHandle*)) \
    X(aoti_torch_get_data_ptr, (AtenTensorHandle, void**)) \
    X(aoti_torch_get_storage_offset, (AtenTensorHandle, int64_t*)) \
    X(aoti_torch_get_dim, (AtenTensorHandle, int64_t*)) \
    X(aoti_torch_get_sizes, (AtenTensorHandle, int64_t**)) \
    X(aoti_torch_get_strides, (AtenTensorHandle, int64_t**)) \
    X(aoti_torch_empty_strided, \
      (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*)) \
    X(aoti_torch__reinterpret_tensor, \
      (AtenTensorHandle, int64_t, const int64_t*, const int64_t*, int64_t, AtenTensorHandle*)) \
    X(aoti_torch__alloc_from_pool, \
      (AtenTensorHandle, int64_t, int32_t, int64_t, const int64_t*, const int64_t*, AtenTensorHandle*)) \
    X(aoti_torch_copy_, (AtenTensorHandle, AtenTensorHandle, int32_t)) \
    X(aoti_torch_zero_, (AtenTensorHandle))

#define MP_DECLARE(name, arguments) static int32_t(*name) arguments;
MP_TORCH(MP_DECLARE)

// A function of one of the libraries, by name; the loader fills in the pointer.
struct Import {
    const char* name;
    void** slot;
};
#define MP_IMPORT(name, arguments) {#name, reinterpret_cast<void**>(&name)},

struct Call;

// What a wrapper may ask of whoever calls it. Each returns 0, or 1 where the call has to end.
struct Host {
    // Runs line number `line` in Python: tensors, numbers and opaque inputs in, tensors and numbers out.
    int32_t (*python)(Call*, int32_t line, const AtenTensorHandle* tensors, int32_t, const int64_t* numbers, int32_t,
                      const int32_t* objects, int32_t, AtenTensorHandle* made, int32_t, int64_t* known, int32_t);
    // Lets go of an input.
    void (*release)(Call*, int32_t input);
};

// A kernel of the CPU is its function alone. What tuning decides stands here and not in the text: `grid` where it depends
// on no size, else block sizes to divide by.
struct Kernel {
    void* function;
    int64_t threads;
    int32_t shared;
    int32_t early;  // whether it may start before the kernel in front of it has ended, for which it waits itself
    int64_t grid;
    int64_t blocks[3];
    void* context;  // of the GPU that it was loaded onto
};

struct Call {
    const Host* host;
    const Kernel* kernels;
    const AtenTensorHandle* constants;
    AtenTensorHandle* inputs;
    const int64_t* numbers;
    AtenTensorHandle* outputs;
    int64_t* numbers_out;
    const char* failed;  // what of torch's interface or of the driver did not work
    const char* reason;  // why, where it is known
    int32_t step;        // of the plan, that runs
};

namespace mp {

template <class T> static inline T floordiv(T a, T b) { T q = a / b; return q - ((a % b != 0) && ((a < 0) != (b < 0))); }
template <class T> static inline T mod(T a, T b) { T r = a % b; return r + ((r != 0 && ((r < 0) != (b < 0))) ? b : 0); }
template <class T> static inline T maximum(T a, T b) { return a > b ? a : b; }
template <class T> static inline T minimum(T a, T b) { return a < b ? a : b; }
template <class T> static inline T abs(T a) { return a < 0 ? -a : a; }
template <class T> static inline T shl(T a, T b) { return b > 63 ? 0 : T(uint64_t(a) << b); }
template <class T> static inline T shr(T a, T b) { return b > 63 ? (a < 0 ? -1 : 0) : a >> b; }
template <class T> static inline T pow(T base, T n) {
    T out = 1;
    for (; n > 0; n >>= 1, base *= base) out *= (n & 1) ? base : 1;
    return out;
}

static inline void drop(AtenTensorHandle& tensor) {
    if (tensor) aoti_torch_delete_tensor_object(tensor);
    tensor = nullptr;
}

static inline AtenTensorHandle take(AtenTensorHandle& tensor) {
    AtenTensorHandle out = tensor;
    tensor = nullptr;
    return out;
}

// An own allocation. What fails is tried again in Python, which raises torch's own error.
static int32_t empty(Call& call, int32_t dtype, int32_t device, int32_t index, int64_t dim, const int64_t* sizes,
                     const int64_t* strides, AtenTensorHandle* out) {
    if (!aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, out)) return 0;
    int64_t numbers[4 + 2 * 64] = {dtype, device, index, dim};
    if (dim > 64) return 1;
    for (int64_t i = 0; i < dim; ++i) numbers[4 + i] = sizes[i], numbers[4 + dim + i] = strides[i];
    return call.host->python(&call, 0, nullptr, 0, numbers, int32_t(4 + 2 * dim), nullptr, 0, out, 1, nullptr, 0);
}

// Another dtype on the same storage, `offset` bytes after the tensor's first element.
static int32_t reinterpret_as(AtenTensorHandle tensor, int64_t itemsize, int64_t offset, int32_t dtype, int64_t dim,
                              const int64_t* sizes, const int64_t* strides, AtenTensorHandle* out) {
    static const int64_t one[] = {1};
    int64_t start = 0;
    if (aoti_torch_get_storage_offset(tensor, &start)) return 1;
    if (!start) return aoti_torch__alloc_from_pool(tensor, offset, dtype, dim, sizes, strides, out);
    AtenTensorHandle first = nullptr;
    if (aoti_torch__reinterpret_tensor(tensor, 1, one, one, -start, &first)) return 1;
    int32_t status =
        aoti_torch__alloc_from_pool(first, start * itemsize + offset, dtype, dim, sizes, strides, out);
    aoti_torch_delete_tensor_object(first);
    return status;
}

static bool laid_out(AtenTensorHandle tensor, int64_t dim, const int64_t* sizes, const int64_t* strides) {
    int64_t found = 0, *own_sizes = nullptr, *own_strides = nullptr;
    if (aoti_torch_get_dim(tensor, &found) || found != dim || aoti_torch_get_sizes(tensor, &own_sizes) ||
        aoti_torch_get_strides(tensor, &own_strides))
        return false;
    for (int64_t i = 0; i < dim; ++i)
        if (own_sizes[i] != sizes[i] || (own_strides[i] != strides[i] && sizes[i] > 1)) return false;
    return true;
}

static bool misaligned(AtenTensorHandle tensor) {
    void* address = nullptr;
    return aoti_torch_get_data_ptr(tensor, &address) || (reinterpret_cast<uint64_t>(address) & 15);
}

}  // namespace mp

// Leaves the wrapper if something of torch's interface fails.
#define MP(...) \
    do { \
        if (__builtin_expect((__VA_ARGS__) != 0, 0)) return f.call->failed = #__VA_ARGS__, 1; \
    } while (0)
// The same where the host has said already what is wrong.
#define MP_HOST(...) \
    do { \
        if (__builtin_expect((__VA_ARGS__) != 0, 0)) return 1; \
    } while (0)
