// Not yet measured.
//
// Floor: 16 bytes read per leaf, 8 read and 12 written per segment, at ordinary sizes less than the cost of a launch.
//
// One launch. A block looks at kSegmentsPerBlock segments and does the whole tree of every root among them: it collects
// the segments below the root, adds the leaves in ascending order, then every segment to its parent in descending
// order, one thread adding, so that no sum depends on timing. A tree of up to kListed segments is held in shared
// memory, a larger one in the workspace. To find what is below it a root reads all later parents and all leaf segments,
// so (S + L) * (number of roots) reads in all, from the L2 cache; only those between the root and the last segment
// found below it are followed further up.
#include <climits>

#include "cuda_utils.cuh"
#include "segment_advantages.h"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarp;
constexpr int kSegmentsPerBlock = 32;
constexpr int kListed = 512;

__device__ bool is_root(const SegmentTree& tree, int64_t s) { return tree.parent[s] < 0 || tree.parent[s] >= s; }

// Whether s is `root` or below it, for s >= root. Parents are smaller than their children, so the walk ends.
__device__ bool is_below(const SegmentTree& tree, int64_t s, int64_t root) {
    while (s > root) {
        const int64_t parent = tree.parent[s];
        if (parent >= s) return false;
        s = parent;
    }
    return s == root;
}

// Writes the values of the threads where `mine` holds side by side into `kept`, in thread order, and returns how many.
// All threads must call it; they see `kept` when it returns.
__device__ int compact(bool mine, int64_t value, int64_t* kept, int* counts) {
    const unsigned lanes = __ballot_sync(cuda::kAllLanes, mine);
    const int lane = threadIdx.x % cuda::kWarp, warp = threadIdx.x / cuda::kWarp;
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += counts[w];
        total += counts[w];
    }
    if (mine) kept[before + __popc(lanes & ((1u << lane) - 1))] = value;
    __syncthreads();
    return total;
}

// What a block shares of the tree it works on.
template <class Sums>
struct Shared {
    int64_t list[kListed];  // the segments of a small tree, ascending
    Sums sums[kListed];     // of list
    int up[kListed];        // where in list the parent stands
    float entropy[kListed];
    int64_t chunk[kThreads];
    LeafShare share[kThreads];
    int slot[kThreads];
    int counts[kWarps];
};

template <class Sums>
struct TreeWork {
    const SegmentTree& tree;
    Shared<Sums>& shared;
    Sums* all;  // [S] workspace, for a tree that is not small
    int64_t root;
    int64_t last;   // the last segment found below the root
    int64_t count;  // segments found, with the root

    __device__ bool small() const { return count <= kListed; }

