// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float x) {
    if (isnan(x)) return {0x7fff};
    const unsigned bits = __float_as_uint(x);
    return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
