// Forward: one row at a time, in blocks that stay in the first-level cache; of each block first the maximum, then the
// sums relative to the row's maximum so far. Thus DRAM is read once, and sums are rescaled a few times per row, not once
// per vector. Backward: one read, one write.
#include "logprob_entropy.h"

#include <cmath>

#include "vec.h"

namespace arpo {
namespace ARPO_ISA {
namespace {

constexpr std::int64_t kStep = 32;  // elements of one load2
constexpr std::int64_t kBlock = 128 * kStep;
constexpr std::int64_t kMaxPieces = 256;
constexpr std::int64_t kElementsPerThread = 16384;  // below that, waking a thread costs more than it saves
constexpr std::int64_t kStreamBytes = 32 << 20;     // gradients larger than the caches bypass them
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// With z = (x - max) / temperature and one arg-max left out: s = sum of e^z, a = sum of (x - max) e^z.
struct RowSums {
    float max = -kInfinity;
    bool invalid = false;  // NaN or +inf met
    double s = 0;
    double a = 0;
};

// Adds the elements behind `other`, whose maximum is not larger. Its arg-max becomes an ordinary element.
void merge(RowSums& row, const RowSums& other, double temperature) {
    row.invalid |= other.invalid;
    if (other.max == -kInfinity) return;
    const double shift = static_cast<double>(other.max) - row.max;
    const double factor = std::exp(shift / temperature);
    row.a += factor * (other.a + shift * (other.s + 1));
    row.s += factor * (other.s + 1);
}

template <class T>
float block_max(const T* x, std::int64_t steps) {
    // Four chains, because each maximum waits for the one before it.
    F32x16 m0 = F32x16::set(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
    F32x16 x0, x1, x2, x3;
    std::int64_t i = 0;
    for (; i + 2 <= steps; i += 2) {
        load2(x + i * kStep, x0, x1);
        load2(x + (i + 1) * kStep, x2, x3);
        m0 = max(m0, x0);
        m1 = max(m1, x1);
        m2 = max(m2, x2);
        m3 = max(m3, x3);
    }
    if (i < steps) {
        load2(x + i * kStep, x0, x1);
        m0 = max(m0, x0);
        m1 = max(m1, x1);
    }
    return largest(max(max(m0, m1), max(m2, m3)));
}

template <class T>
bool holds_nan(const T* x, std::int64_t steps) {
    int found = 0;
    for (std::int64_t i = 0; i < steps; ++i) {
        F32x16 x0, x1;
        load2(x + i * kStep, x0, x1);
        found += count(not_equal(x0, x0)) + count(not_equal(x1, x1));
    }
    return found > 0;
}

// Adds a block whose maximum is at most row.max. kCountMax: elements equal to the maximum are counted, not summed, so
// that the arg-max can be left out without cancellation; returns how many. Meanwhile `next` is fetched into the cache,
// because this part of the work has no memory traffic of its own.
template <bool kCountMax, class T>
std::int64_t add_block(const T* x, std::int64_t steps, const T* next, const Exp& exp, RowSums& row) {
    const F32x16 maximum = F32x16::set(row.max);
    F32x16 s0 = F32x16::set(0), s1 = s0, a0 = s0, a1 = s0;
    std::int64_t others = 0;
    for (std::int64_t i = 0; i < steps; ++i) {
        for (std::size_t byte = 0; byte < kStep * sizeof(T); byte += 64) {
            prefetch(reinterpret_cast<const char*>(next + i * kStep) + byte);
        }
        F32x16 x0, x1;
        load2(x + i * kStep, x0, x1);
        const F32x16 d0 = exp.clamp(x0 - maximum), d1 = exp.clamp(x1 - maximum);
        F32x16 e0 = exp(d0), e1 = exp(d1);
        if (kCountMax) {
            const Mask16 other0 = not_equal(x0, maximum), other1 = not_equal(x1, maximum);
            others += count(other0) + count(other1);
            e0 = keep(other0, e0);
            e1 = keep(other1, e1);
        }
        s0 = s0 + e0;
        s1 = s1 + e1;
        a0 = fma(d0, e0, a0);
        a1 = fma(d1, e1, a1);
    }
    row.s += static_cast<double>(sum(s0)) + sum(s1);
    row.a += static_cast<double>(sum(a0)) + sum(a1);
    return kCountMax ? steps * kStep - others : 0;
}

template <class T>
void add(const T* x, std::int64_t steps, const T* next, const Exp& exp, double temperature, RowSums& row) {
    const float maximum = block_max(x, steps);
    if (!(maximum < kInfinity)) row.invalid = true;
    if (maximum == -kInfinity && row.max == -kInfinity) {
        // Nothing to sum yet; the maximum of -inf and NaN may have come out as -inf.
        if (holds_nan(x, steps)) row.invalid = true;
    } else if (maximum > row.max) {
        RowSums higher;
        higher.max = maximum;
        merge(higher, row, temperature);
        row = higher;
        row.s += static_cast<double>(add_block<true>(x, steps, next, exp, row) - 1);
    } else {
        add_block<false>(x, steps, next, exp, row);
    }
}

template <class T>
struct Padded {
    T values[kStep];
    // `size` elements of x, then -inf, which adds nothing.
    Padded(const T* x, std::int64_t size) {
        store2(values, F32x16::set(-kInfinity), F32x16::set(-kInfinity));
        std::memcpy(values, x, size * sizeof(T));
    }
};

template <class T>
RowSums sum_range(const T* x, std::int64_t size, double temperature) {
    const Exp exp(temperature);
    RowSums row;
    std::int64_t begin = 0;
    for (; begin + kStep <= size && !row.invalid; begin += kBlock) {
        const std::int64_t steps = (size - begin < kBlock ? size - begin : kBlock) / kStep;
        add(x + begin, steps, x + begin + kBlock, exp, temperature, row);
    }
    const std::int64_t rest = size % kStep;
    if (rest > 0) {
        const Padded<T> tail(x + size - rest, rest);
        add(tail.values, 1, tail.values, exp, temperature, row);
    }
    return row;
}

template <class T>
float element(const T* x) {
    const Padded<T> padded(x, 1);
    F32x16 first, second;
    load2(padded.values, first, second);
    float floats[kStep];
    store2(floats, first, second);
    return floats[0];
}

template <class T>
void set_element(T* x, double value) {
    T values[kStep];
    store2(values, F32x16::set(static_cast<float>(value)), F32x16::set(0));
    *x = values[0];
}

double temperature_of(const LogprobEntropyInputs& in, std::int64_t row) {
    return in.temperatures ? in.temperatures[row * in.temperature_stride] : in.temperature;
}
bool skipped(const LogprobEntropyInputs& in, std::int64_t row) { return in.mask && !in.mask[row]; }
bool has_label(const LogprobEntropyInputs& in, std::int64_t row) {
    return in.labels && in.labels[row] != in.ignore_index;
}

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
    if (label) logprob = (static_cast<double>(element(x + args.in.labels[row])) - sums.max) / temperature - log1p_s;
    write_row(args, row, sums.max, log1p_s, mean_z, logprob);
}

int useful_threads(const LogprobEntropyInputs& in, int threads) {
    const std::int64_t wanted = in.shape.rows * in.shape.vocab / kElementsPerThread;
    return wanted < 1 ? 1 : wanted < threads ? static_cast<int>(wanted) : threads;
}

template <class T>
void forward_rows(const LogprobEntropyForward& args, int threads) {
    const LogitRows& shape = args.in.shape;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        if (skipped(args.in, row)) {
            write_row(args, row, 0, 0, 0, 0);
            continue;
        }
        const T* x = static_cast<const T*>(args.in.logits) + shape.offset(row);
        finish_row(args, row, x, sum_range(x, shape.vocab, temperature_of(args.in, row)));
    }
}

// Few rows: threads share each row, in pieces of equal length.
template <class T>
void forward_pieces(const LogprobEntropyForward& args, int threads, std::int64_t pieces) {
    const LogitRows& shape = args.in.shape;
    const std::int64_t length = (shape.vocab + pieces - 1) / pieces;
    RowSums parts[kMaxPieces];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t item = 0; item < shape.rows * pieces; ++item) {
        const std::int64_t row = item / pieces, begin = item % pieces * length;
        if (skipped(args.in, row) || begin >= shape.vocab) continue;
        const T* x = static_cast<const T*>(args.in.logits) + shape.offset(row) + begin;
        const std::int64_t size = shape.vocab - begin < length ? shape.vocab - begin : length;
        parts[item] = sum_range(x, size, temperature_of(args.in, row));
    }
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        if (skipped(args.in, row)) {
            write_row(args, row, 0, 0, 0, 0);
            continue;
        }
        RowSums sums = parts[row * pieces];
        for (std::int64_t piece = 1; piece < pieces; ++piece) {
            RowSums other = parts[row * pieces + piece];
            if (other.max > sums.max) {
                const RowSums lower = sums;
                sums = other;
                other = lower;
            }
            merge(sums, other, temperature_of(args.in, row));
        }
        finish_row(args, row, static_cast<const T*>(args.in.logits) + shape.offset(row), sums);
    }
}

template <class T>
void forward(const LogprobEntropyForward& args) {
    const int threads = useful_threads(args.in, args.threads);
    const std::int64_t rows = args.in.shape.rows;
    if (threads > 1 && rows < 2 * threads && rows * threads <= kMaxPieces) {
        forward_pieces<T>(args, threads, threads);
    } else {
        forward_rows<T>(args, threads);
    }
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
    const LogprobEntropyInputs& in = args.in;
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
    double at_label = 0;
    if (label) {
        // Read before the row is written: the gradient may take the place of the logits.
        const double z = (static_cast<double>(element(x + in.labels[row])) - max) / temperature;
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
    if (label) set_element(gradient + in.labels[row], at_label / temperature);
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

void logprob_entropy_backward(const LogprobEntropyBackward& args) {
    switch (args.in.dtype) {
        case Dtype::float32: return backward<float>(args);
        case Dtype::bfloat16: return backward<BFloat16>(args);
        case Dtype::float16: return backward<Half>(args);
    }
}

}  // namespace ARPO_ISA
}  // namespace arpo
