// What size expressions need beyond C++'s operators, in kernels and in wrappers: Python's meaning of 64-bit integers.
// Not templates over the element types: sizes are int64_t. No header: whoever includes it has int64_t and uint64_t.
#pragma once

namespace mp {

// a mod 2**count, from 0 up; where 2**count is beyond 64 bits, a must not be negative.
static inline int64_t low_bits(int64_t a, int64_t count) { return count > 62 ? a : a & ((int64_t(1) << count) - 1); }

// a / b as Python divides whole numbers: the nearest double of the exact quotient, ties to even. Quotients of doubles
// are that where both numbers are exact doubles; else 56 bits of the quotient and whether anything follows are enough.
static inline double true_divide(int64_t a, int64_t b) {
    constexpr int64_t exact = int64_t(1) << 53;
    if (b == 0 || (-exact <= a && a <= exact && -exact <= b && b <= exact)) return double(a) / double(b);
    const uint64_t top = a < 0 ? 0 - uint64_t(a) : uint64_t(a), bottom = b < 0 ? 0 - uint64_t(b) : uint64_t(b);
    if (top == 0) return b < 0 ? -0.0 : 0.0;
    const int wanted = 56 + __builtin_clzll(top) - __builtin_clzll(bottom);
    const int shift = wanted > 0 ? wanted : 0;
    const unsigned __int128 scaled = (unsigned __int128)top << shift;
    const uint64_t quotient = uint64_t(scaled / bottom), rest = scaled % bottom != 0;
    double out = double(quotient | rest);
    for (int i = 0; i < shift; ++i) out *= 0.5;
    return (a < 0) != (b < 0) ? -out : out;
}

}  // namespace mp
