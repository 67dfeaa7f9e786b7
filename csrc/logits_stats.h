// What one read of rows of logits tells besides logprob and entropy. Definitions: arpo_ext/ops/logits_stats.py.
#pragma once

#include <cstdint>

#include "isa.h"
#include "logit_rows.h"

namespace arpo {

// Columns of [rows] each. Null logprob: not wanted.
struct LogitsStatsOutputs {
    float* logprob;
    float* entropy;
    float* logsumexp;
    float* sum_p2;
    std::int64_t* argmax;
    float* argmax_logprob;
};

struct LogitsStats {
    LogitInputs in;
    LogitsStatsOutputs out;
    int threads;
};

// How many floats the GPU needs between its two kernels: 0, unless rows are too few to fill the device.
std::int64_t logits_stats_partials(const LogitRows& shape, int device);
// Labels out of range are treated as ignored and counted in invalid_labels, if that is not null.
void logits_stats_cuda(const LogitInputs& in, const LogitsStatsOutputs& out, float* partials,
                       unsigned long long* invalid_labels, int device, void* stream);

ARPO_CPU_KERNEL(logits_stats, LogitsStats)

}  // namespace arpo
