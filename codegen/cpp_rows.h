// What the loops over rows and tiles need beside the prelude.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
namespace mp {

// Elements of a range of ``size`` that one thread owns: equal parts in multiples of ``least``, one for each thread.
MP_INLINE int64_t owned_length(int64_t size, int64_t least) {
#ifdef _OPENMP
    int64_t threads = omp_get_max_threads();
#else
    int64_t threads = 1;
#endif
    int64_t part = (size + threads - 1) / threads;
    return (part + least - 1) / least * least;
}

// Points per chunk of a row range: at least `least`, at most 64 chunks, a multiple of `multiple`.
MP_INLINE int64_t chunk_length(int64_t size, int64_t least, int64_t multiple) {
    int64_t wanted = (size + 63) / 64;
    wanted = wanted < least ? least : wanted;
    return (wanted + multiple - 1) / multiple * multiple;
}

// Square blocks transposed in registers: out[j * out_stride + i] = in[i * in_stride + j] for i, j below `side`.
template <int Bytes> struct Block {
    static constexpr int side = 8;
    template <class T> static MP_ALWAYS void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
        for (int i = 0; i < side; ++i)
            for (int j = 0; j < side; ++j) out[j * out_stride + i] = in[i * in_stride + j];
    }
};
template <> struct Block<4> {
    static constexpr int side = 8;
    typedef uint32_t Vector __attribute__((vector_size(32)));
    template <class T> static MP_ALWAYS void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
        Vector a[8], b[8];
        for (int i = 0; i < 8; ++i) __builtin_memcpy(&a[i], in + i * in_stride, sizeof(Vector));
        for (int i = 0; i < 8; i += 2) {  // words of two rows, inside halves of 128 bits
            b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
            b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
        }
        for (int i = 0; i < 8; i += 4)  // pairs of words of four rows
            for (int k = 0; k < 2; ++k) {
                a[i + 2 * k] = __builtin_shufflevector(b[i + k], b[i + 2 + k], 0, 1, 8, 9, 4, 5, 12, 13);
                a[i + 2 * k + 1] = __builtin_shufflevector(b[i + k], b[i + 2 + k], 2, 3, 10, 11, 6, 7, 14, 15);
            }
        for (int i = 0; i < 4; ++i) {  // halves of all eight
            b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
            b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        }
        for (int i = 0; i < 8; ++i) __builtin_memcpy(out + i * out_stride, &b[i], sizeof(Vector));
    }
};
template <> struct Block<2> {
    static constexpr int side = 8;
    typedef uint16_t Vector __attribute__((vector_size(16)));
    template <class T> static MP_ALWAYS void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
        Vector a[8], b[8];
        for (int i = 0; i < 8; ++i) __builtin_memcpy(&a[i], in + i * in_stride, sizeof(Vector));
        for (int i = 0; i < 8; i += 2) {
            b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
            b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int i = 0; i < 8; i += 4)
            for (int k = 0; k < 2; ++k) {
                a[i + 2 * k] = __builtin_shufflevector(b[i + k], b[i + 2 + k], 0, 1, 8, 9, 2, 3, 10, 11);
                a[i + 2 * k + 1] = __builtin_shufflevector(b[i + k], b[i + 2 + k], 4, 5, 12, 13, 6, 7, 14, 15);
            }
        for (int i = 0; i < 4; ++i) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        }
        for (int i = 0; i < 8; ++i) __builtin_memcpy(out + i * out_stride, &b[i], sizeof(Vector));
    }
};

// tile[p * Q + q] = in[q * stride + p] for p below `rows`, q below `columns`.
template <int Q, class T>
MP_INLINE void load_tile(const T* in, int64_t stride, int64_t rows, int64_t columns, T* tile) {
    constexpr int side = Block<sizeof(T)>::side;
    const int64_t even_rows = rows / side * side, even_columns = columns / side * side;
    for (int64_t q = 0; q < even_columns; q += side) {
        for (int64_t p = 0; p < even_rows; p += side)
            Block<sizeof(T)>::transpose(in + q * stride + p, stride, tile + p * Q + q, Q);
        for (int64_t i = q; i < q + side; ++i)
            for (int64_t p = even_rows; p < rows; ++p) tile[p * Q + i] = in[i * stride + p];
    }
    for (int64_t q = even_columns; q < columns; ++q)
        for (int64_t p = 0; p < rows; ++p) tile[p * Q + q] = in[q * stride + p];
}

}  // namespace mp
