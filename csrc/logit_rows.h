// Rows of logits as every kernel over them gets them.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

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
//
// The rows may be a shard: columns vocab_start to vocab_start + shape.vocab of vocab_total. Labels count from the first
// column of all. One outside the shard is elsewhere: it counts as a label, but its logit is not here.
struct LogitInputs {
    LogitRows shape;
    Dtype dtype;
    const void* logits;
    const std::int64_t* labels;
    const std::uint8_t* mask;
    const float* temperatures;
    std::int64_t temperature_stride;
    double temperature;
    std::int64_t ignore_index;
    std::int64_t vocab_start;
    std::int64_t vocab_total;
};

}  // namespace arpo
