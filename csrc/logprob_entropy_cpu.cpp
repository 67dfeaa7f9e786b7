// Forward: one read (row_sums.h). Backward: one read, one write.
#include "logprob_entropy.h"

#include <cmath>

#include "row_sums.h"
#include "vec.h"

namespace arpo {
namespace ARPO_ISA {
namespace {

constexpr std::int64_t kStreamBytes = 32 << 20;  // gradients larger than the caches bypass them

void write_row(const LogprobEntropyForward& args, std::int64_t row, float max, double log1p_s, double mean_z,
               double logprob) {
    const std::int64_t rows = args.in.shape.rows;
    if (args.logprob) args.logprob[row] = static_cast<float>(logprob);
    args.entropy[row] = static_cast<float>(log1p_s - mean_z);
    if (args.stats) {
        args.stats[row] = max;
        args.stats[rows + row] = static_cast<float>(log1p_s);
        args.stats[2 * rows + row] = static_cast<float>(mean_z);
    }
}

template <class T>
void finish_row(const LogprobEntropyForward& args, std::int64_t row, const T* x, const RowSums& sums) {
    const bool label = has_label(args.in, row);
    if (sums.invalid || sums.max == -kInfinity) {
        write_row(args, row, kNan, kNan, kNan, label ? kNan : 0);
        return;
    }
    const double temperature = temperature_of(args.in, row);
    const double log1p_s = std::log1p(sums.s);
    const double mean_z = sums.a / temperature / (1 + sums.s);
    double logprob = 0;
    if (label) {
        logprob = (static_cast<double>(element(x + label_column(args.in, row))) - sums.max) / temperature - log1p_s;
    }
    write_row(args, row, sums.max, log1p_s, mean_z, logprob);
}

template <class T>
void forward(const LogprobEntropyForward& args) {
    for (std::int64_t row = 0; args.in.mask && row < args.in.shape.rows; ++row) {
        if (skipped(args.in, row)) write_row(args, row, 0, 0, 0, 0);
    }
    sum_rows<T>(args.in, args.threads,
                [&](std::int64_t row, const T* x, const RowSums& sums) { finish_row(args, row, x, sums); });
}

template <class T>
void add_shard(const LogprobEntropyShard& args) {
    sum_rows<T>(args.in, args.threads, [&](std::int64_t row, const T* x, const RowSums& shard) {
        double* running = args.running + 4 * row;
        RowSums before;
        before.max = static_cast<float>(running[0]);
        before.invalid = std::isnan(running[0]);
        before.s = running[1];
        before.a = running[2];
        const RowSums sums = joined(before, shard, temperature_of(args.in, row));
        running[0] = sums.invalid ? kNan : sums.max;
        running[1] = sums.s;
        running[2] = sums.a;
        const std::int64_t label = has_label(args.in, row) ? label_column(args.in, row) : -1;
        if (label >= 0) running[3] = element(x + label);
    });
}

template <class T>
void set_element(T* x, double value) {
    T values[kStep];
    store2(values, F32x16::set(static_cast<float>(value)), F32x16::set(0));
    *x = values[0];
}

// gradient = e^z * (constant + slope * (x - max)) for every element; the label's own term comes on top.
template <bool kStream, class T>
void write_gradient(const T* x, T* gradient, std::int64_t size, const Exp& exp, float max, float constant,
                    float slope) {
    const F32x16 maximum = F32x16::set(max), c = F32x16::set(constant), k = F32x16::set(slope);
    const auto step = [&](const T* from, T* to, auto write) {
        F32x16 x0, x1;
        load2(from, x0, x1);
        const F32x16 d0 = exp.clamp(x0 - maximum), d1 = exp.clamp(x1 - maximum);
        write(to, exp(d0) * fma(k, d0, c), exp(d1) * fma(k, d1, c));
    };
    const auto store = [](T* to, F32x16 a, F32x16 b) { store2(to, a, b); };
    const auto stream = [](T* to, F32x16 a, F32x16 b) { stream2(to, a, b); };
    std::int64_t i = 0;
    for (; i + kStep <= size; i += kStep) {
        if (kStream) {
            step(x + i, gradient + i, stream);
        } else {
            step(x + i, gradient + i, store);
        }
    }
    if (i < size) {
        Padded<T> tail(x + i, size - i);
        step(tail.values, tail.values, store);
        std::memcpy(gradient + i, tail.values, (size - i) * sizeof(T));
    }
}

template <class T>
void backward_row(const LogprobEntropyBackward& args, std::int64_t row, bool stream) {
    const LogitInputs& in = args.in;
    const std::int64_t rows = in.shape.rows, vocab = in.shape.vocab;
    T* gradient = static_cast<T*>(args.grad_logits) + args.grad_shape.offset(row);
    if (skipped(in, row)) {
        std::memset(gradient, 0, vocab * sizeof(T));
        return;
    }
    const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
    const double max = args.stats[row], log1p_s = args.stats[rows + row], mean_z = args.stats[2 * rows + row];
    const bool label = has_label(in, row);
    const double up_logprob = label && args.grad_logprob ? args.grad_logprob[row] : 0;
    const double up_entropy = args.grad_entropy ? args.grad_entropy[row] : 0;
    const double temperature = temperature_of(in, row);
    const std::int64_t column = label ? label_column(in, row) : -1;
    double at_label = 0;
    if (column >= 0) {
        // Read before the row is written: the gradient may take the place of the logits.
        const double z = (static_cast<double>(element(x + column)) - max) / temperature;
        const double p = std::exp(z - log1p_s);
        at_label = -up_logprob * std::expm1(z - log1p_s) - (p > 0 ? up_entropy * p * (z - mean_z) : 0);
    }
    const double scale = std::exp(-log1p_s) / temperature;
    const float constant = static_cast<float>(scale * (up_entropy * mean_z - up_logprob));
    const float slope = static_cast<float>(-scale * up_entropy / temperature);
    const bool aligned = reinterpret_cast<std::uintptr_t>(gradient) % 64 == 0;
    const Exp exp(temperature);
    if (stream && aligned) {
        write_gradient<true>(x, gradient, vocab, exp, static_cast<float>(max), constant, slope);
    } else {
        write_gradient<false>(x, gradient, vocab, exp, static_cast<float>(max), constant, slope);
    }
    if (column >= 0) set_element(gradient + column, at_label / temperature);
}

template <class T>
void backward(const LogprobEntropyBackward& args) {
    const LogitRows& shape = args.in.shape;
    const int threads = useful_threads(args.in, args.threads);
    const std::int64_t bytes = shape.rows * shape.vocab * static_cast<std::int64_t>(sizeof(T));
    const bool stream = args.grad_logits != args.in.logits && bytes >= kStreamBytes;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (std::int64_t row = 0; row < shape.rows; ++row) backward_row<T>(args, row, stream);
        stream_fence();
    }
}

}  // namespace

void logprob_entropy_forward(const LogprobEntropyForward& args) {
    switch (args.in.dtype) {
        case Dtype::float32: return forward<float>(args);
        case Dtype::bfloat16: return forward<BFloat16>(args);
        case Dtype::float16: return forward<Half>(args);
    }
}

void logprob_entropy_shard(const LogprobEntropyShard& args) {
    switch (args.in.dtype) {
        case Dtype::float32: return add_shard<float>(args);
        case Dtype::bfloat16: return add_shard<BFloat16>(args);
        case Dtype::float16: return add_shard<Half>(args);
    }
}

void logprob_entropy_backward(const LogprobEntropyBackward& args) {
    switch (args.in.dtype) {
        case Dtype::float32: return backward<float>(args);
        case Dtype::bfloat16: return backward<BFloat16>(args);
        case Dtype::float16: return backward<Half>(args);
    }
}

}  // namespace ARPO_ISA
}  // namespace arpo
