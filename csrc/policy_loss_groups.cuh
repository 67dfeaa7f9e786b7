// Ratios that groups of tokens share, on a GPU: where each group lies, its sums, and for packed paths the leaves and the
// way back to the segments. Included by policy_loss_cuda.cu only.
#pragma once

#include "policy_loss_tokens.cuh"

namespace arpo {
namespace {

constexpr int64_t kMaxGroupBlocks = 4096;

// Sums over a segment's tokens of nonzero weight.
struct SegmentSums {
    double x, count, text;
};

struct Workspace {
    double* partials;            // [kRows, columns]
    int64_t columns;             // blocks of tokens, then blocks of leaves
    int64_t token_blocks;
    unsigned long long* bounds;  // [groups, 2]: N - first token and last token + 1, 0 for none
    unsigned long long* misplaced;  // nonzero: a token, segment or leaf had an index out of range
    SegmentSums* segments;       // [groups], packed paths only
    double* leaf_gradient;       // [leaves]
    GroupRatio* ratios;          // [groups]
    int64_t bytes;
};

int64_t blocks_of(int64_t count, int64_t limit) {
    const int64_t blocks = (count + kThreads - 1) / kThreads;
    return blocks < 1 ? 1 : blocks < limit ? blocks : limit;
}

Workspace workspace_of(const PolicyLoss& loss, void* memory) {
    const PolicyGroups& shared = loss.groups;
    Workspace w = {};
    char* const begin = static_cast<char*>(memory);
    char* next = begin;
    const auto take = [&](int64_t bytes) {
        char* const address = next;
        next += (bytes + 15) / 16 * 16;
        return address;
    };
    const bool paths = shared.level == PolicyLevel::path;
    w.token_blocks = blocks_of((loss.count + kPack - 1) / kPack, kMaxBlocks);
    w.columns = w.token_blocks + (paths ? blocks_of(shared.leaves, kMaxBlocks) : 0);
    w.partials = reinterpret_cast<double*>(take(kRows * w.columns * static_cast<int64_t>(sizeof(double))));
    if (shared.level != PolicyLevel::token) {
        w.bounds = reinterpret_cast<unsigned long long*>(take((2 * shared.groups + 1) * 8));
        w.misplaced = w.bounds + 2 * shared.groups;
        w.ratios = reinterpret_cast<GroupRatio*>(take(shared.groups * static_cast<int64_t>(sizeof(GroupRatio))));
    }
    if (paths) {
        w.segments = reinterpret_cast<SegmentSums*>(take(shared.groups * static_cast<int64_t>(sizeof(SegmentSums))));
        w.leaf_gradient = reinterpret_cast<double*>(take(shared.leaves * static_cast<int64_t>(sizeof(double))));
    }
    w.bytes = next - begin;
    return w;
}

__device__ int64_t group_at(const PolicyGroups& shared, int64_t t) {
    return shared.wide ? static_cast<const int64_t*>(shared.group)[t] : static_cast<const int32_t*>(shared.group)[t];
}

// Where the tokens of each group lie. Only the ends of a run of one group touch memory.
__global__ void __launch_bounds__(kThreads) bounds_kernel(PolicyLoss loss, Workspace workspace) {
    const PolicyGroups& shared = loss.groups;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < loss.count; t += stride) {
        const int64_t group = group_at(shared, t);
        if (group < 0 || group >= shared.groups) {
            if (loss.tokens.weight[t] != 0.0f) atomicMax(workspace.misplaced, 1ull);
            continue;
        }
        if (t == 0 || group_at(shared, t - 1) != group) {
            atomicMax(&workspace.bounds[2 * group], static_cast<unsigned long long>(loss.count - t));
        }
        if (t + 1 == loss.count || group_at(shared, t + 1) != group) {
            atomicMax(&workspace.bounds[2 * group + 1], static_cast<unsigned long long>(t + 1));
        }
    }
}

// Total over the block, in every thread. `parts` is overwritten.
__device__ double block_total(double value, double* parts) {
    value = warp_total(value, false);
    __syncthreads();
    if (threadIdx.x % cuda::kWarp == 0) parts[threadIdx.x / cuda::kWarp] = value;
    __syncthreads();
    double total = parts[0];
    for (int i = 1; i < static_cast<int>(blockDim.x) / cuda::kWarp; ++i) total += parts[i];
    return total;
}

// One block per group, whatever its size: threads take its tokens in turn.
__global__ void __launch_bounds__(1024) groups_kernel(PolicyLoss loss, Workspace workspace) {
    const Bounds rule = bounds_of(loss.rule);
    __shared__ double parts[cuda::kWarp];
    const PolicyGroups& shared = loss.groups;
    const PolicyTokens& in = loss.tokens;
    const bool paths = shared.level == PolicyLevel::path;
    const float scale = static_cast<float>(-1.0 / value_of(loss.rule.normalizer));
    for (int64_t group = blockIdx.x; group < shared.groups; group += gridDim.x) {
        const int64_t end = static_cast<int64_t>(workspace.bounds[2 * group + 1]);
        const int64_t first = loss.count - static_cast<int64_t>(workspace.bounds[2 * group]);
        double x = 0.0, count = 0.0, positive = 0.0, negative = 0.0, text = 0.0;
        for (int64_t t = first + threadIdx.x; t < end; t += blockDim.x) {
            Token token = {};
            token.weight = in.weight[t];
            if (token.weight == 0.0f || group_at(shared, t) != group) continue;
            const float logprob = in.logprob[t];
            x += logprob - in.old_logprob[t];
            count += 1.0;
            text += logprob;
            if (paths || !shared.mean_gradient) continue;
            const float factor = in.importance ? in.importance[t] : 1.0f;
            if (loss.pairs) {
                token.positive = in.advantage[2 * t] * factor;
                token.negative = in.advantage[2 * t + 1] * factor;
            } else {
                set_advantage(token, in.advantage[t], factor);
            }
            positive += token.positive;
            negative += token.negative;
        }
        x = block_total(x, parts);
        count = block_total(count, parts);
        if (paths) {
            text = block_total(text, parts);
            if (threadIdx.x == 0) workspace.segments[group] = {x, count, text};
            continue;
        }
        positive = block_total(positive, parts);
        negative = block_total(negative, parts);
        if (threadIdx.x == 0 && count > 0.0) {
            GroupRatio ratio = ratio_at(rule, static_cast<float>(x / count));
            const double slope = positive * ratio.above_slope + negative * ratio.below_slope;
            ratio.gradient = static_cast<float>(scale * slope / count);
            workspace.ratios[group] = ratio;
        }
    }
}

// The segment above s on its path, -1 above the root. What is no parent counts as misplaced and ends the path.
__device__ int64_t segment_above(const PolicyGroups& tree, int64_t s, unsigned long long* misplaced) {
    const int64_t parent = tree.parent[s];
    if (parent >= -1 && parent < s) return parent;
    if (misplaced) atomicMax(misplaced, 1ull);
    return -1;
}

// Each leaf's ratio over its path, its share of the sums, and the slope of each of its tokens.
__global__ void __launch_bounds__(kThreads) leaves_kernel(PolicyLoss loss, Workspace workspace) {
    const Bounds rule = bounds_of(loss.rule);
    const PolicyGroups& tree = loss.groups;
    double sums[kRows] = {};
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t l = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; l < tree.leaves; l += stride) {
        workspace.leaf_gradient[l] = 0.0;
        int64_t s = tree.leaf_segment[l];
        if (s < 0 || s >= tree.groups) {
            atomicMax(workspace.misplaced, 1ull);
            continue;
        }
        double x = 0.0, count = 0.0, text = 0.0;
        for (; s >= 0; s = segment_above(tree, s, workspace.misplaced)) {
            const SegmentSums segment = workspace.segments[s];
            x += segment.x;
            count += segment.count;
            text += segment.text;
        }
        const double weight = tree.leaf_weight ? tree.leaf_weight[l] : 1.0;
        if (!(count > 0.0) || weight == 0.0) continue;
        const double advantage = weight * tree.leaf_advantage[l];
        const double positive = advantage < 0.0 ? 0.0 : advantage, negative = advantage > 0.0 ? 0.0 : advantage;
        const GroupRatio ratio = ratio_at(rule, static_cast<float>(x / count));
        const double objective = positive * ratio.above + negative * ratio.below;
        sums[kObjective] += objective * (rule.clip == PolicyClip::cispo ? text : count);
        add_clip_sums(rule, ratio.r, weight * count, positive > 0.0, negative < 0.0, sums);
        workspace.leaf_gradient[l] = positive * ratio.above_slope + negative * ratio.below_slope;
    }
    store_partials(sums, workspace.partials, workspace.columns, workspace.token_blocks + blockIdx.x);
}

