// Not yet measured.
//
// branch_points gives one block to each tree. The block reads all L tree indices, lists the paths that wish, and where
// they wish for more than there is room, places each by counting the wishes served before it. That is L reads a tree
// and m^2 comparisons for m wishing paths, made for trees of tens of paths; above kListed wishing paths in one tree the
// counting reads the inputs again instead of the list and takes m * L.
#include <climits>

#include "branch_points.h"
#include "cuda_utils.cuh"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kListed = 1024;

__global__ void branch_scores_kernel(BranchRule rule, BranchPaths paths, float* score, int32_t* wish) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= paths.paths) return;
    const BranchWish w = branch_wish(rule, paths, i);
    score[i] = w.score;
    wish[i] = w.children;
}

struct Listed {
    float score[kListed];
    int32_t wish[kListed];
    int64_t key[kListed];
    int64_t path[kListed];
};

// Children wished for by the paths of `tree` that are served before path i, read from the inputs.
__device__ int64_t wished_before(const BranchRule& rule, const BranchPaths& paths, int64_t tree, float score,
                                 int64_t i) {
    int64_t before = 0;
    for (int64_t j = 0; j < paths.paths; ++j) {
        if (paths.tree[j] != tree) continue;
        const BranchWish other = branch_wish(rule, paths, j);
        if (branch_precedes(other.score, paths.key[j], j, score, paths.key[i], i)) before += other.children;
    }
    return before;
}

__device__ int64_t wished_before(const Listed& listed, int count, int slot) {
    int64_t before = 0;
    for (int other = 0; other < count; ++other) {
        if (branch_precedes(listed.score[other], listed.key[other], listed.path[other], listed.score[slot],
                            listed.key[slot], listed.path[slot])) {
            before += listed.wish[other];
        }
    }
    return before;
}

// blockIdx.x is the tree. Block 0 also answers the paths that belong to no tree.
__global__ void branch_points_kernel(BranchRule rule, BranchPaths paths, int32_t* children) {
    __shared__ Listed listed;
    __shared__ unsigned long long count;
    __shared__ unsigned long long wished;
    const int64_t tree = blockIdx.x;
    if (threadIdx.x == 0) count = wished = 0;
    __syncthreads();

    for (int64_t i = threadIdx.x; i < paths.paths; i += blockDim.x) {
        const int64_t own = paths.tree[i];
        if (tree == 0 && (own < 0 || own >= paths.trees)) children[i] = 0;
        if (own != tree || tree >= paths.trees) continue;
        const BranchWish w = branch_wish(rule, paths, i);
        children[i] = w.children;
        if (w.children == 0) continue;
        atomicAdd(&wished, static_cast<unsigned long long>(w.children));
        const unsigned long long slot = atomicAdd(&count, 1ull);
        if (slot < kListed) {
            listed.score[slot] = w.score;
            listed.wish[slot] = w.children;
            listed.key[slot] = paths.key[i];
            listed.path[slot] = i;
        }
    }
    __syncthreads();

    if (count == 0) return;
    const int32_t room = paths.room[tree];
    if (room > 0 && wished <= static_cast<unsigned long long>(room)) return;
    if (count <= kListed) {
        const int listed_count = static_cast<int>(count);
        for (int slot = threadIdx.x; slot < listed_count; slot += blockDim.x) {
            const int64_t before = wished_before(listed, listed_count, slot);
            children[listed.path[slot]] = branch_granted(room, before, listed.wish[slot]);
        }
        return;
    }
    for (int64_t i = threadIdx.x; i < paths.paths; i += blockDim.x) {
        if (paths.tree[i] != tree) continue;
        const BranchWish w = branch_wish(rule, paths, i);
        if (w.children == 0) continue;
        children[i] = branch_granted(room, wished_before(rule, paths, tree, w.score, i), w.children);
    }
}

}  // namespace

void branch_scores_cuda(const BranchRule& rule, const BranchPaths& paths, float* score, int32_t* wish, int device,
                        void* stream) {
    if (paths.paths == 0) return;
    const int64_t blocks = (paths.paths + kThreads - 1) / kThreads;
    if (blocks > INT_MAX) throw std::invalid_argument("branch_scores: got more than 2^39 paths");
    const cuda::DeviceGuard guard(device);
    branch_scores_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        rule, paths, score, wish);
    cuda::check(cudaGetLastError(), "branch_scores");
}

void branch_points_cuda(const BranchRule& rule, const BranchPaths& paths, int32_t* children, int device, void* stream) {
    if (paths.paths == 0) return;
    if (paths.trees > INT_MAX) {
        throw std::invalid_argument("branch_points: got " + std::to_string(paths.trees) +
                                    " trees; expected at most 2^31 - 1");
    }
    const unsigned blocks = paths.trees > 0 ? static_cast<unsigned>(paths.trees) : 1u;
    const cuda::DeviceGuard guard(device);
    branch_points_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rule, paths, children);
    cuda::check(cudaGetLastError(), "branch_points");
}

}  // namespace arpo
