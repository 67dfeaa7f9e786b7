// Not yet measured.
//
// group_advantages gives one block to each leaf; the block of a tree's first leaf does the whole tree, the others stop
// as soon as they meet an earlier leaf of theirs. One launch, no workspace, any order and any group size; sums run in
// a fixed order. A tree costs a read of all L tree indices, so L * (number of trees) reads in all, from the L2 cache.
//
// segment_advantages adds every leaf to the segments of its path with float64 atomics and then divides: a memset and
// two launches. See segment_share for why the order of the atomics does not show.
#include <climits>

#include "cuda_utils.cuh"
#include "group_advantages.h"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarp;

// Whether a leaf before `leaf` has the same tree. The same answer in every thread; reads backwards, since the leaves of
// a tree mostly stand together.
__device__ bool has_earlier(const int64_t* tree, int64_t leaf) {
    const int64_t own = tree[leaf];
    for (int64_t end = leaf; end > 0; end -= kThreads) {
        const int64_t j = end - 1 - threadIdx.x;
        if (__syncthreads_or(j >= 0 && tree[j] == own)) return true;
    }
    return false;
}

// Sums over the block, in every thread. `parts` is overwritten.
__device__ GroupSums block_merge(GroupSums sums, GroupSums* parts) {
    for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) {
        GroupSums other;
        other.count = __shfl_down_sync(cuda::kAllLanes, sums.count, offset);
        other.sum = __shfl_down_sync(cuda::kAllLanes, sums.sum, offset);
        other.square = __shfl_down_sync(cuda::kAllLanes, sums.square, offset);
        other.differs = __shfl_down_sync(cuda::kAllLanes, static_cast<int>(sums.differs), offset) != 0;
        sums.merge(other);
    }
    if (threadIdx.x % cuda::kWarp == 0) parts[threadIdx.x / cuda::kWarp] = sums;
    __syncthreads();
    GroupSums total = parts[0];
    for (int warp = 1; warp < kWarps; ++warp) total.merge(parts[warp]);
    return total;
}

__global__ void group_advantages_kernel(Estimator estimator, double eps, const float* reward, const int64_t* tree,
                                        int64_t leaves, float* leaf) {
    // GroupSums has initialisers, which shared memory may not have.
    __shared__ alignas(GroupSums) unsigned char storage[kWarps * sizeof(GroupSums)];
    GroupSums* parts = reinterpret_cast<GroupSums*>(storage);
    const int64_t first = blockIdx.x;
    const int64_t own = tree[first];
    if (own < 0 || own >= leaves) {
        if (threadIdx.x == 0) leaf[first] = estimator == Estimator::none ? reward[first] : 0.0f;
        return;
    }
    if (has_earlier(tree, first)) return;

    GroupSums sums;
    sums.shift = reward[first];
    for (int64_t j = first + threadIdx.x; j < leaves; j += kThreads) {
        if (tree[j] == own) sums.add(reward[j]);
    }
    const GroupStatistics statistics = group_statistics(block_merge(sums, parts));
    for (int64_t j = first + threadIdx.x; j < leaves; j += kThreads) {
        if (tree[j] == own) leaf[j] = leaf_advantage(estimator, statistics, reward[j], eps);
    }
}

__global__ void add_leaves_kernel(SegmentTree tree, SegmentTotals* totals) {
    const int64_t l = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (l >= tree.leaves) return;
    const SegmentTotals share = segment_share(tree, l);
    int64_t s = tree.leaf_segment[l];
    if (s >= tree.segments) return;
    // Parents are smaller than their children, so the walk ends.
    while (s >= 0) {
        atomicAdd(&totals[s].count, share.count);
        atomicAdd(&totals[s].sum, share.sum);
        atomicAdd(&totals[s].positive, share.positive);
        atomicAdd(&totals[s].negative, share.negative);
        const int64_t parent = tree.parent[s];
        s = parent < s ? parent : -1;
    }
}

__global__ void finish_segments_kernel(const SegmentTotals* totals, int64_t segments, float* segment, float* pair) {
    const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (s >= segments) return;
    segment[s] = segment_mean(totals[s]);
    pair[2 * s] = static_cast<float>(totals[s].positive);
    pair[2 * s + 1] = static_cast<float>(totals[s].negative);
}

unsigned blocks_for(int64_t threads, const char* what) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    if (blocks > INT_MAX) throw std::invalid_argument(std::string("group_advantages: got more than 2^39 ") + what);
    return static_cast<unsigned>(blocks);
}

}  // namespace

void group_advantages_cuda(Estimator estimator, double eps, const float* reward, const int64_t* tree, int64_t leaves,
                           float* leaf, int device, void* stream) {
    if (leaves == 0) return;
    if (leaves > INT_MAX) {
        throw std::invalid_argument("group_advantages: got " + std::to_string(leaves) +
                                    " leaves; expected at most 2^31 - 1");
    }
    const cuda::DeviceGuard guard(device);
    group_advantages_kernel<<<static_cast<unsigned>(leaves), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        estimator, eps, reward, tree, leaves, leaf);
    cuda::check(cudaGetLastError(), "group_advantages");
}

void segment_advantages_cuda(const SegmentTree& tree, float* segment, float* pair, double* totals, int device,
                             void* stream) {
    if (tree.segments == 0) return;
    static_assert(sizeof(SegmentTotals) == 4 * sizeof(double), "the workspace is [S, 4] float64");
    SegmentTotals* rows = reinterpret_cast<SegmentTotals*>(totals);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const cuda::DeviceGuard guard(device);
    cuda::check(cudaMemsetAsync(totals, 0, sizeof(SegmentTotals) * tree.segments, on), "segment_advantages");
    if (tree.leaves > 0) {
        add_leaves_kernel<<<blocks_for(tree.leaves, "leaves"), kThreads, 0, on>>>(tree, rows);
        cuda::check(cudaGetLastError(), "segment_advantages");
    }
    finish_segments_kernel<<<blocks_for(tree.segments, "segments"), kThreads, 0, on>>>(rows, tree.segments, segment,
                                                                                       pair);
    cuda::check(cudaGetLastError(), "segment_advantages");
}

}  // namespace arpo
