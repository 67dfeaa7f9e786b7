// Not yet measured.
//
// branch_points gives a block one or more neighbouring trees, so many that there are about kBlocks blocks: each reads
// all L tree indices, which is what the work of many trees consists of (4096 trees x 65,536 paths: 0.5 MB a block, 0.13
// GB from L2 in all). The block lists the paths that wish, and in the trees that wish for more than they have room for,
// places each by counting the wishes served before it. That takes m^2 comparisons for m wishing paths of a block, made
// for trees of tens of paths; above kListed of them the counting reads the inputs again instead and takes m * L.
#include <algorithm>
#include <climits>

#include "branch_points.h"
#include "cuda_utils.cuh"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kListed = 1024;
constexpr int kTrees = 64;    // of a block, at most
constexpr int kBlocks = 256;  // about two for each multiprocessor

__global__ void branch_scores_kernel(BranchRule rule, BranchPaths paths, float* score, int32_t* wish) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= paths.paths) return;
    const BranchWish w = branch_wish(rule, paths, i);
    score[i] = w.score;
    wish[i] = w.children;
}

// The wishing paths of a block's trees, and what each tree wishes for.
struct Listed {
    float score[kListed];
    int32_t wish[kListed];
    int64_t key[kListed];
    int64_t path[kListed];
    int tree[kListed];  // counted from the block's first
    unsigned long long count;
    unsigned long long wished[kTrees];
};

__device__ bool is_scarce(const BranchPaths& paths, const Listed& listed, int64_t first_tree, int tree) {
    const int32_t room = paths.room[first_tree + tree];
    return room <= 0 || listed.wished[tree] > static_cast<unsigned long long>(room);
}

// Children wished for by the paths of path i's tree that are served before it, read from the inputs.
__device__ int64_t wished_before(const BranchRule& rule, const BranchPaths& paths, float score, int64_t i) {
    int64_t before = 0;
    for (int64_t j = 0; j < paths.paths; ++j) {
        if (paths.tree[j] != paths.tree[i]) continue;
        const BranchWish other = branch_wish(rule, paths, j);
        if (branch_precedes(other.score, paths.key[j], j, score, paths.key[i], i)) before += other.children;
    }
    return before;
}

__device__ int64_t wished_before(const Listed& listed, int count, int slot) {
    int64_t before = 0;
    for (int other = 0; other < count; ++other) {
        if (listed.tree[other] == listed.tree[slot] &&
            branch_precedes(listed.score[other], listed.key[other], listed.path[other], listed.score[slot],
                            listed.key[slot], listed.path[slot])) {
            before += listed.wish[other];
        }
    }
    return before;
}

// Every path's wish into its children, and the wishing ones into the list. Block 0 also answers the paths of no tree.
__device__ void list_wishes(const BranchRule& rule, const BranchPaths& paths, int64_t first_tree, int trees,
                            Listed& listed, int32_t* children) {
    for (int64_t i = threadIdx.x; i < paths.paths; i += blockDim.x) {
        const int64_t own = paths.tree[i];
        if (first_tree == 0 && (own < 0 || own >= paths.trees)) children[i] = 0;
        if (own < first_tree || own >= first_tree + trees) continue;
        const BranchWish w = branch_wish(rule, paths, i);
        children[i] = w.children;
        if (w.children == 0) continue;
        atomicAdd(&listed.wished[own - first_tree], static_cast<unsigned long long>(w.children));
        const unsigned long long slot = atomicAdd(&listed.count, 1ull);
        if (slot < kListed) {
            listed.score[slot] = w.score;
            listed.wish[slot] = w.children;
            listed.key[slot] = paths.key[i];
            listed.path[slot] = i;
            listed.tree[slot] = static_cast<int>(own - first_tree);
        }
    }
}

__global__ void branch_points_kernel(BranchRule rule, BranchPaths paths, int trees_of_block, int32_t* children) {
    __shared__ Listed listed;
    const int64_t first_tree = static_cast<int64_t>(blockIdx.x) * trees_of_block;
    const int64_t left = paths.trees - first_tree;
    const int trees = left < trees_of_block ? static_cast<int>(left) : trees_of_block;
    if (threadIdx.x == 0) listed.count = 0;
    if (threadIdx.x < kTrees) listed.wished[threadIdx.x] = 0;
    __syncthreads();
    list_wishes(rule, paths, first_tree, trees, listed, children);
    __syncthreads();

    if (listed.count <= kListed) {
        const int count = static_cast<int>(listed.count);
        for (int slot = threadIdx.x; slot < count; slot += blockDim.x) {
            const int tree = listed.tree[slot];
            if (!is_scarce(paths, listed, first_tree, tree)) continue;
            const int64_t before = wished_before(listed, count, slot);
            children[listed.path[slot]] = branch_granted(paths.room[first_tree + tree], before, listed.wish[slot]);
        }
        return;
    }
    for (int64_t i = threadIdx.x; i < paths.paths; i += blockDim.x) {
        const int64_t own = paths.tree[i];
        if (own < first_tree || own >= first_tree + trees) continue;
        const BranchWish w = branch_wish(rule, paths, i);
        if (w.children == 0 || !is_scarce(paths, listed, first_tree, static_cast<int>(own - first_tree))) continue;
        children[i] = branch_granted(paths.room[own], wished_before(rule, paths, w.score, i), w.children);
    }
}

// So many that kBlocks blocks do, but not more than leave the list of a block half empty on average.
int trees_of_block(const BranchPaths& paths) {
    const int64_t wanted = (paths.trees + kBlocks - 1) / kBlocks;
    const int64_t listed = static_cast<int64_t>(kListed / 2 * (static_cast<double>(paths.trees) / paths.paths));
    return static_cast<int>(std::clamp<int64_t>(std::min(wanted, listed), 1, kTrees));
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
    const int trees = trees_of_block(paths);
    const int64_t blocks = std::max<int64_t>((paths.trees + trees - 1) / trees, 1);
    if (blocks > INT_MAX) {
        throw std::invalid_argument("branch_points: got " + std::to_string(paths.trees) +
                                    " trees; expected at most 2^31 - 1");
    }
    const cuda::DeviceGuard guard(device);
    branch_points_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        rule, paths, trees, children);
    cuda::check(cudaGetLastError(), "branch_points");
}

}  // namespace arpo
