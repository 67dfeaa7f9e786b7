// One read of rows of logits on the GPU: for each row its maximum and the sums that log-probability and entropy are
// made of. Included by *_cuda.cu only.
//
// Floor: the bytes of the logits at the speed of DRAM, 0.52 ms for [8192, 151936] bfloat16 at 4.8 TB/s; not yet
// measured. Two things must not be slower. Loads: each of the 4 x 256 threads of a multiprocessor has 4 x 16 bytes in
// flight, 64 KiB; 4.8 TB/s with 0.8 us of latency over 132 multiprocessors take 29 KiB. Instructions: at that speed a
// multiprocessor gets 9 bfloat16 elements a cycle at 1.98 GHz and issues 128, so 14 for each. Hence the shape of
// add_group: it takes 9 (12 in float32, of which half as many come).
//
// A block reads a row (or a piece of one, where rows are few) once, in 16-byte loads; each warp keeps a maximum of its
// own, so that most groups of elements need no rescale.
#pragma once

#include <climits>

#include "cuda_utils.cuh"
#include "logit_rows.h"

namespace arpo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread
constexpr int kBlocksPerSm = 4;
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// e^(d / temperature) for clamped d <= 0. NaN stays NaN.
struct Exp {
    float scale_high, scale_low, lowest;

    __device__ Exp(float high, float low, float least) : scale_high(high), scale_low(low), lowest(least) {}
    // Division in two floats, because double is slow on many devices.
    __device__ explicit Exp(double temperature) {
        const float log2e = 1.44269502f, log2e_rest = 1.92596299e-8f;
        const float high = static_cast<float>(temperature);
        const float rest = static_cast<float>(temperature - high);
        scale_high = log2e / high;
        scale_low = (fmaf(-scale_high, high, log2e) + log2e_rest - scale_high * rest) / high;
        lowest = -127.0f / scale_high;  // 2^-127 is flushed to 0, and d * 0 stays finite
    }
    __device__ float clamp(float d) const { return max_or_nan(d, lowest); }
    // Relative error |d * scale| * 2^-23 + 2^-22: for logits of two bytes, which are off by more from the start.
    __device__ float rough(float d) const { return fast_exp2(d * scale_high); }
    // The rounding of the product d * scale is put back to first order: relative error 2^-22. The rough one costs the
    // entropy of a nearly certain row 4e-6.
    __device__ float operator()(float d) const {
        const float t = d * scale_high;
        const float rest = fmaf(d, scale_low, fmaf(d, scale_high, -t));
        const float e = fast_exp2(t);
        return fmaf(e, rest * 0.693147181f, e);
    }
};

// With z = (x - max) / temperature and one arg-max left out: s = sum of e^z, a = sum of (x - max) e^z.
template <bool kStats>
struct RowSums {
    float max, s, a;
};
// Besides: q = sum of e^2z, and the column of the first arg-max.
template <>
struct RowSums<true> {
    float max, s, a, q;
    int argmax;
};

template <bool kStats>
__device__ RowSums<kStats> empty_sums() {
    if constexpr (kStats) return {-kInfinity, 0.0f, 0.0f, 0.0f, INT_MAX};
    else return {-kInfinity, 0.0f, 0.0f};
}

// Sums relative to a larger maximum; `with_max` is 1 where the old arg-max has to become an ordinary element.
template <bool kStats>
__device__ void lower(RowSums<kStats>& sums, float maximum, float with_max, const Exp& exp) {
    if (sums.max > -kInfinity) {
        const float shift = exp.clamp(sums.max - maximum);
        const float factor = exp(shift);
        sums.a = factor * (sums.a + shift * (sums.s + with_max));
        sums.s = factor * (sums.s + with_max);
        if constexpr (kStats) sums.q = factor * factor * (sums.q + with_max);
    }
    sums.max = maximum;
}

template <bool kStats>
__device__ RowSums<kStats> merge(RowSums<kStats> x, RowSums<kStats> y, const Exp& exp) {
    if constexpr (kStats) {
        if (y.max == x.max) x.argmax = y.argmax < x.argmax ? y.argmax : x.argmax;
    }
    if (y.max > x.max) {
        const RowSums<kStats> swap = x;
        x = y;
        y = swap;
    }
    if (y.max > -kInfinity) lower(y, x.max, 1.0f, exp);
    // Sums of a part without maximum are 0, or NaN if the part held one.
    x.s += y.s;
    x.a += y.a;
    if constexpr (kStats) x.q += y.q;
    return x;
}

__device__ double temperature_of(const LogitInputs& in, std::int64_t row) {
    const double value = in.temperatures ? in.temperatures[row * in.temperature_stride] : in.temperature;
    return value >= 1e-15 && value <= 1e30f ? value : kNan;
}
__device__ bool skipped(const LogitInputs& in, std::int64_t row) { return in.mask && !in.mask[row]; }

struct Label {
    bool valid;           // the row has one, in range
    bool invalid;         // out of range
    std::int64_t column;  // where it is in this shard; -1 if it is elsewhere or not valid
};
__device__ Label label_of(const LogitInputs& in, std::int64_t row) {
    if (!in.labels || in.labels[row] == in.ignore_index) return {false, false, -1};
    const std::int64_t label = in.labels[row];
    if (label < 0 || label >= in.vocab_total) return {false, true, -1};
    const std::int64_t column = label - in.vocab_start;
    return {true, false, column >= 0 && column < in.shape.vocab ? column : -1};
}
// Shards of a row all see its label: the one with column 0 counts it. Null: nobody counts.
__device__ void count_invalid(const LogitInputs& in, const Label& label, unsigned long long* invalid_labels) {
    if (label.invalid && in.vocab_start == 0 && invalid_labels) atomicAdd(invalid_labels, 1ull);
}

