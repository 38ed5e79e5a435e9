// What every CPU kernel of memplan stands on: element types, the pointwise functions that a kernel may call
// (namespace mp, named as in the IR), random numbers, reduction states and atomics.
//
// Everything a vectorised loop calls is branch-free and inline, so that g++ and clang++ vectorise it for whatever
// vector width the target has, without -ffast-math: NaN, infinities, signed zeros and subnormals come out as IEEE
// wants. The float polynomials are our own minimax fits (Lawson's reweighted least squares). One value gives one result
// wherever it stands in an array, in a vector body or in a scalar tail.
//
// Largest errors against double precision, in units in the last place (measured on 8 million floats of all exponents and
// 3 million between -20 and 20, with and without FMA): exp 1.0, expm1 1.5, log 0.9, log1p 1.5, tanh 2.4, sigmoid 2.5,
// erf 1.4, erfc 4.5 (sigmoid and erfc where the result is normal). A value takes 0.6 ns (exp) to 1.9 ns (erfc) on one
// Zen 3 core with AVX2, 0.3 to 0.8 of what eager's kernels take.
// The other float functions and all double ones are libm's, whose vector versions in glibc's libmvec are used where the
// build defines MP_MVEC (at most 4 ulp, and a scalar tail may differ from the vector body by as much; special values
// are right). libmvec leaves the vector path for infinities, NaN and subnormals, which attention masks are full of
// (exp of 30 % -inf: 6.9 ns a value, ours 0.6 to 1.5): another reason for own versions of what models use most.
//
// No <cmath>, no <algorithm>: they take three times as long to compile as the rest (the compiler's builtins do).
#pragma once
#include <stdint.h>

#define MP_INLINE static inline __attribute__((always_inline))
#define MP_ALWAYS inline __attribute__((always_inline))

