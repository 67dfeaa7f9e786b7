// logprob and entropy of rows of logits, from one read. Definitions: arpo_ext/ops/logprob_entropy.py.
#pragma once

#include <cstdint>

#include "isa.h"
#include "logit_rows.h"

namespace arpo {

// stats[3][rows]: the row's maximum m, log1p(s), and B = sum of p*z (see the .py file). Null: not wanted.
struct LogprobEntropyForward {
    LogitInputs in;
    float* logprob;
    float* entropy;
    float* stats;
    int threads;
};

// Adds a shard to running[rows][4]: maximum m of the logits so far (-inf before the first, NaN once a NaN or +inf was
// met), s and a (sums of e^z and of (x - m) e^z over all but one arg-max, z = (x - m) / temperature), the label's logit
// (NaN before it was met). Rows that are masked keep theirs.
struct LogprobEntropyShard {
    LogitInputs in;
    double* running;
    int threads;
};

// stats are those of all columns, of which the logits may be a shard. grad_logits may be the logits themselves. It has
// its own strides, vocab adjacent. Null upstream gradients are zero.
struct LogprobEntropyBackward {
    LogitInputs in;
    const float* stats;
    const float* grad_logprob;
    const float* grad_entropy;
    LogitRows grad_shape;
    void* grad_logits;
    int threads;
};

// What a GPU needs besides. partials: logprob_entropy_partials() floats, null if that is 0. invalid_labels: labels out
// of range are treated as ignored and counted here, by the shard that holds column 0; null: not counted.
struct LogprobEntropyScratch {
    float* partials;
    unsigned long long* invalid_labels;
};

// How many floats the forward pass needs between its two kernels: 0, unless rows are too few to fill the device.
std::int64_t logprob_entropy_partials(const LogitRows& shape, int device);
void logprob_entropy_forward_cuda(const LogprobEntropyForward& args, const LogprobEntropyScratch& scratch, int device,
                                  void* stream);
void logprob_entropy_shard_cuda(const LogprobEntropyShard& args, const LogprobEntropyScratch& scratch, int device,
                                void* stream);
// rows: logprob_entropy_row_bytes() bytes for each row, aligned to 16.
std::int64_t logprob_entropy_row_bytes();
void logprob_entropy_backward_cuda(const LogprobEntropyBackward& args, void* rows, int device, void* stream);

ARPO_CPU_KERNEL(logprob_entropy_forward, LogprobEntropyForward)
ARPO_CPU_KERNEL(logprob_entropy_shard, LogprobEntropyShard)
ARPO_CPU_KERNEL(logprob_entropy_backward, LogprobEntropyBackward)

}  // namespace arpo
