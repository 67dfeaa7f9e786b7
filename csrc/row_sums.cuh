// One read of rows of logits on the GPU: for each row its maximum and the sums that log-probability and entropy are made
// of. Included by *_cuda.cu only.
//
// A block reads a row (or a piece of one, where rows are few) once, in 16-byte loads; each warp keeps a maximum of its
// own, so that most groups of elements need no rescale.
#pragma once

#include "cuda_utils.cuh"
#include "logit_rows.h"

namespace arpo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;       // 16-byte loads in flight per thread
constexpr int kBlocksPerSm = 4;  // pieces are made until every multiprocessor has as many blocks
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// e^(d / temperature) for clamped d <= 0. The rounding of the product d * scale is put back to first order: without
// that the result is |d * scale| * 2^-24 off, 4e-6 for the entropy of a nearly certain row. NaN stays NaN.
struct Exp {
    float scale_high, scale_low, lowest;

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
    __device__ float operator()(float d) const {
        const float t = d * scale_high;
        const float rest = fmaf(d, scale_low, fmaf(d, scale_high, -t));
        const float e = fast_exp2(t);
        return fmaf(e, rest * 0.693147181f, e);
    }
};

// With z = (x - max) / temperature and one arg-max left out: s = sum of e^z, a = sum of (x - max) e^z.
struct RowSums {
    float max, s, a;
};
__device__ RowSums empty_sums() { return {-kInfinity, 0.0f, 0.0f}; }

// Sums relative to a larger maximum; `with_max` is 1 where the old arg-max has to become an ordinary element.
__device__ void lower(RowSums& sums, float maximum, float with_max, const Exp& exp) {
    if (sums.max > -kInfinity) {
        const float shift = exp.clamp(sums.max - maximum);
        const float factor = exp(shift);
        sums.a = factor * (sums.a + shift * (sums.s + with_max));
        sums.s = factor * (sums.s + with_max);
    }
    sums.max = maximum;
}

__device__ RowSums merge(RowSums x, RowSums y, const Exp& exp) {
    if (y.max > x.max) {
        const RowSums swap = x;
        x = y;
        y = swap;
    }
    if (y.max > -kInfinity) lower(y, x.max, 1.0f, exp);
    // Sums of a part without maximum are 0, or NaN if the part held one.
    x.s += y.s;
    x.a += y.a;
    return x;
}

__device__ void store(const RowSums& sums, float* three) {
    three[0] = sums.max;
    three[1] = sums.s;
    three[2] = sums.a;
}
__device__ RowSums load(const float* three) { return {three[0], three[1], three[2]}; }

__device__ double temperature_of(const LogitInputs& in, std::int64_t row) {
    const double value = in.temperatures ? in.temperatures[row * in.temperature_stride] : in.temperature;
    return value >= 1e-30 && value <= 1e30f ? value : kNan;
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
// Shards of a row all see its label: the one with column 0 counts it.
__device__ void count_invalid(const LogitInputs& in, const Label& label, unsigned long long* invalid_labels) {
    if (label.invalid && in.vocab_start == 0) atomicAdd(invalid_labels, 1ull);
}

// Adds kCount elements of every lane. All lanes of the warp call together; elements that do not exist are -inf.
template <int kCount>
__device__ void add_group(const float (&x)[kCount], const Exp& exp, RowSums& sums) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    largest = warp_max(largest);
    const int lane = threadIdx.x % kWarp;
    float s = 0, a = 0;
    if (largest > sums.max) {  // the same for the whole warp, and rarer with every group
        lower(sums, largest, lane == 0 ? 1.0f : 0.0f, exp);
        int count = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float d = exp.clamp(x[i] - largest);
            const bool other = !(x[i] == largest);
            const float e = other ? exp(d) : 0.0f;
            count += !other;
            s += e;
            a = fmaf(d, e, a);
        }
        // One holder of the maximum leaves it out; no sum ever contains it, so nothing cancels.
        const unsigned holders = __ballot_sync(kAllLanes, count > 0);
        s += static_cast<float>(count - (lane == __ffs(holders) - 1));
    } else {
        const float base = sums.max > -kInfinity ? sums.max : 0.0f;  // -inf - -inf would be NaN
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float d = exp.clamp(x[i] - base);
            const float e = exp(d);
            s += e;
            a = fmaf(d, e, a);
        }
    }
    sums.s += s;
    sums.a += a;
}

