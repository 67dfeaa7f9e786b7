// Not yet measured.
//
// Floor: 16 bytes read per leaf, 8 read and 12 written per segment, at ordinary sizes less than the cost of a launch.
//
// Three launches. The first two find where each tree lies: a segment's nearest ancestor outside of its kChunk (by pointer
// doubling in shared memory), then the last segment and the first and last leaf below each root (integer atomics). In
// the third a block looks at kSegmentsPerBlock segments and does the whole tree of every root among them: it collects
// the segments below the root, adds the leaves in ascending order, then every segment to its parent in descending order,
// so that no sum depends on timing. A tree of up to kListed segments is held in shared memory, a larger one in the
// workspace and, kThreads segments at a time, in shared memory. Trees that stand together cost two reads of the inputs,
// whatever their depth; a tree that others are interleaved with reads what lies between as well.
#include <climits>

#include "cuda_utils.cuh"
#include "segment_advantages.h"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarp;
constexpr int kSegmentsPerBlock = 32;
constexpr int kListed = 512;
constexpr int kPerThread = 4;
constexpr int kChunk = kThreads * kPerThread;
constexpr int64_t kMaxBlocks = 1024;

// How a tree is found. bounds[root] = {last segment, leaves - first leaf, last leaf + 1}; 0 for none.
struct Links {
    int64_t* up;                   // [S]: an ancestor in an earlier chunk, or ~root
    unsigned long long* bounds;    // [S, kBounds]
};
enum Bound : int { kLastSegment, kLeavesFromFirst, kEndOfLeaves, kBounds };

__device__ bool is_root(const SegmentTree& tree, int64_t s) { return tree.parent[s] < 0 || tree.parent[s] >= s; }

__device__ int64_t root_of(const Links& links, int64_t s) {
    int64_t up = links.up[s];
    while (up >= 0) up = links.up[up];
    return ~up;
}

// One block per chunk of segments: `up`, and `bounds` of nothing.
__global__ void __launch_bounds__(kThreads) links_kernel(SegmentTree tree, Links links) {
    __shared__ int64_t shared[kChunk];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
    int64_t up[kPerThread];
    for (int i = 0; i < kPerThread; ++i) {
        const int at = i * kThreads + threadIdx.x;
        const int64_t s = begin + at;
        up[i] = s >= tree.segments || is_root(tree, s) ? ~s : tree.parent[s];
        shared[at] = up[i];
        for (int b = 0; s < tree.segments && b < kBounds; ++b) links.bounds[kBounds * s + b] = 0;
    }
    for (int reach = 1; reach < kChunk; reach *= 2) {
        __syncthreads();
        for (int i = 0; i < kPerThread; ++i) {
            if (up[i] >= begin) up[i] = shared[up[i] - begin];
        }
        __syncthreads();
        for (int i = 0; i < kPerThread; ++i) shared[i * kThreads + threadIdx.x] = up[i];
    }
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t s = begin + i * kThreads + threadIdx.x;
        if (s < tree.segments) links.up[s] = up[i];
    }
}

__device__ void raise(const Links& links, int64_t root, Bound bound, int64_t value) {
    atomicMax(&links.bounds[kBounds * root + bound], static_cast<unsigned long long>(value));
}

__global__ void __launch_bounds__(kThreads) bounds_kernel(SegmentTree tree, Links links) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t s = first; s < tree.segments; s += stride) raise(links, root_of(links, s), kLastSegment, s);
    for (int64_t l = first; l < tree.leaves; l += stride) {
        const int64_t s = tree.leaf_segment[l];
        if (s < 0 || s >= tree.segments) continue;
        const int64_t root = root_of(links, s);
        raise(links, root, kLeavesFromFirst, tree.leaves - l);
        raise(links, root, kEndOfLeaves, l + 1);
    }
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
    Sums sums[kListed];     // of list, or of chunk
    int up[kListed];        // where in list, or in chunk, the parent stands; -1: elsewhere
    float entropy[kListed];
    int64_t chunk[kThreads];
    int64_t end[kThreads];  // segments of the leaves in chunk
    LeafShare share[kThreads];
    int counts[kWarps];
};

// Where s stands among `count` ascending segments, if it is one of them.
__device__ int place(const int64_t* list, int count, int64_t s) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (list[middle] < s) low = middle + 1;
        else high = middle;
    }
    return low;
}

template <class Sums>
struct TreeWork {
    const SegmentTree& tree;
    const Links& links;
    Shared<Sums>& shared;
    Sums* all;  // [S] workspace, for a tree that is not small
    int64_t root;
    int64_t last;   // the last segment below the root
    int64_t count;  // segments found, with the root

    __device__ bool small() const { return count <= kListed; }

    __device__ bool is_below(int64_t s) const { return s >= root && s <= last && root_of(links, s) == root; }

    // The segments of the tree among the kThreads from `from` on, into `chunk`.
    __device__ int collect(int64_t from) {
        const int64_t s = from + threadIdx.x;
        return compact(is_below(s), s, shared.chunk, shared.counts);
    }

    __device__ void find_segments() {
        if (threadIdx.x == 0) {
            shared.list[0] = root;
            all[root] = Sums{};
        }
        for (int64_t from = root + 1; from <= last; from += kThreads) {
            const int found = collect(from);
            if (threadIdx.x < found) {
                const int64_t s = shared.chunk[threadIdx.x];
                if (count + threadIdx.x < kListed) shared.list[count + threadIdx.x] = s;
                all[s] = Sums{};
            }
            count += found;
            __syncthreads();
        }
        __syncthreads();
        for (int i = threadIdx.x; small() && i < count; i += kThreads) {
            const int64_t s = shared.list[i];
            shared.sums[i] = Sums{};
            shared.up[i] = i == 0 ? 0 : place(shared.list, static_cast<int>(count), tree.parent[s]);
            shared.entropy[i] = entropy_of(tree, s);
        }
        __syncthreads();
    }

