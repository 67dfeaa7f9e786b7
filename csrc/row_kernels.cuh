// The kernels that sum up every row of the logits (row_sums.cuh) and hand the sums to an op's `Finish`, on one thread:
//   static constexpr bool kStats;                                     which sums it wants
//   finish(const LogitInputs&, row, const T* x, RowSums<kStats>)      a row that was read
//   finish.skip(row)                                                  one that is masked
// Included by *_cuda.cu only.
#pragma once

#include "row_sums.cuh"

namespace arpo::cuda {
namespace {

// One block per row.
template <class T, class Finish>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sum_rows(const LogitInputs in, const Finish finish) {
    const std::int64_t row = blockIdx.x;
    if (skipped(in, row)) {
        if (threadIdx.x == 0) finish.skip(row);
        return;
    }
    const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
    const auto sums = sum_range<Finish::kStats>(x, in.shape.vocab, 0, Exp(temperature_of(in, row)));
    if (threadIdx.x == 0) finish(in, row, x, sums);
}

// One block per piece of a row; partials[row][piece].
template <class T, bool kStats>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_pieces(const LogitInputs in, RowSums<kStats>* partials, int pieces, std::int64_t length) {
    const std::int64_t row = blockIdx.x / pieces;
    if (skipped(in, row)) return;
    const std::int64_t begin = (blockIdx.x % pieces) * length;
    const std::int64_t rest = in.shape.vocab - begin;
    const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row) + begin;
    const auto sums = sum_range<kStats>(x, rest < length ? rest : length, begin, Exp(temperature_of(in, row)));
    if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

// One warp per row.
template <class T, class Finish>
__global__ void __launch_bounds__(kThreads)
    merge_pieces(const LogitInputs in, const Finish finish, const RowSums<Finish::kStats>* partials, int pieces) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (row >= in.shape.rows) return;
    if (skipped(in, row)) {
        if (lane == 0) finish.skip(row);
        return;
    }
    const Exp exp(temperature_of(in, row));
    auto sums = empty_sums<Finish::kStats>();
    for (int piece = lane; piece < pieces; piece += kWarp) sums = merge(sums, partials[row * pieces + piece], exp);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        auto other = sums;
        other.max = __shfl_down_sync(kAllLanes, sums.max, offset);
        other.s = __shfl_down_sync(kAllLanes, sums.s, offset);
        other.a = __shfl_down_sync(kAllLanes, sums.a, offset);
        if constexpr (Finish::kStats) {
            other.q = __shfl_down_sync(kAllLanes, sums.q, offset);
            other.argmax = __shfl_down_sync(kAllLanes, sums.argmax, offset);
        }
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

// Pieces of a row, none shorter than 8192 elements: the fewest that leave at most a tenth of the device idle when the
// blocks run in waves, else those that leave least idle. 64 rows of 151,936 on 132 multiprocessors: 8 pieces, one wave
// of 512 blocks; 9 would make a second wave of 48. 8192 rows: whole.
int piece_count(const LogitRows& shape, int device) {
    const double wave = static_cast<double>(kBlocksPerSm) * multiprocessors(device);
    const std::int64_t most = shape.vocab / 8192;
    int best = 1;
    double best_busy = 0;
    for (int pieces = 1; pieces <= most || pieces == 1; ++pieces) {
        const double waves = static_cast<double>(shape.rows) * pieces / wave;
        const double busy = waves / static_cast<double>(ceil_div(shape.rows * pieces, static_cast<std::int64_t>(wave)));
        if (busy > best_busy) {
            best = pieces;
            best_busy = busy;
        }
        if (busy >= 0.9) break;
    }
    return best;
}

// Floats between the two kernels: 0, unless rows are too few to fill the device.
template <bool kStats>
std::int64_t partial_floats(const LogitRows& shape, int device) {
    if (shape.rows == 0) return 0;
    const int pieces = piece_count(shape, device);
    return pieces == 1 ? 0 : shape.rows * pieces * static_cast<std::int64_t>(sizeof(RowSums<kStats>) / sizeof(float));
}

unsigned grid(std::int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::invalid_argument("too many rows for one launch, got " + std::to_string(blocks));
    return static_cast<unsigned>(blocks);
}

// Sums every row and finishes it; `partials` are partial_floats() floats. A single launch whose last block merges would
// need a counter that survives between calls, one per stream and graph; the second launch costs less trouble.
template <class T, class Finish>
void launch_sums(const LogitInputs& in, const Finish& finish, float* partials, int device, cudaStream_t stream) {
    constexpr bool kStats = Finish::kStats;
    const LogitRows& shape = in.shape;
    const int pieces = piece_count(shape, device);
    if (pieces == 1) {
        sum_rows<T><<<grid(shape.rows), kThreads, 0, stream>>>(in, finish);
    } else {
        // Whole 16 bytes, so that the pieces of an aligned row are aligned; rounding up may leave fewer of them.
        const std::int64_t length = ceil_div(ceil_div(shape.vocab, pieces), 8) * 8;
        const int used = static_cast<int>(ceil_div(shape.vocab, length));
        RowSums<kStats>* sums = reinterpret_cast<RowSums<kStats>*>(partials);
        sum_pieces<T, kStats><<<grid(shape.rows * used), kThreads, 0, stream>>>(in, sums, used, length);
        check(cudaGetLastError(), "sum_pieces launch");
        merge_pieces<T><<<grid(ceil_div(shape.rows, kWarps)), kThreads, 0, stream>>>(in, finish, sums, used);
    }
    check(cudaGetLastError(), "launch of the row sums");
}

}  // namespace
}  // namespace arpo::cuda
