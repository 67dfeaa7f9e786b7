// Forward: one read (row_sums.h). Backward: one read, one write, and for a gradient in fresh memory the system's
// clearing of its pages, a write more (huge_pages.cpp). [256, 151936] float32 on one AVX-512 core: 6.0 ms where reading
// takes 5.1; 8.4 ms into warm memory where a copy takes 8.7, 15 into fresh; in bfloat16 5.6 of 2.8, 7.5 of 4.4 and 11,
// where the arithmetic is the limit.
#include "logprob_entropy.h"

#include <cmath>

#include "row_sums.h"
#include "vec.h"

namespace arpo {
namespace ARPO_ISA {
namespace {

constexpr std::int64_t kStreamBytes = 32 << 20;  // gradients larger than the caches bypass them
constexpr std::int64_t kRunBytes = 8 << 20;

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

// NaN as store2 needs it: an upstream gradient may be any.
float quiet(double value) { return value == value ? static_cast<float>(value) : kNan; }

template <class T>
void set_element(T* x, double value) {
    T values[kStep];
    store2(values, F32x16::set(quiet(value)), F32x16::set(0));
    *x = values[0];
}

// What the gradient of a row takes: e^z * (constant + slope * (x - max)) for every element, except the label's.
struct RowGradient {
    double temperature;
    float max, constant, slope;
    double at_label;
    std::int64_t column;  // of the label; -1: none, or in another shard
};

// The label's logit is read here, before the gradient takes its place.
template <class T>
RowGradient row_gradient(const LogprobEntropyBackward& args, std::int64_t row) {
    const LogitInputs& in = args.in;
    const std::int64_t rows = in.shape.rows;
    const double max = args.stats[row], log1p_s = args.stats[rows + row], mean_z = args.stats[2 * rows + row];
    const bool label = has_label(in, row);
    const double up_logprob = label && args.grad_logprob ? args.grad_logprob[row] : 0;
    const double up_entropy = args.grad_entropy ? args.grad_entropy[row] : 0;
    RowGradient g;
    g.temperature = temperature_of(in, row);
    const double scale = std::exp(-log1p_s) / g.temperature;
    g.max = quiet(max);
    g.constant = quiet(scale * (up_entropy * mean_z - up_logprob));
    g.slope = quiet(-scale * up_entropy / g.temperature);
    g.column = label ? label_column(in, row) : -1;
    g.at_label = 0;
    if (g.column >= 0) {
        const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
        const double z = (static_cast<double>(element(x + g.column)) - max) / g.temperature;
        const double p = std::exp(z - log1p_s);
        const double of_entropy = p > 0 ? up_entropy * p * (z - mean_z) : 0;
        g.at_label = (-up_logprob * std::expm1(z - log1p_s) - of_entropy) / g.temperature;
    }
    return g;
}

template <class T>
void write_gradient(const T* x, T* gradient, std::int64_t size, const RowGradient& g, bool stream) {
    const Exp exp(g.temperature);
    const F32x16 maximum = F32x16::set(g.max), constant = F32x16::set(g.constant), slope = F32x16::set(g.slope);
    const auto step = [&](const T* from, T* to, auto write) {
        F32x16 x0, x1;
        load2(from, x0, x1);
        const F32x16 d0 = exp.clamp(x0 - maximum), d1 = exp.clamp(x1 - maximum);
        write(to, exp(d0) * fma(slope, d0, constant), exp(d1) * fma(slope, d1, constant));
    };
    const auto store = [](T* to, F32x16 a, F32x16 b) { store2(to, a, b); };
    const auto past_caches = [](T* to, F32x16 a, F32x16 b) { stream2(to, a, b); };
    const auto few = [&](std::int64_t begin, std::int64_t end) {
        Padded<T> padded(x + begin, end - begin);
        step(padded.values, padded.values, store);
        std::memcpy(gradient + begin, padded.values, (end - begin) * sizeof(T));
    };
    std::int64_t i = 0;
    if (stream) {
        i = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(gradient) % 64 / sizeof(T));
        i = i < size ? i : size;
        if (i > 0) few(0, i);
        for (; i + kStep <= size; i += kStep) step(x + i, gradient + i, past_caches);
    } else {
        for (; i + kStep <= size; i += kStep) step(x + i, gradient + i, store);
    }
    if (i < size) few(i, size);
}

// Columns begin to begin + size of a row's gradient.
template <class T>
void backward_range(const LogprobEntropyBackward& args, std::int64_t row, const RowGradient& g, std::int64_t begin,
                    std::int64_t size, bool stream) {
    T* gradient = static_cast<T*>(args.grad_logits) + args.grad_shape.offset(row) + begin;
    if (skipped(args.in, row)) {
        std::memset(gradient, 0, size * sizeof(T));
        return;
    }
    write_gradient(static_cast<const T*>(args.in.logits) + args.in.shape.offset(row) + begin, gradient, size, g,
                   stream);
    const std::int64_t label = g.column - begin;
    if (g.column >= 0 && label >= 0 && label < size) set_element(gradient + label, g.at_label);
}

// Few rows: threads share each row, in pieces of equal length.
template <class T>
void backward_pieces(const LogprobEntropyBackward& args, int threads, bool stream) {
    const LogitRows& shape = args.in.shape;
    const std::int64_t pieces = threads;
    const std::int64_t length = (shape.vocab + pieces * kStep - 1) / (pieces * kStep) * kStep;
    RowGradient rows[kMaxPieces];
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        if (!skipped(args.in, row)) rows[row] = row_gradient<T>(args, row);
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (std::int64_t item = 0; item < shape.rows * pieces; ++item) {
            const std::int64_t row = item / pieces, begin = item % pieces * length;
            const std::int64_t rest = shape.vocab - begin;
            if (rest > 0) backward_range<T>(args, row, rows[row], begin, rest < length ? rest : length, stream);
        }
        stream_fence();
    }
}

template <class T>
void backward(const LogprobEntropyBackward& args) {
    const LogitRows& shape = args.in.shape;
    const int threads = useful_threads(args.in, args.threads);
    const std::int64_t row_bytes = shape.vocab * static_cast<std::int64_t>(sizeof(T));
    const bool stream = args.grad_logits != args.in.logits && shape.rows * row_bytes >= kStreamBytes;
    if (threads > 1 && shape.rows < 2 * threads && shape.rows * threads <= kMaxPieces) {
        return backward_pieces<T>(args, threads, stream);
    }
    // Runs of rows: two threads that first touch the same huge page would both clear it.
    std::int64_t run = shape.rows / (4 * threads);
    run = run * row_bytes > kRunBytes ? kRunBytes / row_bytes : run;
    run = run < 1 ? 1 : run;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, run)
        for (std::int64_t row = 0; row < shape.rows; ++row) {
            const RowGradient g = skipped(args.in, row) ? RowGradient{} : row_gradient<T>(args, row);
            backward_range<T>(args, row, g, 0, shape.vocab, stream);
        }
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