    // Where s stands in the list of a small tree.
    __device__ int place(int64_t s) const {
        int low = 0, high = static_cast<int>(count) - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (shared.list[middle] < s) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    // The segments of the tree among the kThreads from `from` on, into `chunk`; those after `last` are not yet known.
    __device__ int collect(int64_t from) {
        const int64_t s = from + threadIdx.x;
        bool mine = s < tree.segments;
        if (mine) {
            // Nothing between `last` and `from` is of this tree, so no child of anything there is.
            const int64_t parent = tree.parent[s];
            mine = (parent >= from || (parent >= root && parent <= last)) && is_below(tree, s, root);
        }
        return compact(mine, s, shared.chunk, shared.counts);
    }

    __device__ void find_segments() {
        if (threadIdx.x == 0) {
            shared.list[0] = root;
            all[root] = Sums{};
        }
        for (int64_t from = root + 1; from < tree.segments; from += kThreads) {
            const int found = collect(from);
            if (found == 0) continue;
            if (threadIdx.x < found) {
                const int64_t s = shared.chunk[threadIdx.x];
                if (count + threadIdx.x < kListed) shared.list[count + threadIdx.x] = s;
                all[s] = Sums{};
            }
            last = shared.chunk[found - 1];
            count += found;
            __syncthreads();
        }
        __syncthreads();
        for (int i = threadIdx.x; small() && i < count; i += kThreads) {
            const int64_t s = shared.list[i];
            shared.sums[i] = Sums{};
            shared.up[i] = i == 0 ? 0 : place(tree.parent[s]);
            shared.entropy[i] = entropy_of(tree, s);
        }
        __syncthreads();
    }

    __device__ void add_leaves() {
        for (int64_t from = 0; from < tree.leaves; from += kThreads) {
            const int64_t l = from + threadIdx.x;
            const int64_t s = l < tree.leaves ? tree.leaf_segment[l] : -1;
            const bool mine = s >= root && s <= last && is_below(tree, s, root);
            const int found = compact(mine, l, shared.chunk, shared.counts);
            if (found == 0) continue;
            if (threadIdx.x < found) {
                shared.share[threadIdx.x] = share_of(tree, shared.chunk[threadIdx.x]);
                shared.slot[threadIdx.x] = small() ? place(tree.leaf_segment[shared.chunk[threadIdx.x]]) : 0;
            }
            __syncthreads();
            for (int i = 0; threadIdx.x == 0 && i < found; ++i) {
                Sums& end = small() ? shared.sums[shared.slot[i]] : all[tree.leaf_segment[shared.chunk[i]]];
                end.add_leaf(shared.share[i]);
            }
            __syncthreads();
        }
    }

    __device__ void add_children() {
        if (small()) {
            for (int i = static_cast<int>(count) - 1; threadIdx.x == 0 && i > 0; --i) {
                shared.sums[shared.up[i]].add_child(shared.sums[i], shared.entropy[i]);
            }
        } else {
            for (int64_t from = root + 1 + (last - root - 1) / kThreads * kThreads; from > root; from -= kThreads) {
                const int found = collect(from);
                for (int i = found - 1; threadIdx.x == 0 && i >= 0; --i) {
                    const int64_t s = shared.chunk[i];
                    all[tree.parent[s]].add_child(all[s], entropy_of(tree, s));
                }
                __syncthreads();
            }
        }
        __syncthreads();
    }

    __device__ void store(float* segment, float* pair) const {
        if (small()) {
            for (int i = threadIdx.x; i < count; i += kThreads) {
                const int64_t s = shared.list[i];
                shared.sums[i].store(segment + s, pair + 2 * s);
            }
        } else {
            for (int64_t s = root + threadIdx.x; s <= last; s += kThreads) {
                if (is_below(tree, s, root)) all[s].store(segment + s, pair + 2 * s);
            }
        }
        __syncthreads();
    }
};

template <class Sums>
__global__ void segment_advantages_kernel(SegmentTree tree, float* segment, float* pair, Sums* all) {
    // Sums has initialisers, which shared memory may not have.
    __shared__ alignas(Shared<Sums>) unsigned char storage[sizeof(Shared<Sums>)];
    Shared<Sums>& shared = *reinterpret_cast<Shared<Sums>*>(storage);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSegmentsPerBlock;
    for (int64_t s = begin; s < begin + kSegmentsPerBlock && s < tree.segments; ++s) {
        if (!is_root(tree, s)) continue;
        TreeWork<Sums> work{tree, shared, all, s, s, 1};
        work.find_segments();
        work.add_leaves();
        work.add_children();
        work.store(segment, pair);
    }
}

template <class Sums>
void launch(const SegmentTree& tree, float* segment, float* pair, void* sums, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>((tree.segments + kSegmentsPerBlock - 1) / kSegmentsPerBlock);
    segment_advantages_kernel<Sums><<<blocks, kThreads, 0, stream>>>(tree, segment, pair, static_cast<Sums*>(sums));
    cuda::check(cudaGetLastError(), "segment_advantages");
}

}  // namespace

int64_t segment_advantages_workspace(int64_t segments) {
    static_assert(sizeof(TurnCredit) == 40 && sizeof(PrefixCredit) == 40 && sizeof(MeanCredit) <= 40, "the largest");
    return segments * static_cast<int64_t>(sizeof(TurnCredit));
}

void segment_advantages_cuda(Credit credit, const SegmentTree& tree, float* segment, float* pair, void* sums,
                             int device, void* stream) {
    if (tree.segments == 0) return;
    if (tree.segments / kSegmentsPerBlock >= INT_MAX) {
        throw std::invalid_argument("group_advantages: got " + std::to_string(tree.segments) +
                                    " segments; expected less than 2^36");
    }
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const cuda::DeviceGuard guard(device);
    switch (credit) {
        case Credit::mean:
            return launch<MeanCredit>(tree, segment, pair, sums, on);
        case Credit::turn:
            return launch<TurnCredit>(tree, segment, pair, sums, on);
        case Credit::prefix:
            return launch<PrefixCredit>(tree, segment, pair, sums, on);
    }
}

}  // namespace arpo