// A segment's gradient: the sum over the leaves below it, found by walking up from each.
__global__ void __launch_bounds__(kThreads) segments_kernel(PolicyLoss loss, Workspace workspace) {
    __shared__ double parts[cuda::kWarp];
    const PolicyGroups& tree = loss.groups;
    const float scale = static_cast<float>(-1.0 / value_of(loss.rule.normalizer));
    for (int64_t segment = blockIdx.x; segment < tree.groups; segment += gridDim.x) {
        if (threadIdx.x == 0) segment_above(tree, segment, workspace.misplaced);  // it may be on no path
        double gradient = 0.0;
        for (int64_t l = threadIdx.x; l < tree.leaves; l += kThreads) {
            int64_t s = tree.leaf_segment[l];
            if (s >= tree.groups) continue;
            while (s > segment) s = segment_above(tree, s, nullptr);
            if (s == segment) gradient += workspace.leaf_gradient[l];
        }
        gradient = block_total(gradient, parts);
        if (threadIdx.x == 0) {
            const float nan = kNan;
            workspace.ratios[segment] = {nan, nan, nan, nan, nan, static_cast<float>(scale * gradient)};
        }
    }
}

// Threads for a group of average size: a power of two, so that small turns do not wait for idle warps.
unsigned group_threads(int64_t tokens, int64_t groups) {
    unsigned threads = cuda::kWarp;
    while (threads < 1024 && threads * groups * 4 < tokens) threads *= 2;
    return threads;
}

}  // namespace
}  // namespace arpo