    // The leaves in `chunk`: the first of those that end in one segment adds them all.
    __device__ void add_found_leaves(int found) {
        const int own = threadIdx.x;
        if (own < found) {
            shared.share[own] = share_of(tree, shared.chunk[own]);
            shared.end[own] = tree.leaf_segment[shared.chunk[own]];
        }
        __syncthreads();
        bool first = own < found;
        for (int i = 0; first && i < own; ++i) first = shared.end[i] != shared.end[own];
        if (first) {
            const int64_t s = shared.end[own];
            Sums& end = small() ? shared.sums[place(shared.list, static_cast<int>(count), s)] : all[s];
            Sums sums = end;
            for (int i = own; i < found; ++i) {
                if (shared.end[i] == s) sums.add_leaf(shared.share[i]);
            }
            end = sums;
        }
        __syncthreads();
    }

    __device__ void add_leaves() {
        const unsigned long long* bounds = links.bounds + kBounds * root;
        const int64_t begin = tree.leaves - static_cast<int64_t>(bounds[kLeavesFromFirst]);
        const int64_t end = static_cast<int64_t>(bounds[kEndOfLeaves]);
        for (int64_t from = begin; from < end; from += kThreads) {
            const int64_t l = from + threadIdx.x;
            const bool mine = l < end && is_below(tree.leaf_segment[l]);
            const int found = compact(mine, l, shared.chunk, shared.counts);
            if (found > 0) add_found_leaves(found);
        }
    }

    // The segments in `chunk`, whose later ones are complete.
    __device__ void add_found_children(int found) {
        const int own = threadIdx.x;
        if (own < found) {
            const int64_t s = shared.chunk[own], parent = tree.parent[s];
            const int up = place(shared.chunk, found, parent);
            shared.up[own] = shared.chunk[up] == parent ? up : -1;
            shared.sums[own] = all[s];
            shared.entropy[own] = entropy_of(tree, s);
        }
        __syncthreads();
        for (int i = found - 1; own == 0 && i >= 0; --i) {
            const int up = shared.up[i];
            Sums& parent = up >= 0 ? shared.sums[up] : all[tree.parent[shared.chunk[i]]];
            parent.add_child(shared.sums[i], shared.entropy[i]);
        }
        __syncthreads();
        if (own < found) all[shared.chunk[own]] = shared.sums[own];
        __syncthreads();
    }

    __device__ void add_children() {
        if (small()) {
            for (int i = static_cast<int>(count) - 1; threadIdx.x == 0 && i > 0; --i) {
                shared.sums[shared.up[i]].add_child(shared.sums[i], shared.entropy[i]);
            }
        } else {
            for (int64_t from = root + 1 + (last - root - 1) / kThreads * kThreads; from > root; from -= kThreads) {
                const int found = collect(from);
                if (found > 0) add_found_children(found);
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
                if (is_below(s)) all[s].store(segment + s, pair + 2 * s);
            }
        }
        __syncthreads();
    }
};

template <class Sums>
__global__ void __launch_bounds__(kThreads)
    segment_advantages_kernel(SegmentTree tree, Links links, float* segment, float* pair, Sums* all) {
    // Sums has initialisers, which shared memory may not have.
    __shared__ alignas(Shared<Sums>) unsigned char storage[sizeof(Shared<Sums>)];
    Shared<Sums>& shared = *reinterpret_cast<Shared<Sums>*>(storage);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSegmentsPerBlock;
    for (int64_t s = begin; s < begin + kSegmentsPerBlock && s < tree.segments; ++s) {
        if (!is_root(tree, s)) continue;
        const int64_t last = static_cast<int64_t>(links.bounds[kBounds * s + kLastSegment]);
        TreeWork<Sums> work{tree, links, shared, all, s, last, 1};
        work.find_segments();
        work.add_leaves();
        work.add_children();
        work.store(segment, pair);
    }
}

unsigned blocks_of(int64_t count, int64_t per_block, int64_t limit) {
    const int64_t blocks = (count + per_block - 1) / per_block;
    return static_cast<unsigned>(blocks < limit ? blocks : limit);
}

template <class Sums>
void launch(const SegmentTree& tree, float* segment, float* pair, void* workspace, cudaStream_t stream) {
    int64_t* const up = static_cast<int64_t*>(workspace);
    const Links links = {up, reinterpret_cast<unsigned long long*>(up + tree.segments)};
    Sums* const sums = reinterpret_cast<Sums*>(up + (1 + kBounds) * tree.segments);
    const auto launched = [] { cuda::check(cudaGetLastError(), "segment_advantages"); };
    const int64_t longest = tree.segments > tree.leaves ? tree.segments : tree.leaves;
    links_kernel<<<blocks_of(tree.segments, kChunk, INT_MAX), kThreads, 0, stream>>>(tree, links);
    launched();
    bounds_kernel<<<blocks_of(longest, kThreads, kMaxBlocks), kThreads, 0, stream>>>(tree, links);
    launched();
    segment_advantages_kernel<<<blocks_of(tree.segments, kSegmentsPerBlock, INT_MAX), kThreads, 0, stream>>>(
        tree, links, segment, pair, sums);
    launched();
}

}  // namespace

int64_t segment_advantages_workspace(int64_t segments) {
    static_assert(sizeof(TurnCredit) == 40 && sizeof(PrefixCredit) == 40 && sizeof(MeanCredit) <= 40, "the largest");
    return segments * static_cast<int64_t>((1 + kBounds) * sizeof(int64_t) + sizeof(TurnCredit));
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
