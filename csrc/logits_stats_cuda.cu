// One read of the logits (row_sums.cuh), with one fused multiply-add for each element on top of logprob_entropy's work.
// Not yet measured.
#include "logits_stats.h"
#include "row_kernels.cuh"

namespace arpo {
namespace {

using namespace cuda;

struct FinishStats {
    static constexpr bool kStats = true;
    LogitsStatsOutputs out;
    unsigned long long* invalid_labels;

    __device__ void write(std::int64_t row, float logprob, float entropy, float logsumexp, float sum_p2,
                          std::int64_t argmax, float argmax_logprob) const {
        if (out.logprob) out.logprob[row] = logprob;
        out.entropy[row] = entropy;
        out.logsumexp[row] = logsumexp;
        out.sum_p2[row] = sum_p2;
        out.argmax[row] = argmax;
        out.argmax_logprob[row] = argmax_logprob;
    }
    __device__ void skip(std::int64_t row) const { write(row, 0, 0, 0, 0, -1, 0); }

    template <class T>
    __device__ void operator()(const LogitInputs& in, std::int64_t row, const T* x, const RowSums<true>& sums) const {
        const float temperature = static_cast<float>(temperature_of(in, row));
        const Label label = label_of(in, row);
        count_invalid(in, label, invalid_labels);
        if (!isfinite(sums.max) || isnan(sums.s) || isnan(temperature)) {
            return write(row, label.valid ? kNan : 0.0f, kNan, kNan, kNan, -1, kNan);
        }
        const float log1p_s = log1pf(sums.s), total = 1 + sums.s;
        const float logprob =
            label.valid ? (to_float(x[label.column]) - sums.max) / temperature - log1p_s : 0.0f;
        write(row, logprob, log1p_s - sums.a / temperature / total, sums.max / temperature + log1p_s,
              (1 + sums.q) / total / total, sums.argmax, -log1p_s);
    }
};

template <class T>
void rows_of(const LogitInputs& in, const LogitsStatsOutputs& out, float* partials, unsigned long long* invalid_labels,
             int device, cudaStream_t stream) {
    launch_sums<T>(in, FinishStats{out, invalid_labels}, partials, device, stream);
}

}  // namespace

std::int64_t logits_stats_partials(const LogitRows& shape, int device) { return partial_floats<true>(shape, device); }

void logits_stats_cuda(const LogitInputs& in, const LogitsStatsOutputs& out, float* partials,
                       unsigned long long* invalid_labels, int device, void* stream) {
    if (in.shape.rows == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (in.dtype) {
        case Dtype::float32: return rows_of<float>(in, out, partials, invalid_labels, device, on);
        case Dtype::bfloat16: return rows_of<__nv_bfloat16>(in, out, partials, invalid_labels, device, on);
        case Dtype::float16: return rows_of<__half>(in, out, partials, invalid_labels, device, on);
    }
}

}  // namespace arpo
