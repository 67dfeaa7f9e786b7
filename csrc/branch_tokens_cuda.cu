// Not yet measured.
//
// Bytes: every input once (10 a position with entropy, value, mask and candidate), the orders written and read once (16).
// At 64 x 1024 that is 1.7 MB, half a microsecond of an H200: what counts is latency, the chain of dependent steps.
//
// branch_tokens gives one block to each tree. It lists its rows and orders them by key, a warp scores each row, and then
// the block chooses one position after the other: a look at the best of every kTokenBlock positions, a warp's look into
// that block, and the best again of the blocks that lost positions. Nothing is allocated and nothing waits for the host.
//
// future_value gives a warp to each row and a kTokenLanes-th of the row to each lane.
#include <algorithm>
#include <climits>

#include "branch_tokens.h"
#include "cuda_utils.cuh"

namespace arpo {
namespace {

using cuda::kAllLanes;
using cuda::kWarp;
static_assert(kTokenLanes == kWarp && kTokenBlock == 2 * kWarp, "a lane holds one partial sum and two of a block");

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

struct RowSums {
    double positions;
    double entropy;
    double value;
};

// Everything by slot: the rows of tree 0, then those of tree 1, ..., in the order of their keys.
struct Scratch {
    int64_t* listed;  // [rows], rows of a tree as they were found
    int64_t* row;     // [rows]
    RowSums* sums;    // [rows]
    uint64_t* order;  // [rows, blocks * kTokenBlock]
    uint64_t* best;   // [rows, blocks]
};

__host__ __device__ Scratch scratch_at(void* memory, int64_t rows, int64_t tokens) {
    Scratch s;
    s.order = static_cast<uint64_t*>(memory);
    s.best = s.order + rows * token_blocks(tokens) * kTokenBlock;
    s.listed = reinterpret_cast<int64_t*>(s.best + rows * token_blocks(tokens));
    s.row = s.listed + rows;
    s.sums = reinterpret_cast<RowSums*>(s.row + rows);
    return s;
}

struct Block {
    unsigned long long before;  // rows of earlier trees: the tree's first slot
    unsigned long long rows;
    unsigned long long found;
    unsigned long long best[kWarps];
    int64_t token;
    double mean_entropy;
    double mean_value;
    ZScale entropy;
    ZScale value;
};

__device__ double lanes_summed(double sum) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum = added(sum, __shfl_xor_sync(kAllLanes, sum, offset));
    return sum;
}

__device__ unsigned long long lanes_best(unsigned long long best) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(kAllLanes, best, offset);
        best = other > best ? other : best;
    }
    return best;
}

__device__ bool counts(const TokenRows& in, int64_t i) {
    return (in.mask == nullptr || in.mask[i] != 0) && is_finite(in.entropy[i]) &&
           (in.value == nullptr || is_finite(in.value[i]));
}

// Lane l of a warp adds positions l, l + 32, ...: the order of the definition.
__device__ RowSums sums_of(const TokenRows& in, int64_t row) {
    RowSums own{0.0, 0.0, 0.0};
    for (int64_t t = threadIdx.x % kWarp; t < in.tokens; t += kWarp) {
        const int64_t i = row * in.tokens + t;
        const bool counted = counts(in, i);
        own.positions += counted ? 1.0 : 0.0;
        own.entropy = added(own.entropy, counted ? in.entropy[i] : 0.0);
        if (in.value) own.value = added(own.value, counted ? in.value[i] : 0.0);
    }
    return {lanes_summed(own.positions), lanes_summed(own.entropy), lanes_summed(own.value)};
}

__device__ RowSums squares_of(const TokenRows& in, int64_t row, double mean_entropy, double mean_value) {
    RowSums own{0.0, 0.0, 0.0};
    for (int64_t t = threadIdx.x % kWarp; t < in.tokens; t += kWarp) {
        const int64_t i = row * in.tokens + t;
        if (!counts(in, i)) continue;
        const double entropy = added(in.entropy[i], -mean_entropy);
        own.entropy = added(own.entropy, multiplied(entropy, entropy));
        if (in.value == nullptr) continue;
        const double value = added(in.value[i], -mean_value);
        own.value = added(own.value, multiplied(value, value));
    }
    return {0.0, lanes_summed(own.entropy), lanes_summed(own.value)};
}