// Adds kCount elements of every lane, whose column(i) grows with i. All lanes of the warp call together; elements that
// do not exist are -inf.
template <bool kRough, int kCount, bool kStats, class Column>
__device__ void add_group(const float (&x)[kCount], const Column& column, const Exp& exp, RowSums<kStats>& sums) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    const auto exponential = [&](float d) { return kRough ? exp.rough(d) : exp(d); };
    float s = 0, a = 0, q = 0;
    if (__any_sync(kAllLanes, largest > sums.max)) {  // rarer with every group
        largest = warp_max(largest);
        const int lane = threadIdx.x % kWarp;
        lower(sums, largest, lane == 0 ? 1.0f : 0.0f, exp);
        int count = 0, first = INT_MAX;
#pragma unroll
        for (int i = kCount - 1; i >= 0; --i) {
            const float d = exp.clamp(x[i] - largest);
            const bool other = !(x[i] == largest);
            const float e = other ? exponential(d) : 0.0f;
            count += !other;
            s += e;
            a = fmaf(d, e, a);
            if constexpr (kStats) {
                q = fmaf(e, e, q);
                if (!other) first = column(i);
            }
        }
        // One holder of the maximum leaves it out; no sum ever contains it, so nothing cancels.
        const unsigned holders = __ballot_sync(kAllLanes, count > 0);
        const float ties = static_cast<float>(count - (lane == __ffs(holders) - 1));
        s += ties;
        if constexpr (kStats) {
            q += ties;
            sums.argmax = __reduce_min_sync(kAllLanes, first);
        }
    } else {
        const float base = sums.max > -kInfinity ? sums.max : 0.0f;  // -inf - -inf would be NaN
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float d = exp.clamp(x[i] - base);
            const float e = exponential(d);
            s += e;
            a = fmaf(d, e, a);
            if constexpr (kStats) q = fmaf(e, e, q);
        }
    }
    sums.s += s;
    sums.a += a;
    if constexpr (kStats) sums.q += q;
}

// Sums of x[0..size), columns first_column and up of the row, valid in thread 0. All threads of the block call
// together.
template <bool kStats, class T>
__device__ RowSums<kStats> sum_range(const T* x, std::int64_t size, std::int64_t first_column, const Exp& exp) {
    constexpr int kPack = Pack<T>::kSize;
    constexpr bool kRough = sizeof(T) == 2;
    RowSums<kStats> sums = empty_sums<kStats>();
    std::int64_t head = (16 - reinterpret_cast<std::uintptr_t>(x) % 16) % 16 / sizeof(T);
    head = head < size ? head : size;
    const std::int64_t packs = (size - head) / kPack;
    const Pack<T>* body = reinterpret_cast<const Pack<T>*>(x + head);
    // At most kPack - 1 elements before the aligned packs and as many after: one per lane of the first warp. They come
    // in the order of the row, so that among equal maxima the first stays.
    const auto add_few = [&](std::int64_t begin, std::int64_t end) {
        if (threadIdx.x >= kWarp || begin >= end) return;
        const std::int64_t index = begin + threadIdx.x;
        const float few[1] = {index < end ? to_float(x[index]) : -kInfinity};
        add_group<kRough>(few, [&](int) { return static_cast<int>(first_column + index); }, exp, sums);
    };
    const auto add_packs = [&](std::int64_t first, const Pack<T>(&loaded)[kUnroll]) {
        float values[kUnroll * kPack];
#pragma unroll
        for (int i = 0; i < kUnroll * kPack; ++i) values[i] = to_float(loaded[i / kPack].values[i % kPack]);
        const auto column = [&](int i) {
            const std::int64_t pack = first + i / kPack * kThreads + threadIdx.x;
            return static_cast<int>(first_column + head + pack * kPack + i % kPack);
        };
        add_group<kRough>(values, column, exp, sums);
    };
    add_few(0, head);
    Pack<T> loaded[kUnroll];
    std::int64_t first = 0;
    for (; first + kThreads * kUnroll <= packs; first += kThreads * kUnroll) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = load_once(body + first + u * kThreads + threadIdx.x);
        add_packs(first, loaded);
    }
    if (first < packs) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const std::int64_t index = first + u * kThreads + threadIdx.x;
#pragma unroll
            for (int i = 0; i < kPack; ++i) loaded[u].values[i] = from_float<T>(-kInfinity);
            if (index < packs) loaded[u] = load_once(body + index);
        }
        add_packs(first, loaded);
    }
    add_few(head + packs * kPack, size);

    sums.s = warp_sum(sums.s);
    sums.a = warp_sum(sums.a);
    if constexpr (kStats) sums.q = warp_sum(sums.q);
    __shared__ RowSums<kStats> of_warp[kWarps];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kWarps; ++warp) sums = merge(sums, of_warp[warp], exp);
    }
    return sums;
}

}  // namespace
}  // namespace arpo::cuda