#if defined(MP_MVEC) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MP_SIMD __attribute__((simd("notinbranch")))
#else
#define MP_SIMD
#endif
#define MP_LIBM1(name) \
    extern "C" MP_SIMD float name##f(float) noexcept; \
    extern "C" MP_SIMD double name(double) noexcept; \
    namespace mp { \
    MP_INLINE float name(float x) { return ::name##f(x); } \
    MP_INLINE double name(double x) { return ::name(x); } \
    }
#define MP_LIBM1_DOUBLE(name) \
    extern "C" MP_SIMD double name(double) noexcept; \
    namespace mp { \
    MP_INLINE double name(double x) { return ::name(x); } \
    }
#define MP_LIBM2(name) \
    extern "C" MP_SIMD float name##f(float, float) noexcept; \
    extern "C" MP_SIMD double name(double, double) noexcept; \
    namespace mp { \
    MP_INLINE float name(float x, float y) { return ::name##f(x, y); } \
    MP_INLINE double name(double x, double y) { return ::name(x, y); } \
    }
MP_LIBM1(sin) MP_LIBM1(cos) MP_LIBM1(tan) MP_LIBM1(asin) MP_LIBM1(acos) MP_LIBM1(atan)
MP_LIBM1(sinh) MP_LIBM1(cosh) MP_LIBM1(asinh) MP_LIBM1(acosh) MP_LIBM1(atanh)
MP_LIBM1(exp2) MP_LIBM1(log2) MP_LIBM1(log10)
MP_LIBM1_DOUBLE(exp) MP_LIBM1_DOUBLE(expm1) MP_LIBM1_DOUBLE(log) MP_LIBM1_DOUBLE(log1p) MP_LIBM1_DOUBLE(tanh)
MP_LIBM1_DOUBLE(erf) MP_LIBM1_DOUBLE(erfc)
MP_LIBM2(atan2) MP_LIBM2(hypot)
extern "C" MP_SIMD float powf(float, float) noexcept;
extern "C" MP_SIMD double pow(double, double) noexcept;
#undef MP_LIBM1
#undef MP_LIBM1_DOUBLE
#undef MP_LIBM2

namespace mp {

// ---- bits and element types -----------------------------------------------------------------------------------------

template <class To, class From>
MP_INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    __builtin_memcpy(&result, &value, sizeof(To));
    return result;
}
MP_INLINE uint32_t bits(float x) { return bits_as<uint32_t>(x); }
MP_INLINE float from_bits(uint32_t u) { return bits_as<float>(u); }
constexpr float infinity = __builtin_inff();
constexpr float nan = __builtin_nanf("");

MP_INLINE float bfloat16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }
MP_INLINE uint16_t float_to_bfloat16(float x) {  // to nearest even; NaN becomes the quiet NaN of torch
    uint32_t u = bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
// g++ 12 does not vectorise conversions of _Float16 below AVX512-FP16, so they are done on the bits.
MP_INLINE float float16_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7fffu) << 13;
    uint32_t normal = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u);  // infinity and NaN : finite
    // Subnormals: the mantissa below an implicit one, which is taken off again by an exact subtraction.
    uint32_t tiny = bits(from_bits(magnitude + 0x38800000u) - from_bits(0x38800000u));
    return from_bits(sign | (magnitude < 0x00800000u ? tiny : normal));
}
MP_INLINE uint16_t float_to_float16(float x) {  // to nearest even; overflow to infinity; NaN stays NaN
    uint32_t u = bits(x), a = u & 0x7fffffffu;
    uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    uint32_t tiny = bits(from_bits(a) + 0.5f) - 0x3f000000u;  // 0.5 has the unit of a subnormal half
    uint32_t result = a < 0x38800000u ? tiny : normal;
    result = a >= 0x47800000u ? 0x7c00u : result;
    result = a > 0x7f800000u ? 0x7e00u : result;
    return uint16_t(result | ((u >> 16) & 0x8000u));
}
// Storage only: values are computed in float, and converting back rounds. In a vector loop, go through load, store and
// rounded below: g++ does not vectorise a loop that holds a variable of these types.
struct bfloat16 {
    uint16_t raw;
    bfloat16() = default;
    MP_ALWAYS bfloat16(float x) : raw(float_to_bfloat16(x)) {}
    MP_ALWAYS bfloat16& operator=(float x) { raw = float_to_bfloat16(x); return *this; }
    MP_ALWAYS operator float() const { return bfloat16_to_float(raw); }
};
struct float16 {
    uint16_t raw;
    float16() = default;
    MP_ALWAYS float16(float x) : raw(float_to_float16(x)) {}
    MP_ALWAYS float16& operator=(float x) { raw = float_to_float16(x); return *this; }
    MP_ALWAYS operator float() const { return float16_to_float(raw); }
};

// An element as the type it is computed in, and back with rounding.
template <class T> MP_INLINE T load(const T* p) { return *p; }
MP_INLINE float load(const bfloat16* p) { return bfloat16_to_float(p->raw); }
MP_INLINE float load(const float16* p) { return float16_to_float(p->raw); }
template <class T> MP_INLINE void store(T* p, T x) { *p = x; }
MP_INLINE void store(bfloat16* p, float x) { p->raw = float_to_bfloat16(x); }
MP_INLINE void store(float16* p, float x) { p->raw = float_to_float16(x); }
// A float rounded to what T can hold: a cast to T within a kernel.
template <class T> MP_INLINE float rounded(float x);
template <> MP_ALWAYS float rounded<bfloat16>(float x) { return bfloat16_to_float(float_to_bfloat16(x)); }
template <> MP_ALWAYS float rounded<float16>(float x) { return float16_to_float(float_to_float16(x)); }

template <class T> struct Traits { using Unsigned = T; static constexpr bool floating = false; };
template <> struct Traits<bool> { using Unsigned = unsigned; static constexpr bool floating = false; };
template <> struct Traits<int8_t> { using Unsigned = uint8_t; static constexpr bool floating = false; };
template <> struct Traits<int16_t> { using Unsigned = uint16_t; static constexpr bool floating = false; };
template <> struct Traits<int32_t> { using Unsigned = uint32_t; static constexpr bool floating = false; };
template <> struct Traits<int64_t> { using Unsigned = uint64_t; static constexpr bool floating = false; };
template <> struct Traits<float> { using Unsigned = float; static constexpr bool floating = true; };
template <> struct Traits<double> { using Unsigned = double; static constexpr bool floating = true; };
template <class T> using Wrapping = typename Traits<T>::Unsigned;