// The order of each position of a slot's row, and the best of every kTokenBlock of them.
__device__ void score_row(const TokenRows& in, const TokenRule& rule, int64_t row, const ZScale& entropy,
                          const ZScale& value, uint64_t* order, uint64_t* best) {
    const int lane = threadIdx.x % kWarp;
    for (int64_t block = 0; block < token_blocks(in.tokens); ++block) {
        unsigned long long better = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t t = block * kTokenBlock + half * kWarp + lane;
            uint64_t own = 0;
            if (t < in.tokens) {
                const int64_t i = row * in.tokens + t;
                const bool may = counts(in, i) && (in.candidate == nullptr || in.candidate[i] != 0);
                // An uncounted number may be NaN: its order would not be 0 by itself.
                own = may ? token_order(z_score(entropy, in.entropy[i]),
                                        in.value ? z_score(value, in.value[i]) : 1.0f, true, rule.fallback)
                          : 0;
            }
            order[t] = own;
            better = own > better ? own : better;
        }
        better = lanes_best(better);
        if (lane == 0) best[block] = better;
    }
}

// Puts the rows of `tree` into their slots. Every thread of the block takes part, here and below.
__device__ void list_rows(const TokenRows& in, int64_t tree, const Scratch& scratch, Block& block) {
    if (threadIdx.x == 0) block.before = block.rows = block.found = 0;
    __syncthreads();
    unsigned long long before = 0, own = 0;
    for (int64_t r = threadIdx.x; r < in.rows; r += blockDim.x) {
        const int64_t its_tree = in.tree[r];
        before += its_tree >= 0 && its_tree < tree;
        own += its_tree == tree;
    }
    if (before != 0) atomicAdd(&block.before, before);
    if (own != 0) atomicAdd(&block.rows, own);
    __syncthreads();
    const int64_t first = static_cast<int64_t>(block.before), rows = static_cast<int64_t>(block.rows);
    for (int64_t r = threadIdx.x; r < in.rows; r += blockDim.x) {
        if (in.tree[r] == tree) scratch.listed[first + static_cast<int64_t>(atomicAdd(&block.found, 1ull))] = r;
    }
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < rows; slot += blockDim.x) {
        const int64_t r = scratch.listed[first + slot];
        int64_t rank = 0;
        for (int64_t other = 0; other < rows; ++other) {
            const int64_t o = scratch.listed[first + other];
            const int64_t own_key = in.key ? in.key[r] : r, other_key = in.key ? in.key[o] : o;
            rank += other_key < own_key || (other_key == own_key && o < r);
        }
        scratch.row[first + rank] = r;
    }
    __syncthreads();
}

// The scales of a whole tree into `block`: each row's sums by a warp, their sum in the order of the slots by one thread.
__device__ void scale_tree(const TokenRows& in, double eps, const Scratch& scratch, Block& block) {
    const int64_t first = static_cast<int64_t>(block.before), rows = static_cast<int64_t>(block.rows);
    const int warp = threadIdx.x / kWarp;
    for (int64_t slot = first + warp; slot < first + rows; slot += kWarps) {
        const RowSums sums = sums_of(in, scratch.row[slot]);
        if (threadIdx.x % kWarp == 0) scratch.sums[slot] = sums;
    }
    __syncthreads();
    double positions = 0.0;
    if (threadIdx.x == 0) {
        double entropy = 0.0, value = 0.0;
        for (int64_t slot = first; slot < first + rows; ++slot) {
            positions = added(positions, scratch.sums[slot].positions);
            entropy = added(entropy, scratch.sums[slot].entropy);
            value = added(value, scratch.sums[slot].value);
        }
        block.mean_entropy = mean_of(positions, entropy);
        block.mean_value = mean_of(positions, value);
    }
    __syncthreads();
    for (int64_t slot = first + warp; slot < first + rows; slot += kWarps) {
        const RowSums squares = squares_of(in, scratch.row[slot], block.mean_entropy, block.mean_value);
        if (threadIdx.x % kWarp == 0) scratch.sums[slot] = squares;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double entropy = 0.0, value = 0.0;
        for (int64_t slot = first; slot < first + rows; ++slot) {
            entropy = added(entropy, scratch.sums[slot].entropy);
            value = added(value, scratch.sums[slot].value);
        }
        block.entropy = z_scale(positions, block.mean_entropy, entropy, eps);
        block.value = z_scale(positions, block.mean_value, value, eps);
    }
    __syncthreads();
}

