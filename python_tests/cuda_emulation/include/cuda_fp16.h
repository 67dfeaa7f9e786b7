// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    float result = ldexpf(static_cast<float>(fraction), -24);
    if (exponent == 31) {
        result = fraction != 0 ? NAN : INFINITY;
    } else if (exponent != 0) {
        result = ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
    }
    return (x.bits & 0x8000) != 0 ? -result : result;
}
// To the nearest, ties to even.
inline __half __float2half(float x) {
    const std::uint16_t sign = (__float_as_uint(x) >> 16) & 0x8000;
    const float size = fabsf(x);
    if (isnan(x)) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    // Steps of the result are 2^-24 below 2^-14, and 2^-10 of the power of two below the number from there on.
    int exponent = 0;
    frexpf(size, &exponent);
    const int step = exponent - 11 < -24 ? -24 : exponent - 11;
    const int steps = static_cast<int>(rintf(ldexpf(size, -step)));
    return {static_cast<std::uint16_t>(sign | (steps < 1024 || step == -24 ? steps : ((step + 24) << 10) + steps))};
}
inline __half __float2half_rn(float x) { return __float2half(x); }
