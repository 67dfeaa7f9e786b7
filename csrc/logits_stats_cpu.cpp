// One read of the logits (row_sums.h). Of the work beside the read, one fused multiply-add for each element and a
// search for each block that raises the maximum come on top of logprob_entropy's.
#include "logits_stats.h"

#include <cmath>

#include "row_sums.h"

namespace arpo {
namespace ARPO_ISA {
namespace {

void write_row(const LogitsStatsOutputs& out, std::int64_t row, double logprob, double entropy, double logsumexp,
               double sum_p2, std::int64_t argmax, double argmax_logprob) {
    if (out.logprob) out.logprob[row] = static_cast<float>(logprob);
    out.entropy[row] = static_cast<float>(entropy);
    out.logsumexp[row] = static_cast<float>(logsumexp);
    out.sum_p2[row] = static_cast<float>(sum_p2);
    out.argmax[row] = argmax;
    out.argmax_logprob[row] = static_cast<float>(argmax_logprob);
}

template <class T>
void finish_row(const LogitsStats& args, std::int64_t row, const T* x, const RowSums& sums) {
    const bool label = has_label(args.in, row);
    if (sums.invalid || sums.max == -kInfinity) {
        return write_row(args.out, row, label ? kNan : 0, kNan, kNan, kNan, -1, kNan);
    }
    const double temperature = temperature_of(args.in, row);
    const double log1p_s = std::log1p(sums.s), total = 1 + sums.s;
    double logprob = 0;
    if (label) {
        logprob = (static_cast<double>(element(x + label_column(args.in, row))) - sums.max) / temperature - log1p_s;
    }
    write_row(args.out, row, logprob, log1p_s - sums.a / temperature / total, sums.max / temperature + log1p_s,
              (1 + sums.q) / (total * total), sums.argmax, -log1p_s);
}

template <class T>
void rows_of(const LogitsStats& args) {
    for (std::int64_t row = 0; args.in.mask && row < args.in.shape.rows; ++row) {
        if (skipped(args.in, row)) write_row(args.out, row, 0, 0, 0, 0, -1, 0);
    }
    sum_rows<T, true>(args.in, args.threads,
                      [&](std::int64_t row, const T* x, const RowSums& sums) { finish_row(args, row, x, sums); });
}

}  // namespace

void logits_stats(const LogitsStats& args) {
    switch (args.in.dtype) {
        case Dtype::float32: return rows_of<float>(args);
        case Dtype::bfloat16: return rows_of<BFloat16>(args);
        case Dtype::float16: return rows_of<Half>(args);
    }
}

}  // namespace ARPO_ISA
}  // namespace arpo