__device__ void score_tree(const TokenRows& in, const TokenRule& rule, const Scratch& scratch, Block& block) {
    if (rule.scope == TokenScope::tree) scale_tree(in, rule.eps, scratch, block);
    const int64_t first = static_cast<int64_t>(block.before), rows = static_cast<int64_t>(block.rows);
    const int64_t blocks = token_blocks(in.tokens);
    for (int64_t slot = first + threadIdx.x / kWarp; slot < first + rows; slot += kWarps) {
        const int64_t row = scratch.row[slot];
        ZScale entropy{0.0, 1.0}, value{0.0, 1.0};
        if (rule.scope == TokenScope::tree) {
            entropy = block.entropy;
            value = block.value;
        } else if (rule.scope == TokenScope::row) {
            const RowSums sums = sums_of(in, row);
            const double mean_entropy = mean_of(sums.positions, sums.entropy);
            const double mean_value = mean_of(sums.positions, sums.value);
            const RowSums squares = squares_of(in, row, mean_entropy, mean_value);
            entropy = z_scale(sums.positions, mean_entropy, squares.entropy, rule.eps);
            value = z_scale(sums.positions, mean_value, squares.value, rule.eps);
        }
        score_row(in, rule, row, entropy, value, scratch.order + slot * blocks * kTokenBlock,
                  scratch.best + slot * blocks);
    }
    __syncthreads();
}

// The largest of `best`, the first of equal ones. An order has 33 bits; below it goes the index, counted from above.
__device__ unsigned long long best_of_tree(const uint64_t* best, int64_t count, Block& block) {
    unsigned long long own = 0;
    for (int64_t b = threadIdx.x; b < count; b += blockDim.x) {
        const unsigned long long packed = (best[b] << 31) | static_cast<unsigned long long>(INT_MAX - b);
        own = best[b] != 0 && packed > own ? packed : own;
    }
    own = lanes_best(own);
    if (threadIdx.x % kWarp == 0) block.best[threadIdx.x / kWarp] = own;
    __syncthreads();
    own = 0;
    for (int warp = 0; warp < kWarps; ++warp) own = block.best[warp] > own ? block.best[warp] : own;
    return own;
}

// Drops positions first to last of a row and renews the best of the blocks that hold them.
__device__ void drop(uint64_t* order, uint64_t* best, int64_t first, int64_t last) {
    for (int64_t t = first + threadIdx.x; t <= last; t += blockDim.x) order[t] = 0;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    for (int64_t b = first / kTokenBlock + threadIdx.x / kWarp; b <= last / kTokenBlock; b += kWarps) {
        const uint64_t low = order[b * kTokenBlock + lane], high = order[b * kTokenBlock + kWarp + lane];
        const unsigned long long better = lanes_best(low > high ? low : high);
        if (lane == 0) best[b] = better;
    }
    __syncthreads();
}

__device__ void choose(const TokenRows& in, const TokenRule& rule, int64_t limit, const Scratch& scratch, Block& block,
                       const TokenChoice& choice, int64_t place) {
    const int64_t first_slot = static_cast<int64_t>(block.before), rows = static_cast<int64_t>(block.rows);
    const int64_t blocks = token_blocks(in.tokens);
    for (int64_t taken = 0; taken < limit; ++taken, ++place) {
        const unsigned long long packed = best_of_tree(scratch.best + first_slot * blocks, rows * blocks, block);
        if (packed == 0) return;
        const uint64_t wanted = packed >> 31;
        const int64_t index = INT_MAX - static_cast<int64_t>(packed & INT_MAX);
        const int64_t slot = first_slot + index / blocks;
        uint64_t* order = scratch.order + slot * blocks * kTokenBlock;
        if (threadIdx.x < kWarp) {
            const int64_t start = index % blocks * kTokenBlock;
            const unsigned low = __ballot_sync(kAllLanes, order[start + threadIdx.x] == wanted);
            const unsigned high = __ballot_sync(kAllLanes, order[start + kWarp + threadIdx.x] == wanted);
            if (threadIdx.x == 0) {
                block.token = start + (low != 0 ? __ffs(low) - 1 : kWarp + __ffs(high) - 1);
                choice.row[place] = scratch.row[slot];
                choice.token[place] = block.token;
                choice.score[place] = token_score(wanted);
            }
        }
        __syncthreads();
        const int64_t reach = rule.min_distance - 1 < in.tokens ? rule.min_distance - 1 : in.tokens;
        const int64_t token = block.token;
        drop(order, scratch.best + slot * blocks, token > reach ? token - reach : 0,
             token + reach < in.tokens - 1 ? token + reach : in.tokens - 1);
    }
}

