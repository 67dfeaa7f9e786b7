// One read of rows of logits: for each row its maximum and the sums that log-probability and entropy are made of.
// Included by *_cpu.cpp only, once per instruction set, after vec.h; everything lives in that set's namespace.
//
// A row is read in blocks that stay in the first-level cache; of each block first the maximum, then the sums relative
// to the row's maximum so far. Thus DRAM is read once, and sums are rescaled a few times per row, not once per vector.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "logit_rows.h"
#include "vec.h"

namespace arpo {
namespace ARPO_ISA {
namespace {

constexpr std::int64_t kStep = 32;  // elements of one load2
constexpr std::int64_t kBlock = 128 * kStep;
constexpr std::int64_t kMaxPieces = 256;
constexpr std::int64_t kElementsPerThread = 16384;  // below that, waking a thread costs more than it saves
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// With z = (x - max) / temperature and one arg-max left out: s = sum of e^z, a = sum of (x - max) e^z. The last two
// only where a template's kStats asks for them.
struct RowSums {
    float max = -kInfinity;
    bool invalid = false;  // NaN or +inf met
    double s = 0;
    double a = 0;
    double q = 0;              // sum of e^2z
    std::int64_t argmax = -1;  // the first of them
};

// Adds the elements behind `other`, whose maximum is not larger. Its arg-max becomes an ordinary element.
void merge(RowSums& row, const RowSums& other, double temperature) {
    row.invalid |= other.invalid;
    if (other.max == -kInfinity) return;
    const double shift = static_cast<double>(other.max) - row.max;
    const double factor = std::exp(shift / temperature);
    row.a += factor * (other.a + shift * (other.s + 1));
    row.s += factor * (other.s + 1);
    row.q += factor * factor * (other.q + 1);
}

// `two` comes after `one` in the row.
RowSums joined(const RowSums& one, const RowSums& two, double temperature) {
    RowSums sums = two.max > one.max ? two : one;
    merge(sums, two.max > one.max ? one : two, temperature);
    return sums;
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
float element(const T* x) {
    const Padded<T> padded(x, 1);
    F32x16 first, second;
    load2(padded.values, first, second);
    float floats[kStep];
    store2(floats, first, second);
    return floats[0];
}

// Index of the first element equal to `value`, or of the block's last one if none is.
template <class T>
std::int64_t first_equal(const T* x, std::int64_t steps, float value) {
    const F32x16 wanted = F32x16::set(value);
    std::int64_t i = 0;
    for (; i + 1 < steps; ++i) {
        F32x16 x0, x1;
        load2(x + i * kStep, x0, x1);
        if (count(not_equal(x0, wanted)) + count(not_equal(x1, wanted)) < kStep) break;
    }
    std::int64_t index = i * kStep;
    while (index + 1 < steps * kStep && element(x + index) != value) ++index;
    return index;
}

// Adds a block whose maximum is at most row.max. kHoldsMax: it holds that maximum. Elements equal to it are counted,
// not summed, so that one of them can be left out without cancellation. Meanwhile `next` is fetched into the cache,
// because this part of the work has no memory traffic of its own.
template <bool kHoldsMax, bool kStats, class T>
void add_block(const T* x, std::int64_t steps, const T* next, const Exp& exp, RowSums& row) {
    const F32x16 maximum = F32x16::set(row.max);
    // Nothing beside the rounding of the logits themselves, if these have two bytes.
    const auto exponential = [&](F32x16 d) { return sizeof(T) == 2 ? exp.rough(d) : exp(d); };
    F32x16 s = F32x16::set(0), a = s, q = s;  // more would not fit into AVX2's registers
    std::int64_t others = 0;
    for (std::int64_t i = 0; i < steps; ++i) {
        for (std::size_t byte = 0; byte < kStep * sizeof(T); byte += 64) {
            prefetch(reinterpret_cast<const char*>(next + i * kStep) + byte);
        }
        F32x16 x0, x1;
        load2(x + i * kStep, x0, x1);
        const F32x16 d0 = exp.clamp(x0 - maximum), d1 = exp.clamp(x1 - maximum);
        F32x16 e0 = exponential(d0), e1 = exponential(d1);
        if (kHoldsMax) {
            const Mask16 other0 = not_equal(x0, maximum), other1 = not_equal(x1, maximum);
            others += count(other0) + count(other1);
            e0 = keep(other0, e0);
            e1 = keep(other1, e1);
        }
        s = s + (e0 + e1);
        a = fma(d1, e1, fma(d0, e0, a));
        if (kStats) q = fma(e1, e1, fma(e0, e0, q));
    }
    const double ties = kHoldsMax ? static_cast<double>(steps * kStep - others - 1) : 0;
    row.s += sum(s) + ties;
    row.a += sum(a);
    if (kStats) row.q += sum(q) + ties;
}

// Whether no element is above `maximum`; may say no where that is so. Positive floats are in the order of their bits,
// and a negative number is below them as a float and as bits.
bool none_above(const float*, std::int64_t, float) { return false; }
template <class T>
bool none_above(const T* x, std::int64_t steps, float maximum) {
    if (!(maximum >= 0)) return false;
    std::int16_t bits = 0;
    for (std::int64_t i = 0; i < steps * kStep; ++i) {
        const std::int16_t other = static_cast<std::int16_t>(x[i].bits);
        bits = other > bits ? other : bits;
    }
    const T largest = {static_cast<std::uint16_t>(bits)};
    return element(&largest) <= maximum;
}

// `column` is that of x[0].
template <bool kStats, class T>
void add(const T* x, std::int64_t steps, const T* next, std::int64_t column, const Exp& exp, double temperature,
         RowSums& row) {
    if (none_above(x, steps, row.max)) return add_block<false, kStats>(x, steps, next, exp, row);
    const float maximum = block_max(x, steps);
    if (!(maximum < kInfinity)) row.invalid = true;
    if (maximum == -kInfinity && row.max == -kInfinity) {
        // Nothing to sum yet; the maximum of -inf and NaN may have come out as -inf.
        if (holds_nan(x, steps)) row.invalid = true;
    } else if (maximum > row.max) {
        RowSums higher;
        higher.max = maximum;
        if (kStats) higher.argmax = column + first_equal(x, steps, maximum);
        merge(higher, row, temperature);
        row = higher;
        add_block<true, kStats>(x, steps, next, exp, row);
    } else {
        add_block<false, kStats>(x, steps, next, exp, row);
    }
}

// Columns `first` to first + size of a row that starts at x.
template <bool kStats = false, class T>
RowSums sum_range(const T* x, std::int64_t first, std::int64_t size, double temperature) {
    const Exp exp(temperature);
    RowSums row;
    const std::int64_t end = first + size, whole = end - size % kStep;
    for (std::int64_t begin = first; begin < whole && !row.invalid; begin += kBlock) {
        const std::int64_t steps = (whole - begin < kBlock ? whole - begin : kBlock) / kStep;
        add<kStats>(x + begin, steps, x + begin + kBlock, begin, exp, temperature, row);
    }
    if (whole < end) {
        const Padded<T> tail(x + whole, end - whole);
        add<kStats>(tail.values, 1, tail.values, whole, exp, temperature, row);
    }
    row.invalid |= row.s != row.s;  // a NaN beside larger elements
    return row;
}

double temperature_of(const LogitInputs& in, std::int64_t row) {
    return in.temperatures ? in.temperatures[row * in.temperature_stride] : in.temperature;
}
bool skipped(const LogitInputs& in, std::int64_t row) { return in.mask && !in.mask[row]; }
bool has_label(const LogitInputs& in, std::int64_t row) { return in.labels && in.labels[row] != in.ignore_index; }
// Where the label of a row that has one is in this shard; -1 if elsewhere.
std::int64_t label_column(const LogitInputs& in, std::int64_t row) {
    const std::int64_t column = in.labels[row] - in.vocab_start;
    return column >= 0 && column < in.shape.vocab ? column : -1;
}

int useful_threads(const LogitInputs& in, int threads) {
    const std::int64_t wanted = in.shape.rows * in.shape.vocab / kElementsPerThread;
    return wanted < 1 ? 1 : wanted < threads ? static_cast<int>(wanted) : threads;
}

// Few rows: threads share each row, in pieces of equal length.
template <class T, bool kStats, class Finish>
void sum_pieces(const LogitInputs& in, int threads, const Finish& finish) {
    const LogitRows& shape = in.shape;
    const std::int64_t pieces = threads;
    const std::int64_t length = (shape.vocab + pieces - 1) / pieces;
    RowSums parts[kMaxPieces];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t item = 0; item < shape.rows * pieces; ++item) {
        const std::int64_t row = item / pieces, begin = item % pieces * length;
        if (skipped(in, row) || begin >= shape.vocab) continue;
        const T* x = static_cast<const T*>(in.logits) + shape.offset(row);
        const std::int64_t size = shape.vocab - begin < length ? shape.vocab - begin : length;
        parts[item] = sum_range<kStats>(x, begin, size, temperature_of(in, row));
    }
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        if (skipped(in, row)) continue;
        RowSums sums = parts[row * pieces];
        for (std::int64_t piece = 1; piece < pieces; ++piece) {
            sums = joined(sums, parts[row * pieces + piece], temperature_of(in, row));
        }
        finish(row, static_cast<const T*>(in.logits) + shape.offset(row), sums);
    }
}

// Calls finish(row, x, sums) for every row that is not masked, from any thread.
template <class T, bool kStats = false, class Finish>
void sum_rows(const LogitInputs& in, int most_threads, const Finish& finish) {
    const LogitRows& shape = in.shape;
    const int threads = useful_threads(in, most_threads);
    if (threads > 1 && shape.rows < 2 * threads && shape.rows * threads <= kMaxPieces) {
        return sum_pieces<T, kStats>(in, threads, finish);
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        if (skipped(in, row)) continue;
        const T* x = static_cast<const T*>(in.logits) + shape.offset(row);
        finish(row, x, sum_range<kStats>(x, 0, shape.vocab, temperature_of(in, row)));
    }
}

}  // namespace
}  // namespace ARPO_ISA
}  // namespace arpo
