// Special functions that models seldom call: scalar loops in double precision, for float results too.
// Included after cpp_prelude.h by the kernels that need one of them.
#pragma once

extern "C" double lgamma_r(double, int*) noexcept;
extern "C" double j0(double) noexcept;
extern "C" double j1(double) noexcept;

namespace mp {

constexpr double pi = 3.14159265358979323846;

MP_INLINE double lgamma(double x) {  // the variant that writes no global
    int sign;
    return x == -__builtin_inf() ? __builtin_inf() : ::lgamma_r(x, &sign);
}

// Reflection below zero, recurrence up to 10, then the asymptotic series (Abramowitz and Stegun 6.3.5, 6.3.7, 6.3.18).
static inline double digamma(double x) {
    if (x == 0.0) return copysign(__builtin_inf(), -x);
    if (x < 0.0) {
        if (x == trunc(x)) return __builtin_nan("");
        double fraction = x - trunc(x);  // cot has period one in pi x; reducing first keeps it exact
        return digamma(1.0 - x) - pi / tan(pi * fraction);
    }
    double result = 0.0;
    for (; x < 10.0; x += 1.0) result -= 1.0 / x;
    if (x > 1e17) return result + log(x);
    double y = 1.0 / (x * x);
    double series = 1.0 / 12 - y * (1.0 / 120 - y * (1.0 / 252 - y * (1.0 / 240 - y * (1.0 / 132 - y * (691.0 / 32760)))));
    return result + log(x) - 0.5 / x - y * series;
}

// exp(x^2) erfc(x) for x >= 0: directly, and by its continued fraction (Abramowitz and Stegun 7.1.14) in the tail.
static inline double erfcx(double x) {
    if (x < 4.0) return exp(x * x) * erfc(x);
    double tail = 0.0;
    for (int k = 40; k > 0; --k) tail = 0.5 * k / (x + tail);
    return 0.56418958354775628695 / (x + tail);
}

// x with erfc(x) = q for 0 < q <= 1: a start within a per cent, then Newton's steps on log erfc, whose curvature is small.
static inline double erfc_inverse(double q) {
    if (q >= 0.5) {
        double y = 1.0 - q, x = 0.0;
        for (int step = 0; step < 6; ++step) x -= (erf(x) - y) * exp(x * x) * 0.88622692545275801365;
        return x;
    }
    double goal = log(q), x = sqrt(-goal);
    for (int step = 0; step < 8; ++step) {
        double scaled = erfcx(x);
        x += (log(scaled) - x * x - goal) * scaled * 0.88622692545275801365;
    }
    return x;
}

static inline double erfinv(double y) {
    double a = abs(y);
    if (!(a < 1.0)) return a == 1.0 ? copysign(__builtin_inf(), y) : __builtin_nan("");
    if (a < 1e-9) return 0.88622692545275801365 * y;
    if (a <= 0.5) {
        double x = a;
        for (int step = 0; step < 6; ++step) x -= (erf(x) - a) * exp(x * x) * 0.88622692545275801365;
        return copysign(x, y);
    }
    return copysign(erfc_inverse(1.0 - a), y);
}

static inline double ndtri(double p) {  // inverse of the normal distribution function
    if (p == 0.0 || p == 1.0) return p == 0.0 ? -__builtin_inf() : __builtin_inf();
    if (!(p > 0.0 && p < 1.0)) return __builtin_nan("");
    constexpr double root2 = 1.41421356237309504880;
    return p < 0.5 ? -root2 * erfc_inverse(2.0 * p) : root2 * erfinv(2.0 * p - 1.0);
}

static inline double log_ndtr(double x) {  // log of the normal distribution function
    double t = x * 0.70710678118654752440;
    if (x < -1.0) return x < -1e150 ? -__builtin_inf() : log(0.5 * erfcx(-t)) - t * t;
    return log1p(-0.5 * erfc(t));
}

// exp(-|x|) I_n(x), n = 0 or 1: the power series, all of whose terms are positive, and from 30 on the asymptotic one
// (Abramowitz and Stegun 9.6.10, 9.7.1).
static inline double bessel_i_scaled(int order, double x) {
    double a = abs(x), sum = 1.0, term = 1.0;
    if (isnan(x)) return x;
    if (a < 30.0) {
        double quarter = 0.25 * a * a;
        for (int k = 1; term > 1e-17 * sum; ++k) sum += term *= quarter / (double(k) * (k + order));
        sum *= exp(-a) * (order == 1 ? 0.5 * a : 1.0);
    } else if (a == __builtin_inf()) {
        sum = 0.0;
    } else {
        double mu = 4.0 * order * order;
        for (int k = 1; k < 30 && abs(term) > 1e-17; ++k) {
            double odd = 2.0 * k - 1.0;
            sum += term *= -(mu - odd * odd) / (8.0 * a * k);
        }
        sum /= sqrt(2.0 * pi * a);
    }
    return order == 1 ? copysign(sum, x) : sum;
}
static inline double bessel_i(int order, double x) {
    double a = abs(x);
    if (a == __builtin_inf()) return __builtin_nan("");  // as eager (and Cephes), not the limit
    double half = exp(0.5 * a);  // exp(a) may overflow where the product does not
    return bessel_i_scaled(order, x) * half * half;
}
MP_INLINE double i0(double x) { return bessel_i(0, x); }
MP_INLINE double i1(double x) { return bessel_i(1, x); }
MP_INLINE double i0e(double x) { return bessel_i_scaled(0, x); }
MP_INLINE double i1e(double x) { return bessel_i_scaled(1, x); }
MP_INLINE double bessel_j0(double x) { return isinf(x) ? __builtin_nan("") : ::j0(x); }
MP_INLINE double bessel_j1(double x) { return isinf(x) ? __builtin_nan("") : ::j1(x); }

#define MP_BY_DOUBLE(name) \
    MP_INLINE float name(float x) { return float(name(double(x))); }
MP_BY_DOUBLE(lgamma) MP_BY_DOUBLE(digamma) MP_BY_DOUBLE(erfinv) MP_BY_DOUBLE(ndtri) MP_BY_DOUBLE(log_ndtr)
MP_BY_DOUBLE(i0) MP_BY_DOUBLE(i1) MP_BY_DOUBLE(i0e) MP_BY_DOUBLE(i1e) MP_BY_DOUBLE(bessel_j0) MP_BY_DOUBLE(bessel_j1)
#undef MP_BY_DOUBLE

}  // namespace mp