__global__ void __launch_bounds__(kThreads) branch_tokens_kernel(TokenRule rule, TokenRows in, TokenChoice choice,
                                                                 void* memory) {
    __shared__ Block block;
    const int64_t tree = blockIdx.x;
    const int64_t limit = in.room[tree] < rule.count ? in.room[tree] : rule.count;
    for (int64_t place = threadIdx.x; place < rule.count; place += blockDim.x) {
        choice.row[tree * rule.count + place] = -1;
        choice.token[tree * rule.count + place] = -1;
        choice.score[tree * rule.count + place] = 0.0f;
    }
    if (limit <= 0) return;
    const Scratch scratch = scratch_at(memory, in.rows, in.tokens);
    list_rows(in, tree, scratch, block);
    score_tree(in, rule, scratch, block);
    choose(in, rule, limit, scratch, block, choice, tree * rule.count);
}

// A block is one warp: there are fewer rows than an SM holds warps, and more SMs than rows.
__global__ void __launch_bounds__(kWarp) future_value_kernel(FutureValue args, int64_t segment) {
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x;
    const float* log_ratio = args.log_ratio + row * args.tokens;
    const uint8_t* mask = args.mask ? args.mask + row * args.tokens : nullptr;
    double decay = 1.0, sum = 0.0;
    const int64_t start = lane * segment;
    for (int64_t t = start + segment - 1; t >= start; --t) {
        const double own = t < args.tokens && (mask == nullptr || mask[t] != 0) ? log_ratio[t] : 0.0;
        sum = added(own, multiplied(args.gamma, sum));
        decay = multiplied(decay, args.gamma);
    }
    decay = segment_decay(decay, args.gamma);
    double entering = 0.0;
    for (int other = kWarp - 1; other > 0; --other) {
        const double its_own = __shfl_sync(kAllLanes, sum, other);
        if (other > lane) entering = added(its_own, multiplied(decay, entering));
    }
    sum = entering;
    for (int64_t t = start + segment - 1; t >= start; --t) {
        const double own = t < args.tokens && (mask == nullptr || mask[t] != 0) ? log_ratio[t] : 0.0;
        sum = added(own, multiplied(args.gamma, sum));
        if (t < args.tokens) args.value[row * args.tokens + t] = future_value_of(sum, args.low, args.high);
    }
}

}  // namespace

int64_t branch_tokens_scratch_bytes(int64_t rows, int64_t tokens) {
    const int64_t words = token_blocks(tokens) * (kTokenBlock + 1) + 2;
    return rows * (words * static_cast<int64_t>(sizeof(uint64_t)) + static_cast<int64_t>(sizeof(RowSums)));
}

void branch_tokens_cuda(const TokenRule& rule, const TokenRows& rows, const TokenChoice& choice, void* scratch,
                        int device, void* stream) {
    if (rows.trees == 0 || rule.count == 0) return;
    if (rows.trees > INT_MAX || rows.rows * token_blocks(rows.tokens) > INT_MAX) {
        throw std::invalid_argument("branch_tokens: got " + std::to_string(rows.trees) + " trees and " +
                                    std::to_string(rows.rows) + " x " + std::to_string(rows.tokens) +
                                    " tokens; expected at most 2^31 - 1 trees and 2^37 tokens");
    }
    const cuda::DeviceGuard guard(device);
    branch_tokens_kernel<<<static_cast<unsigned>(rows.trees), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        rule, rows, choice, scratch);
    cuda::check(cudaGetLastError(), "branch_tokens");
}

void future_value_cuda(const FutureValue& args, int device, void* stream) {
    if (args.rows == 0 || args.tokens == 0) return;
    if (args.rows > INT_MAX) throw std::invalid_argument("future_value: got more than 2^31 - 1 rows");
    const int64_t segment = (args.tokens + kTokenLanes - 1) / kTokenLanes;
    const cuda::DeviceGuard guard(device);
    future_value_kernel<<<static_cast<unsigned>(args.rows), kWarp, 0, static_cast<cudaStream_t>(stream)>>>(args, segment);
    cuda::check(cudaGetLastError(), "future_value");
}

}  // namespace arpo