// Sums of x[0..size), valid in thread 0. All threads of the block call together.
template <class T>
__device__ RowSums sum_range(const T* x, std::int64_t size, const Exp& exp) {
    constexpr int kPack = Pack<T>::kSize;
    RowSums sums = empty_sums();
    std::int64_t head = (16 - reinterpret_cast<std::uintptr_t>(x) % 16) % 16 / sizeof(T);
    head = head < size ? head : size;
    const std::int64_t packs = (size - head) / kPack;
    const Pack<T>* body = reinterpret_cast<const Pack<T>*>(x + head);
    for (std::int64_t first = 0; first < packs; first += kThreads * kUnroll) {
        Pack<T> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const std::int64_t index = first + u * kThreads + threadIdx.x;
            if (index < packs) {
                loaded[u] = load_once(body + index);
            } else {
#pragma unroll
                for (int i = 0; i < kPack; ++i) loaded[u].values[i] = from_float<T>(-kInfinity);
            }
        }
        float values[kUnroll * kPack];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[u * kPack + i] = to_float(loaded[u].values[i]);
        }
        add_group(values, exp, sums);
    }
    if (threadIdx.x < kWarp) {
        // At most 2 * (kPack - 1) <= 14 elements lie outside the aligned packs: one per lane of the first warp.
        const std::int64_t tail = head + packs * kPack;
        const std::int64_t index = threadIdx.x < head ? threadIdx.x : tail + (threadIdx.x - head);
        const float outside[1] = {index < size ? to_float(x[index]) : -kInfinity};
        if (head > 0 || tail < size) add_group(outside, exp, sums);
    }
    sums.s = warp_sum(sums.s);
    sums.a = warp_sum(sums.a);
    __shared__ float of_warp[kWarps][3];
    if (threadIdx.x % kWarp == 0) store(sums, of_warp[threadIdx.x / kWarp]);
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kWarps; ++warp) sums = merge(sums, load(of_warp[warp]), exp);
    }
    return sums;
}

// Each of the two kernels below hands a row's sums to `finish`, on one thread; rows that are masked to finish.skip.

// One block per row.
template <class T, class Finish>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sum_rows(const LogitInputs in, const Finish finish) {
    const std::int64_t row = blockIdx.x;
    if (skipped(in, row)) {
        if (threadIdx.x == 0) finish.skip(row);
        return;
    }
    const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
    const RowSums sums = sum_range(x, in.shape.vocab, Exp(temperature_of(in, row)));
    if (threadIdx.x == 0) finish(in, row, x, sums);
}

// One block per piece of a row; partials[row][piece] = {max, s, a}.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_pieces(const LogitInputs in, float* partials, int pieces, std::int64_t length) {
    const std::int64_t row = blockIdx.x / pieces;
    if (skipped(in, row)) return;
    const std::int64_t begin = (blockIdx.x % pieces) * length;
    const std::int64_t rest = in.shape.vocab - begin;
    const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row) + begin;
    const RowSums sums = sum_range(x, rest < length ? rest : length, Exp(temperature_of(in, row)));
    if (threadIdx.x == 0) store(sums, partials + 3 * static_cast<std::int64_t>(blockIdx.x));
}

// One warp per row.
template <class T, class Finish>
__global__ void __launch_bounds__(kThreads)
    merge_pieces(const LogitInputs in, const Finish finish, const float* partials, int pieces) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (row >= in.shape.rows) return;
    if (skipped(in, row)) {
        if (lane == 0) finish.skip(row);
        return;
    }
    const Exp exp(temperature_of(in, row));
    RowSums sums = empty_sums();
    for (int piece = lane; piece < pieces; piece += kWarp) {
        sums = merge(sums, load(partials + 3 * (row * pieces + piece)), exp);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const RowSums other{__shfl_down_sync(kAllLanes, sums.max, offset), __shfl_down_sync(kAllLanes, sums.s, offset),
                            __shfl_down_sync(kAllLanes, sums.a, offset)};
        if (lane < offset) sums = merge(sums, other, exp);
    }
    if (lane == 0) finish(in, row, static_cast<const T*>(in.logits) + in.shape.offset(row), sums);
}

int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Pieces of the forward pass: as many as fill the device, none shorter than 8192 elements.
int forward_piece_count(const LogitRows& shape, int device) {
    const std::int64_t wanted = ceil_div(static_cast<std::int64_t>(kBlocksPerSm) * multiprocessors(device), shape.rows);
    const std::int64_t most = shape.vocab / 8192;
    const std::int64_t pieces = wanted < most ? wanted : most;
    return pieces < 1 ? 1 : static_cast<int>(pieces);
}

unsigned grid(std::int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::invalid_argument("too many rows for one launch, got " + std::to_string(blocks));
    return static_cast<unsigned>(blocks);
}

// Sums every row and finishes it. `partials`: see forward_piece_count.
template <class T, class Finish>
void launch_sums(const LogitInputs& in, const Finish& finish, float* partials, int device, cudaStream_t stream) {
    const LogitRows& shape = in.shape;
    const int pieces = forward_piece_count(shape, device);
    if (pieces == 1) {
        sum_rows<T><<<grid(shape.rows), kThreads, 0, stream>>>(in, finish);
    } else {
        // Whole 16 bytes, so that the pieces of an aligned row are aligned. Rounding up leaves no piece empty: there are
        // far fewer than 8192 / 8 pieces.
        const std::int64_t length = ceil_div(ceil_div(shape.vocab, pieces), 8) * 8;
        sum_pieces<T><<<grid(shape.rows * pieces), kThreads, 0, stream>>>(in, partials, pieces, length);
        check(cudaGetLastError(), "sum_pieces launch");
        merge_pieces<T><<<grid(ceil_div(shape.rows, kWarps)), kThreads, 0, stream>>>(in, finish, partials, pieces);
    }
    check(cudaGetLastError(), "launch of the row sums");
}

}  // namespace
}  // namespace arpo::cuda
