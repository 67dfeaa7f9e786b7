// logprob and entropy of rows of logits, from one read. Definitions: arpo_ext/ops/logprob_entropy.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "isa.h"

namespace arpo {

// Row r of the logits starts at (r / inner) * outer_stride + (r % inner) * inner_stride elements; its V elements are
// adjacent. That covers logits[:, :-1] of a [B, T, V] tensor without a copy.
struct LogitRows {
    std::int64_t rows;
    std::int64_t vocab;
    std::int64_t inner;
    std::int64_t outer_stride;
    std::int64_t inner_stride;

    ARPO_HOST_DEVICE std::int64_t offset(std::int64_t row) const {
        return (row / inner) * outer_stride + (row % inner) * inner_stride;
    }
};

// Per-row inputs. Null labels: no logprob. Null mask: all rows. Null temperatures: `temperature` for all rows,
// else row r has temperatures[r * temperature_stride].
struct LogprobEntropyInputs {
    LogitRows shape;
    Dtype dtype;
    const void* logits;
    const std::int64_t* labels;
    const std::uint8_t* mask;
    const float* temperatures;
    std::int64_t temperature_stride;
    double temperature;
    std::int64_t ignore_index;
};

// stats[3][rows]: the row's maximum m, log1p(s), and B = sum of p*z (see the .py file). Null: not wanted.
struct LogprobEntropyForward {
    LogprobEntropyInputs in;
    float* logprob;
    float* entropy;
    float* stats;
    int threads;
};

// grad_logits may be the logits themselves. It has its own strides, vocab adjacent. Null upstream gradients are zero.
struct LogprobEntropyBackward {
    LogprobEntropyInputs in;
    const float* stats;
    const float* grad_logprob;
    const float* grad_entropy;
    LogitRows grad_shape;
    void* grad_logits;
    int threads;
};

// What a GPU needs besides. partials: logprob_entropy_partials() floats, null if that is 0. invalid_labels: labels out
// of range are treated as ignored and counted here.
struct LogprobEntropyScratch {
    float* partials;
    unsigned long long* invalid_labels;
};

// How many floats the forward pass needs between its two kernels: 0, unless rows are too few to fill the device.
std::int64_t logprob_entropy_partials(const LogitRows& shape, int device);
void logprob_entropy_forward_cuda(const LogprobEntropyForward& args, const LogprobEntropyScratch& scratch, int device,
                                  void* stream);
void logprob_entropy_backward_cuda(const LogprobEntropyBackward& args, int device, void* stream);

ARPO_CPU_KERNEL(logprob_entropy_forward, LogprobEntropyForward)
ARPO_CPU_KERNEL(logprob_entropy_backward, LogprobEntropyBackward)

}  // namespace arpo