// Conversion as eager does it: to bool by != 0; floats to unsigned bytes through a signed integer, so -1.0 gives 255.
template <class T> struct Target { template <class From> static MP_ALWAYS T from(From x) { return T(x); } };
template <> struct Target<bool> { template <class From> static MP_ALWAYS bool from(From x) { return x != From(0); } };
template <> struct Target<uint8_t> {
    template <class From> static MP_ALWAYS uint8_t from(From x) { return uint8_t(x); }
    static MP_ALWAYS uint8_t from(float x) { return uint8_t(int32_t(x)); }
    static MP_ALWAYS uint8_t from(double x) { return uint8_t(int64_t(x)); }
};
template <class To, class From> MP_INLINE To cast(From x) { return Target<To>::from(x); }
template <class To> MP_INLINE To cast(bool x) { return x ? To(1) : To(0); }  // a conversion does not vectorise
template <class To> MP_INLINE To cast(bfloat16 x) { return Target<To>::from(float(x)); }
template <class To> MP_INLINE To cast(float16 x) { return Target<To>::from(float(x)); }

// ---- exponentials and logarithms, float ---------------------------------------------------------------------------

MP_INLINE float fma_fast(float a, float b, float c) {  // one rounding where the machine can, else two
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;  // the first has 12 bits: k * ln2_high is exact

MP_INLINE float exp2_int(uint32_t k) { return from_bits((k + 127u) << 23); }  // 2^k for -127 < k < 128

// x = k ln 2 + r with |r| <= ln 2 / 2; the sum with 1.5 * 2^23 rounds and leaves k in the low bits.
MP_INLINE float reduce_exponent(float x, uint32_t* k) {
    float shifted = fma_fast(x, 0x1.715476p+0f, 0x1.8p23f), n = shifted - 0x1.8p23f;
    *k = bits(shifted) - 0x4b400000u;
    return fma_fast(n, -ln2_low, fma_fast(n, -ln2_high, x));
}
MP_INLINE float expm1_reduced(float r) {
    float p = 0x1.a19ee4p-13f;
    p = fma_fast(p, r, 0x1.6d754p-10f);
    p = fma_fast(p, r, 0x1.111092p-7f);
    p = fma_fast(p, r, 0x1.5554aep-5f);
    p = fma_fast(p, r, 0x1.555556p-3f);
    p = fma_fast(p, r, 0.5f);
    return fma_fast(r * r, p, r);
}
MP_INLINE float exp(float x) {
    float c = x < -104.0f ? -104.0f : x;  // comparisons written so that NaN stays
    c = c > 89.0f ? 89.0f : c;
    uint32_t k;
    float p = 1.0f + expm1_reduced(reduce_exponent(c, &k));
    uint32_t half = uint32_t(int32_t(k) >> 1);  // two steps, for results beyond the ends of the exponent
    return p * exp2_int(half) * exp2_int(k - half);
}
MP_INLINE float expm1(float x) {
    float c = x < -20.0f ? -20.0f : x;
    c = c > 89.0f ? 89.0f : c;
    uint32_t k;
    float p = expm1_reduced(reduce_exponent(c, &k)), scale = exp2_int(k - 1u);
    float result = (scale * p + (scale - 0.5f)) * 2.0f;
    return __builtin_fabsf(x) < 0x1p-25f ? x : result;
}
// log(x + correction) for normal x > 0: x = 2^k m, sqrt(1/2) <= m < sqrt(2).
MP_INLINE float log_normal(float x, float correction, float extra_k) {
    uint32_t u = bits(x);
    int32_t k = int32_t(u - 0x3f3504f3u) >> 23;
    float m = from_bits(u - (uint32_t(k) << 23));
    float f = (m - 1.0f) + correction * exp2_int(uint32_t(-(k > 60 ? 60 : k)));
    float n = float(k) + extra_k;
    float p = 0x1.1b4026p-4f;
    p = fma_fast(p, f, -0x1.e2e8b8p-4f);
    p = fma_fast(p, f, 0x1.e65150p-4f);
    p = fma_fast(p, f, -0x1.fb4362p-4f);
    p = fma_fast(p, f, 0x1.2332b6p-3f);
    p = fma_fast(p, f, -0x1.5562e2p-3f);
    p = fma_fast(p, f, 0x1.99a546p-3f);
    p = fma_fast(p, f, -0x1.ffffeep-3f);
    p = fma_fast(p, f, 0x1.555546p-2f);
    float square = f * f;
    float small = fma_fast(square * f, p, fma_fast(n, ln2_low, -0.5f * square));
    return fma_fast(n, ln2_high, f + small);
}
MP_INLINE float log_special(float x, float result) {
    result = x == infinity ? infinity : result;
    result = x == 0.0f ? -infinity : result;
    return x >= 0.0f ? result : nan;
}
MP_INLINE float log(float x) {
    bool tiny = x < 0x1p-126f;
    return log_special(x, log_normal(tiny ? x * 0x1p23f : x, 0.0f, tiny ? -23.0f : 0.0f));
}
MP_INLINE float log1p(float x) {
    float u = 1.0f + x;
    float lost = x < 1.0f ? x - (u - 1.0f) : 1.0f - (u - x);  // what the sum has rounded away
    float result = log_special(u, log_normal(u, u < 0x1p60f ? lost : 0.0f, 0.0f));
    return __builtin_fabsf(x) < 0x1p-25f ? x : result;
}
MP_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
MP_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
MP_INLINE float tanh(float x) {
    float a = __builtin_fabsf(x);
    float t = expm1(2.0f * (a > 10.0f ? 10.0f : a));
    return __builtin_copysignf(t / (t + 2.0f), x);
}

// ---- error function, float ----------------------------------------------------------------------------------------

MP_INLINE float erf_small(float x) {  // |x| < 0.95: x + x P(x^2)
    float t = x * x, s = 0x1.58947p-14f;
    s = fma_fast(s, t, -0x1.a8fc6cp-11f);
    s = fma_fast(s, t, 0x1.54a49p-8f);
    s = fma_fast(s, t, -0x1.b80b0ep-6f);
    s = fma_fast(s, t, 0x1.ce2de2p-4f);
    s = fma_fast(s, t, -0x1.812742p-2f);
    s = fma_fast(s, t, 0x1.06eba8p-3f);
    return fma_fast(s, x, x);
}
MP_INLINE float exp_bounded(float x) {  // exp where the result is normal: no clamping, one step
    uint32_t k;
    float p = 1.0f + expm1_reduced(reduce_exponent(x, &k));
    return p * exp2_int(k);
}
MP_INLINE float erf(float x) {
    float a = __builtin_fabsf(x);
    float c = a > 4.0f ? 4.0f : a;  // beyond: 1 - exp(-Q(x)), 1 from 4 on
    float q = 0x1.67cc24p-16f;
    q = fma_fast(q, c, -0x1.cbd514p-12f);
    q = fma_fast(q, c, 0x1.12a6eap-8f);
    q = fma_fast(q, c, -0x1.9c6a3cp-6f);
    q = fma_fast(q, c, 0x1.bbd954p-4f);
    q = fma_fast(q, c, 0x1.443c48p-1f);
    q = fma_fast(q, c, 0x1.212a52p+0f);
    q = fma_fast(q, c, -0x1.7ea5c6p-13f);
    float large = 1.0f - exp_bounded(-q);
    return __builtin_copysignf(a < 0.95f ? erf_small(a) : large, x);
}
// From 0.5 on exp(-x^2) R((x - 3) / (x + 3)) / (1 + 2 x), the square kept to twice the precision.
MP_INLINE float erfc(float x) {
    float a = __builtin_fabsf(x);
    a = a > 10.5f ? 10.5f : a;
    float square = a * a;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    float lost = __builtin_fmaf(a, a, -square);
#else
    float lost = float(double(a) * double(a) - double(square));
#endif
    float u = (a - 3.0f) / (a + 3.0f);
    float p = -0x1.17f708p-12f;
    p = fma_fast(p, u, -0x1.966464p-11f);
    p = fma_fast(p, u, 0x1.0681p-9f);
    p = fma_fast(p, u, 0x1.505ec6p-9f);
    p = fma_fast(p, u, -0x1.85e8dcp-6f);
    p = fma_fast(p, u, 0x1.17bd72p-4f);
    p = fma_fast(p, u, -0x1.e88892p-4f);
    p = fma_fast(p, u, 0x1.09840ep-3f);
    p = fma_fast(p, u, -0x1.85a196p-5f);
    p = fma_fast(p, u, -0x1.15c08ap-3f);
    p = fma_fast(p, u, 0x1.40c522p+0f);
    float tail = p / fma_fast(2.0f, a, 1.0f);
    tail = fma_fast(-lost, tail, tail) * exp(-square);
    tail = x < 0.0f ? 2.0f - tail : tail;
    return __builtin_fabsf(x) < 0.5f ? 1.0f - erf_small(x) : tail;
}

// ---- arithmetic, one function per operation of the IR --------------------------------------------------------------
// Integers wrap around: arithmetic is done unsigned. Bools are integers 0 and 1, and results are cut back to T.

template <class T> MP_INLINE T add(T a, T b) { return T(Wrapping<T>(a) + Wrapping<T>(b)); }
template <class T> MP_INLINE T sub(T a, T b) { return T(Wrapping<T>(a) - Wrapping<T>(b)); }
template <class T> MP_INLINE T mul(T a, T b) { return T(Wrapping<T>(a) * Wrapping<T>(b)); }
template <> MP_ALWAYS int16_t mul(int16_t a, int16_t b) { return int16_t(uint32_t(a) * uint32_t(b)); }  // no promotion
template <> MP_ALWAYS uint16_t mul(uint16_t a, uint16_t b) { return uint16_t(uint32_t(a) * uint32_t(b)); }
template <class T> MP_INLINE T neg(T a) {
    if constexpr (Traits<T>::floating) return -a;
    else return T(Wrapping<T>(0) - Wrapping<T>(a));
}
template <class T> MP_INLINE T div(T a, T b) { return a / b; }
template <class T> MP_INLINE T fma(T a, T b, T c) { return add(mul(a, b), c); }
template <> MP_ALWAYS float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <> MP_ALWAYS double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class T> MP_INLINE T square(T a) { return mul(a, a); }
template <class T> MP_INLINE T reciprocal(T a) { return T(1) / a; }
template <class T> MP_INLINE T relu(T a) { return a < T(0) ? T(0) : a; }
template <class T> MP_INLINE T sign(T a) {  // of NaN: 0, as in eager
    return T((T(0) < a) - (a < T(0)));
}
template <class T> MP_INLINE T abs(T a) { return a < T(0) ? neg(a) : a; }
template <> MP_ALWAYS float abs(float a) { return __builtin_fabsf(a); }
template <> MP_ALWAYS double abs(double a) { return __builtin_fabs(a); }
template <class T> MP_INLINE bool signbit(T a) { return a < T(0); }
template <> MP_ALWAYS bool signbit(float a) { return (bits(a) >> 31) != 0; }
template <> MP_ALWAYS bool signbit(double a) { return (bits_as<uint64_t>(a) >> 63) != 0; }
MP_INLINE float copysign(float a, float b) { return __builtin_copysignf(a, b); }
MP_INLINE double copysign(double a, double b) { return __builtin_copysign(a, b); }
template <class T> MP_INLINE bool isnan(T a) { return a != a; }
template <class T> MP_INLINE bool isinf(T a) {
    if constexpr (Traits<T>::floating) return abs(a) == T(infinity);
    else return false;
}
template <class T> MP_INLINE T maximum(T a, T b) { return (a > b) | (a != a) ? a : b; }  // NaN of either side
template <class T> MP_INLINE T minimum(T a, T b) { return (a < b) | (a != a) ? a : b; }
template <class T> MP_INLINE T fmax(T a, T b) { return (a > b) | (b != b) ? a : b; }  // the side that is not NaN
template <class T> MP_INLINE T fmin(T a, T b) { return (a < b) | (b != b) ? a : b; }
template <class T> MP_INLINE T where(bool condition, T a, T b) { return condition ? a : b; }

#define MP_ROUNDING(name, builtin) \
    template <class T> MP_INLINE T name(T a) { return a; } \
    template <> MP_ALWAYS float name(float a) { return __builtin_##builtin##f(a); } \
    template <> MP_ALWAYS double name(double a) { return __builtin_##builtin(a); }
MP_ROUNDING(floor, floor) MP_ROUNDING(ceil, ceil) MP_ROUNDING(trunc, trunc) MP_ROUNDING(round, nearbyint)
#undef MP_ROUNDING
MP_INLINE float sqrt(float a) { return __builtin_sqrtf(a); }
MP_INLINE double sqrt(double a) { return __builtin_sqrt(a); }
MP_INLINE float rsqrt(float a) { return 1.0f / sqrt(a); }
MP_INLINE double rsqrt(double a) { return 1.0 / sqrt(a); }
MP_INLINE float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }
MP_INLINE double nextafter(double a, double b) { return __builtin_nextafter(a, b); }

// Integer division never traps: by zero it gives -1 with the dividend as rest, and by -1 it negates with wrapping.
// (Eager raises an error for a zero divisor, which a kernel cannot: it is the lowering's to see to.)
template <class T> MP_INLINE T quotient(T a, T b) {
    constexpr bool is_signed = T(-1) < T(0);
    bool negates = is_signed && b == T(-1);
    T safe = (b == T(0)) | negates ? T(1) : b;
    return b == T(0) ? T(-1) : negates ? neg(a) : T(a / safe);
}
template <class T> MP_INLINE T truncdiv(T a, T b) {
    if constexpr (Traits<T>::floating) return trunc(a / b);
    else return quotient(a, b);
}
MP_INLINE float fmod(float a, float b) { return __builtin_fmodf(a, b); }
MP_INLINE double fmod(double a, double b) { return __builtin_fmod(a, b); }
template <class T> MP_INLINE T fmod(T a, T b) {
    return b == T(0) ? a : sub(a, mul(quotient(a, b), b));
}
template <class T> MP_INLINE T mod(T a, T b) {  // the sign of the divisor
    T rest = fmod(a, b);
    return (rest != T(0)) & ((rest < T(0)) != (b < T(0))) ? add(rest, b) : rest;
}
template <class T> MP_INLINE T floordiv(T a, T b) {
    if constexpr (Traits<T>::floating) {
        // Python's: floor of the exact quotient, which a / b may round up over.
        T rest = fmod(a, b), exact = (a - rest) / b;
        exact = (rest != T(0)) & ((rest < T(0)) != (b < T(0))) ? exact - T(1) : exact;
        T lower = floor(exact);
        lower = exact - lower > T(0.5) ? lower + T(1) : lower;
        T result = exact == T(0) ? copysign(T(0), a / b) : lower;
        return b == T(0) ? a / b : result;
    } else {
        T q = quotient(a, b), rest = sub(a, mul(q, b));
        return (b != T(0)) & (rest != T(0)) & ((rest < T(0)) != (b < T(0))) ? T(q - T(1)) : q;
    }
}
MP_INLINE float pow(float a, float b) { return ::powf(a, b); }
MP_INLINE double pow(double a, double b) { return ::pow(a, b); }
template <class T> MP_INLINE T pow(T a, T b) {  // integers; a negative exponent gives the exact result cut to an integer
    if (b < T(0)) return a == T(1) ? T(1) : a == T(-1) ? (b & 1 ? T(-1) : T(1)) : T(0);
    T result = T(1);
    for (; b != T(0); b = T(b >> 1)) {
        if (b & 1) result = mul(result, a);
        a = mul(a, a);
    }
    return result;
}

template <class T> MP_INLINE bool eq(T a, T b) { return a == b; }
template <class T> MP_INLINE bool ne(T a, T b) { return a != b; }
template <class T> MP_INLINE bool lt(T a, T b) { return a < b; }
template <class T> MP_INLINE bool le(T a, T b) { return a <= b; }
template <class T> MP_INLINE bool gt(T a, T b) { return a > b; }
template <class T> MP_INLINE bool ge(T a, T b) { return a >= b; }
template <class T> MP_INLINE bool logical_not(T a) { return a == T(0); }
template <class T> MP_INLINE bool logical_and(T a, T b) { return (a != T(0)) & (b != T(0)); }
template <class T> MP_INLINE bool logical_or(T a, T b) { return (a != T(0)) | (b != T(0)); }
template <class T> MP_INLINE bool logical_xor(T a, T b) { return (a != T(0)) ^ (b != T(0)); }
template <class T> MP_INLINE T bitwise_and(T a, T b) { return T(a & b); }
template <class T> MP_INLINE T bitwise_or(T a, T b) { return T(a | b); }
template <class T> MP_INLINE T bitwise_xor(T a, T b) { return T(a ^ b); }
template <class T> MP_INLINE T bitwise_not(T a) { return T(~a); }
template <> MP_ALWAYS bool bitwise_not(bool a) { return !a; }
// Shifts by a negative count or by the width and more: 0, and all sign bits to the right, as in eager.
template <class T> MP_INLINE T shl(T a, T b) {
    constexpr int width = int(sizeof(T)) * 8;
    bool out = (b < T(0)) | (uint64_t(b) >= uint64_t(width));
    return out ? T(0) : T(Wrapping<T>(a) << (out ? 0 : int(b)));
}
template <class T> MP_INLINE T shr(T a, T b) {
    constexpr int last = int(sizeof(T)) * 8 - 1;
    bool out = (b < T(0)) | (uint64_t(b) > uint64_t(last));
    T shifted = T(a >> (out ? last : int(b)));
    return out && T(-1) > T(0) ? T(0) : shifted;
}

// ---- random numbers: Philox 2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) ---------
// Key: the seed's low word; counter: the offset, its high word XORed with the seed's. Offsets must not be negative.

struct Philox { uint32_t a, b; };
MP_INLINE Philox philox(int64_t seed, int64_t offset) {
    uint32_t a = uint32_t(offset), b = uint32_t(uint64_t(offset ^ seed) >> 32), key = uint32_t(seed);
    for (int round = 0; round < 10; ++round) {
        uint64_t product = uint64_t(0xD256D193u) * a;
        a = uint32_t(product >> 32) ^ key ^ b;
        b = uint32_t(product);
        key += 0x9E3779B9u;
    }
    return {a, b};
}
MP_INLINE float uniform(uint32_t u) {  // in [0, 1)
    int32_t x = int32_t(u);
    return float(x < 0 ? -x - 1 : x) * 4.6566127342e-10f;
}
MP_INLINE float rand(int64_t seed, int64_t offset) { return uniform(philox(seed, offset).a); }
MP_INLINE float randn(int64_t seed, int64_t offset) {  // Box and Muller
    Philox r = philox(seed, offset);
    float u = uniform(r.a);
    u = u < 1.0e-7f ? 1.0e-7f : u;
    return sqrt(-2.0f * log(u)) * cos(6.283185307179586f * uniform(r.b));
}
MP_INLINE int64_t randint64(int64_t seed, int64_t offset) {  // all 64 bits: the first two words, the first one low
    Philox r = philox(seed, offset);
    return int64_t((uint64_t(r.b) << 32) | r.a);
}

// ---- states of reductions -----------------------------------------------------------------------------------------

// Mean, sum of squared deviations and count (Welford 1962; combined as in Chan, Golub, LeVeque 1979).
template <class T> struct Welford { T mean, m2, weight; };
template <class T> MP_INLINE Welford<T> welford_update(Welford<T> s, T x) {
    T weight = s.weight + T(1), delta = x - s.mean, mean = s.mean + delta / weight;
    return {mean, s.m2 + delta * (x - mean), weight};
}
template <class T> MP_INLINE Welford<T> welford_combine(Welford<T> a, Welford<T> b) {
    T weight = a.weight + b.weight, share = b.weight / (weight == T(0) ? T(1) : weight), delta = b.mean - a.mean;
    return {a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.weight * share, weight};
}

// argmax and argmin: NaN is the largest and the smallest, ties go to the lower index. Start from index -1 (nothing).
template <class T> struct Arg { T value; int64_t index; };
template <class T> MP_INLINE Arg<T> argmax_combine(Arg<T> a, Arg<T> b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    bool same = (a.value == b.value) | (a_nan & b_nan);
    bool take_b = same ? b.index < a.index : b_nan | ((b.value > a.value) & !a_nan);
    take_b = a.index < 0 ? true : b.index < 0 ? false : take_b;
    return {take_b ? b.value : a.value, take_b ? b.index : a.index};
}
template <class T> MP_INLINE Arg<T> argmin_combine(Arg<T> a, Arg<T> b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    bool same = (a.value == b.value) | (a_nan & b_nan);
    bool take_b = same ? b.index < a.index : b_nan | ((b.value < a.value) & !a_nan);
    take_b = a.index < 0 ? true : b.index < 0 ? false : take_b;
    return {take_b ? b.value : a.value, take_b ? b.index : a.index};
}

// ---- atomics (relaxed: the end of the parallel region orders them) --------------------------------------------------

template <int Bytes> struct Word;
template <> struct Word<1> { using Type = uint8_t; };
template <> struct Word<2> { using Type = uint16_t; };
template <> struct Word<4> { using Type = uint32_t; };
template <> struct Word<8> { using Type = uint64_t; };
template <class T, class Update> MP_INLINE void atomic_update(T* target, Update update) {
    using W = typename Word<sizeof(T)>::Type;
    typedef W __attribute__((may_alias)) AliasingWord;
    AliasingWord* word = reinterpret_cast<AliasingWord*>(target);
    W seen = __atomic_load_n(word, __ATOMIC_RELAXED), wanted;
    do {
        wanted = bits_as<W>(T(update(bits_as<T>(seen))));
    } while (!__atomic_compare_exchange_n(word, &seen, wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}
// Half types add in float and round once per addition.
template <class T> MP_INLINE T plus(T a, T b) { return add(a, b); }
template <> MP_ALWAYS bfloat16 plus(bfloat16 a, bfloat16 b) { return bfloat16(float(a) + float(b)); }
template <> MP_ALWAYS float16 plus(float16 a, float16 b) { return float16(float(a) + float(b)); }
template <class T> MP_INLINE void atomic_add(T* target, T value) {
    atomic_update(target, [value](T old) { return plus(old, value); });
}
template <class T> MP_INLINE void atomic_max(T* target, T value) {
    atomic_update(target, [value](T old) { return (old > value) | (old != old) ? old : value; });
}
template <class T> MP_INLINE void atomic_min(T* target, T value) {
    atomic_update(target, [value](T old) { return (old < value) | (old != old) ? old : value; });
}

// ---- indices out of range -------------------------------------------------------------------------------------------

// One bad index of a run of a kernel, whichever thread saw it last; the kernel goes on with index 0 and tells at its end.
// A branch that is never taken costs less than flags that a vectorised loop carries (measured: 2 % against up to 25 %).
struct Checks {
    int64_t position = 0, size = 0;
    bool failed = false;
    __attribute__((noinline, cold)) void report(int64_t bad, int64_t end) {
        __atomic_store_n(&position, bad, __ATOMIC_RELAXED);
        __atomic_store_n(&size, end, __ATOMIC_RELAXED);
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
    // Text of this thread, until its next message; null where all is well.
    __attribute__((noinline)) const char* message() const {
        static thread_local char text[96];
        if (!failed) return nullptr;
        __builtin_snprintf(text, sizeof text, "index %lld is out of range for size %lld", (long long)position,
                           (long long)size);
        return text;
    }
};
MP_INLINE int64_t checked_index(int64_t position, int64_t size, Checks& checks) {
    if (__builtin_expect(uint64_t(position) >= uint64_t(size), 0)) {
        checks.report(position, size);
        return 0;
    }
    return position;
}

}  // namespace mp

// Sums over wider states than the compiler knows, for `#pragma omp simd reduction(mp_max : x)` and parallel loops.
#pragma omp declare reduction(mp_max : float, double : omp_out = mp::maximum(omp_out, omp_in)) \
    initializer(omp_priv = -__builtin_inf())
#pragma omp declare reduction(mp_min : float, double : omp_out = mp::minimum(omp_out, omp_in)) \
    initializer(omp_priv = __builtin_inf())
#pragma omp declare reduction(mp_welford : mp::Welford<float>, mp::Welford<double> \
    : omp_out = mp::welford_combine(omp_out, omp_in)) initializer(omp_priv = {0, 0, 0})
