// Not yet measured.
//
// Floor: 12 bytes read and 4 written per leaf, which at any ordinary size is less than the cost of a launch.
//
// One block to each leaf; the block of a tree's (or subgroup's) first leaf does the whole group, the others stop as
// soon as they meet an earlier leaf of theirs. One launch, no workspace, any order and any group size; sums run in a
// fixed order. A group costs a read of all L indices, so L * (number of groups) reads in all, from the L2 cache.
// reinforce_pp_baseline takes a second launch, since the whole batch enters every result.
#include <climits>

#include "cuda_utils.cuh"
#include "group_advantages.h"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kBatchThreads = 1024;

// A leaf's group: its tree, and its subgroup where the estimator has them.
struct Group {
    int64_t tree;
    int64_t subgroup;

    __device__ Group(const GroupLeaves& in, int64_t l)
        : tree(in.tree[l]), subgroup(in.subgroup == nullptr ? 0 : in.subgroup[l]) {}
    __device__ bool known(int64_t leaves) const {
        return tree >= 0 && tree < leaves && subgroup >= 0 && subgroup < leaves;
    }
    // Leaves with an unknown subgroup count for nothing.
    __device__ bool same_tree(const Group& other, int64_t leaves) const {
        return tree == other.tree && other.subgroup >= 0 && other.subgroup < leaves;
    }
    __device__ bool operator==(const Group& other) const { return tree == other.tree && subgroup == other.subgroup; }
};

// Whether a leaf before `leaf` is of the same group. The same answer in every thread; reads backwards, since the leaves
// of a tree mostly stand together.
__device__ bool has_earlier(const GroupLeaves& in, const Group& own, int64_t leaf) {
    for (int64_t end = leaf; end > 0; end -= kThreads) {
        const int64_t j = end - 1 - threadIdx.x;
        if (__syncthreads_or(j >= 0 && Group(in, j) == own)) return true;
    }
    return false;
}

// The same struct of another lane, a word at a time.
template <class Sums>
__device__ Sums shuffle_down(const Sums& sums, int offset) {
    static_assert(sizeof(Sums) % sizeof(unsigned) == 0, "whole words");
    unsigned words[sizeof(Sums) / sizeof(unsigned)];
    memcpy(words, &sums, sizeof sums);
    for (unsigned& word : words) word = __shfl_down_sync(cuda::kAllLanes, word, offset);
    Sums other;
    memcpy(&other, words, sizeof other);
    return other;
}

// Sums over the block in a fixed order, in every thread. `parts` holds one per warp and is overwritten.
template <int kBlock, class Sums>
__device__ Sums block_merge(Sums sums, Sums* parts) {
    for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) sums.merge(shuffle_down(sums, offset));
    if (threadIdx.x % cuda::kWarp == 0) parts[threadIdx.x / cuda::kWarp] = sums;
    __syncthreads();
    Sums total = parts[0];
    for (int warp = 1; warp < kBlock / cuda::kWarp; ++warp) total.merge(parts[warp]);
    return total;
}

// kDeviations: writes deviations for whiten_kernel instead of advantages, +infinity for a leaf whose tree is flat.
template <bool kDeviations>
__global__ void group_advantages_kernel(Estimator estimator, double eps, GroupLeaves in, float* leaf,
                                        double* deviation) {
    // TreeSums has initialisers, which shared memory may not have.
    __shared__ alignas(TreeSums) unsigned char storage[kThreads / cuda::kWarp * sizeof(TreeSums)];
    TreeSums* parts = reinterpret_cast<TreeSums*>(storage);
    const int64_t first = blockIdx.x;
    const Group own(in, first);
    if (estimator == Estimator::none || !own.known(in.leaves)) {
        if (threadIdx.x == 0) {
            leaf[first] = estimator == Estimator::none ? in.reward[first] : 0.0f;
            if (kDeviations) deviation[first] = NAN;
        }
        return;
    }
    if (has_earlier(in, own, first)) return;

    TreeSums sums;
    sums.tree.shift = sums.subgroup.shift = in.reward[first];
    // The tree of a subgroup may have begun earlier.
    const int64_t begin = in.subgroup == nullptr ? first : 0;
    for (int64_t j = begin + threadIdx.x; j < in.leaves; j += kThreads) {
        const Group other(in, j);
        if (own.same_tree(other, in.leaves)) add_leaf(sums, estimator, in, j);
        if (in.subgroup != nullptr && own == other) sums.subgroup.add(in.reward[j]);
    }
    const LeafRule rule = leaf_rule(estimator, block_merge<kThreads>(sums, parts), eps);
    for (int64_t j = first + threadIdx.x; j < in.leaves; j += kThreads) {
        if (!(own == Group(in, j))) continue;
        const double advantage = rule(in.reward[j], j);
        if (kDeviations) {
            deviation[j] = rule.scale == 0.0 ? INFINITY : advantage;
        } else {
            leaf[j] = static_cast<float>(advantage);
        }
    }
}

// One block: L is small, and the order of the sums fixed.
__global__ void whiten_kernel(double eps, GroupLeaves in, const double* deviation, float* leaf) {
    __shared__ alignas(BatchSums) unsigned char storage[kBatchThreads / cuda::kWarp * sizeof(BatchSums)];
    BatchSums sums;
    for (int64_t l = threadIdx.x; l < in.leaves; l += kBatchThreads) {
        sums.add(isinf(deviation[l]) ? 0.0 : deviation[l], length_of(in, l));
    }
    const LeafRule rule = whitening(block_merge<kBatchThreads>(sums, reinterpret_cast<BatchSums*>(storage)), eps);
    for (int64_t l = threadIdx.x; l < in.leaves; l += kBatchThreads) {
        if (in.tree[l] < 0 || in.tree[l] >= in.leaves) continue;
        leaf[l] = whitened(deviation[l], isinf(deviation[l]), rule);
    }
}

}  // namespace

void group_advantages_cuda(Estimator estimator, double eps, const GroupLeaves& in, float* leaf, double* deviation,
                           int device, void* stream) {
    if (in.leaves == 0) return;
    if (in.leaves > INT_MAX) {
        throw std::invalid_argument("group_advantages: got " + std::to_string(in.leaves) +
                                    " leaves; expected at most 2^31 - 1");
    }
    const unsigned blocks = static_cast<unsigned>(in.leaves);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const cuda::DeviceGuard guard(device);
    if (estimator == Estimator::reinforce_pp_baseline) {
        group_advantages_kernel<true><<<blocks, kThreads, 0, on>>>(estimator, eps, in, leaf, deviation);
        cuda::check(cudaGetLastError(), "group_advantages");
        whiten_kernel<<<1, kBatchThreads, 0, on>>>(eps, in, deviation, leaf);
    } else {
        group_advantages_kernel<false><<<blocks, kThreads, 0, on>>>(estimator, eps, in, leaf, nullptr);
    }
    cuda::check(cudaGetLastError(), "group_advantages");
}

}  // namespace arpo
