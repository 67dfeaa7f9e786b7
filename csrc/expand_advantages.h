// From one advantage a leaf to one a token. Semantics: arpo_ext/ops/expand_advantages.py.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "isa.h"

namespace arpo {

// Codes as in arpo_ext/ops/expand_advantages.py. byte: bool and the integers of one byte.
enum class MaskType : int { byte = 0, int32 = 1, int64 = 2, float32 = 3 };

struct ExpandRows {
    const float* leaf;  // [rows]
    const void* mask;   // [rows, columns], adjacent within a row
    MaskType mask_type;
    int64_t mask_stride;  // elements from one row of the mask to the next
    int64_t rows;
    int64_t columns;
    float* out;  // [rows, columns]
    int threads;
};

// Leaf l owns the tokens [length[0] + ... + length[l-1], ... + length[l]) of the total, which the lengths add up to.
struct ExpandPacked {
    const float* leaf;      // [leaves]
    const int64_t* length;  // [leaves]
    int64_t leaves;
    int64_t total;
    float* out;  // [total]
    int threads;
};

// A token outside the mask is 0 whatever the advantage is, NaN included. An integer only selects, a float also scales.
// static: every instruction set has its own copy.
template <class Mask>
ARPO_HOST_DEVICE static inline float masked(float advantage, Mask mask) {
    return mask != Mask{0} ? advantage : 0.0f;
}
ARPO_HOST_DEVICE static inline float masked(float advantage, float mask) {
    return mask != 0.0f ? advantage * mask : 0.0f;
}

ARPO_CPU_KERNEL(expand_rows, ExpandRows)
ARPO_CPU_KERNEL(expand_packed, ExpandPacked)

void expand_rows_cuda(const ExpandRows& args, int device, void* stream);
// end [leaves]: running sums of the lengths, negative ones counted as 0. Tokens past the last end get 0.
void expand_packed_cuda(const float* leaf, const int64_t* end, int64_t leaves, int64_t total, float* out, int device,
                        void* stream);

}  // namespace arpo
