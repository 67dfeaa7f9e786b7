// Not yet measured.
//
// Token ratios: one kernel reads each input once (16 bytes a token) and writes the gradient once (4 bytes), a second of
// one block adds up the blocks' sums: 42 MB and 10 us for 256 x 8192 tokens at 4.3 TB/s. Sums run in an order that
// depends on the shape alone, never through atomics on floats, so equal inputs give equal bits.
//
// Ratios over groups are found before that: the first and last token of each group (integer atomics, at run ends only),
// then one block per group adds up its tokens between them. Groups that stand together cost two reads of the inputs;
// interleaved ones read what lies between as well. Packed paths add a kernel with a thread per leaf, which walks to the
// root, and one with a block per segment, which walks up from every leaf: S * L * depth steps.
#include <cmath>

#include "cuda_utils.cuh"
#include "policy_loss.h"

namespace arpo {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarp;
constexpr int kPack = 4;  // tokens a thread takes at once: 16 bytes of each input
constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kMaxGroupBlocks = 4096;
constexpr float kLogRatioBound = 20.0f;
// Rows of the partial sums: PolicyLossSum, then the objective.
constexpr int kObjective = kPolicyLossSums;
constexpr int kRows = kPolicyLossSums + 1;
constexpr float kNan = NAN;

// What a group's tokens have in common: its ratio, the sides there, and the gradient, if the group shares one.
struct GroupRatio {
    float r, above, above_slope, below, below_slope, gradient;
};

// Sums over a segment's tokens of nonzero weight.
struct SegmentSums {
    double x, count, text;
};

// The bounds of a clip in float32.
struct Bounds {
    PolicyClip clip;
    float low, high, dual, tau_positive, tau_negative;
};

Bounds bounds_of(const PolicyRule& rule) {
    return {rule.clip,
            static_cast<float>(1.0 - rule.clip_low),
            static_cast<float>(1.0 + rule.clip_high),
            static_cast<float>(rule.dual_clip),
            static_cast<float>(rule.tau_positive),
            static_cast<float>(rule.tau_negative)};
}

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

__device__ double value_of(const PolicyNumber& number) { return number.address ? *number.address : number.value; }

__device__ int64_t group_at(const PolicyGroups& shared, int64_t t) {
    return shared.wide ? static_cast<const int64_t*>(shared.group)[t] : static_cast<const int32_t*>(shared.group)[t];
}

// Comparisons are arranged so that NaN falls through.
__device__ float guarded(float x) {
    return x > kLogRatioBound ? kLogRatioBound : x < -kLogRatioBound ? -kLogRatioBound : x;
}

// e^v - 1 - v for |v| <= 20, without cancellation near 0; r is e^v.
__device__ float above_line(float v, float r) {
    if (!(fabsf(v) < 0.34f)) return r - 1.0f - v;
    float p = 1.9875691500e-4f;
    p = fmaf(p, v, 1.3981999507e-3f);
    p = fmaf(p, v, 8.3334519073e-3f);
    p = fmaf(p, v, 4.1665795894e-2f);
    p = fmaf(p, v, 1.6666665459e-1f);
    p = fmaf(p, v, 5.0000001201e-1f);
    return p * (v * v);
}

struct Sides {
    float above, above_slope, below, below_slope;
};

// 4 / tau * sigmoid(t) and its derivative in log r, with t = tau * (r - 1).
__device__ void soft_gate(float r, float tau, float& gate, float& slope) {
    const float t = tau * (r - 1.0f), e = expf(-fabsf(t)), inverse = 1.0f / (1.0f + e);
    gate = 4.0f / tau * (t < 0.0f ? e * inverse : inverse);
    slope = 4.0f * e * inverse * inverse * r;
}

__device__ Sides clip_sides(const Bounds& rule, float r) {
    Sides s;
    if (rule.clip == PolicyClip::sapo) {
        soft_gate(r, rule.tau_positive, s.above, s.above_slope);
        soft_gate(r, rule.tau_negative, s.below, s.below_slope);
        return s;
    }
    if (rule.clip == PolicyClip::cispo) {
        const float kept = r > rule.high ? rule.high : r < rule.low ? rule.low : r;
        return {kept, kept, kept, kept};
    }
    s.above = r > rule.high ? rule.high : r;
    s.above_slope = r > rule.high ? (rule.clip == PolicyClip::gppo ? rule.high : 0.0f) : r;
    s.below = r < rule.low ? rule.low : r > rule.dual ? rule.dual : r;
    s.below_slope = r < rule.low || r > rule.dual ? 0.0f : r;
    return s;
}

// The sides at a mean log ratio; no slope beyond the guard, except for cispo, whose ratio has none.
__device__ GroupRatio ratio_at(const Bounds& rule, float mean) {
    const float g = guarded(mean), r = expf(g);
    Sides s = clip_sides(rule, r);
    if (g != mean && rule.clip != PolicyClip::cispo) s.above_slope = s.below_slope = 0.0f;
    return {r, s.above, s.above_slope, s.below, s.below_slope, 0.0f};
}

struct Token {
    float weight, logprob, old_logprob, positive, negative, entropy, ref_logprob;
};

__device__ void set_advantage(Token& token, float a, float importance) {
    const float weighted = a * token.weight;
    token.positive = (weighted < 0.0f ? 0.0f : weighted) * importance;
    token.negative = (weighted > 0.0f ? 0.0f : weighted) * importance;
}

// Adjacent values at t, those at or beyond `count` 0.
__device__ void load_pack(const float* values, int64_t t, int64_t count, bool aligned, float (&out)[kPack]) {
    if (aligned && t + kPack <= count) {
        const cuda::Pack<float> pack = *reinterpret_cast<const cuda::Pack<float>*>(values + t);
#pragma unroll
        for (int i = 0; i < kPack; ++i) out[i] = pack.values[i];
    } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) out[i] = t + i < count ? values[t + i] : 0.0f;
    }
}

__device__ void store_pack(float* values, int64_t t, int64_t count, bool aligned, const float (&in)[kPack]) {
    if (aligned && t + kPack <= count) {
        cuda::Pack<float> pack;
#pragma unroll
        for (int i = 0; i < kPack; ++i) pack.values[i] = in[i];
        *reinterpret_cast<cuda::Pack<float>*>(values + t) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            if (t + i < count) values[t + i] = in[i];
        }
    }
}

// Four tokens at t, everything 0 where the weight is.
__device__ void load_tokens(const PolicyLoss& loss, int64_t t, bool aligned, Token (&tokens)[kPack]) {
    const PolicyTokens& in = loss.tokens;
    float weight[kPack], logprob[kPack], old[kPack], column[kPack], pairs[2][kPack], importance[kPack];
    load_pack(in.weight, t, loss.count, aligned, weight);
    load_pack(in.logprob, t, loss.count, aligned, logprob);
    load_pack(in.old_logprob, t, loss.count, aligned, old);
    if (in.importance) load_pack(in.importance, t, loss.count, aligned, importance);
    if (loss.groups.level != PolicyLevel::path) {
        load_pack(in.advantage, loss.pairs ? 2 * t : t, loss.pairs ? 2 * loss.count : loss.count, aligned, pairs[0]);
        if (loss.pairs) load_pack(in.advantage, 2 * t + kPack, 2 * loss.count, aligned, pairs[1]);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
        Token token = {};
        if (weight[i] != 0.0f) {
            token.weight = weight[i];
            token.logprob = logprob[i];
            token.old_logprob = old[i];
            const float factor = in.importance ? importance[i] : 1.0f;
            if (loss.pairs) {
                token.positive = pairs[i / 2][i % 2 * 2] * factor;
                token.negative = pairs[i / 2][i % 2 * 2 + 1] * factor;
            } else if (loss.groups.level != PolicyLevel::path) {
                set_advantage(token, pairs[0][i], factor);
            }
        }
        tokens[i] = token;
    }
    if (in.entropy) {
        load_pack(in.entropy, t, loss.count, aligned, column);
#pragma unroll
        for (int i = 0; i < kPack; ++i) tokens[i].entropy = weight[i] != 0.0f ? column[i] : 0.0f;
    }
    if (in.ref_logprob) {
        load_pack(in.ref_logprob, t, loss.count, aligned, column);
#pragma unroll
        for (int i = 0; i < kPack; ++i) tokens[i].ref_logprob = weight[i] != 0.0f ? column[i] : 0.0f;
    }
}

// Scales of the gradients: -1 / normalizer, kl_coef / normalizer.
struct Scales {
    float policy, kl;
};

// The clip sums of one ratio, of a token or of a leaf that counts `weight`.
template <class Number>
__device__ void add_clip_sums(const Bounds& rule, float r, Number weight, bool up, bool down, Number* sums) {
    sums[kSumRatio] += weight * r;
    sums[kMaxRatio] = cuda::max_or_nan(static_cast<float>(sums[kMaxRatio]), r);
    if (rule.clip == PolicyClip::sapo) return;
    const bool any = rule.clip == PolicyClip::cispo;
    if ((up || any) && r > rule.high) sums[kSumClippedHigh] += weight;
    if ((down || any) && r < rule.low) sums[kSumClippedLow] += weight;
    if (down && r > rule.dual) sums[kSumDualClipped] += weight;
}

// One token of nonzero weight into the sums; returns the gradient of its logprob.
__device__ float add_token(const PolicyLoss& loss, const Bounds& rule, const Token& token, const GroupRatio* group,
                           const Scales& scales, float* sums) {
    const PolicyKl kl = loss.rule.kl;
    const float w = token.weight, x = token.logprob - token.old_logprob, g = guarded(x), own = expf(g);
    float gradient = 0.0f;
    if (loss.groups.level != PolicyLevel::path) {
        const bool cispo = rule.clip == PolicyClip::cispo;
        const GroupRatio ratio = group ? *group : ratio_at(rule, x);
        const float objective = token.positive * ratio.above + token.negative * ratio.below;
        sums[kObjective] += cispo ? objective * token.logprob : objective;
        gradient = (token.positive * ratio.above_slope + token.negative * ratio.below_slope) * scales.policy;
        if (group && loss.groups.mean_gradient && !cispo) gradient = group->gradient;
        add_clip_sums(rule, ratio.r, w, token.positive > 0.0f, token.negative < 0.0f, sums);
    } else {
        gradient = group->gradient;
    }
    sums[kSumWeight] += w;
    sums[kSumTokens] += 1.0f;
    sums[kSumKlK1] -= w * x;
    sums[kSumKlK2] += 0.5f * w * x * x;
    sums[kSumKlK3] += g == x ? w * above_line(x, own) : w * (own - 1.0f - x);
    sums[kMaxLogRatio] = cuda::max_or_nan(sums[kMaxLogRatio], fabsf(x));
    if (loss.tokens.ref_logprob) {
        const float d = token.logprob - token.ref_logprob, bounded = guarded(d);
        const float k3 = above_line(-bounded, expf(-bounded));
        sums[kSumRefKlK1] += w * d;
        sums[kSumRefKlK2] += 0.5f * w * d * d;
        sums[kSumRefKlK3] += w * k3;
        if (kl == PolicyKl::k1) gradient += scales.kl * w;
        if (kl == PolicyKl::k2) gradient += scales.kl * w * d;
        if (kl == PolicyKl::k3 && bounded == d) gradient += scales.kl * w * (d - k3);
    }
    if (loss.tokens.entropy) sums[kSumEntropy] += w * token.entropy;
    return gradient;
}

__device__ bool is_max(int row) { return row == kMaxRatio || row == kMaxLogRatio; }

// The larger one; NaN if either is.
__device__ double larger(double a, double b) { return a > b || isnan(a) ? a : b; }

__device__ double warp_total(double value, bool largest) {
#pragma unroll
    for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) {
        const double other = __shfl_xor_sync(cuda::kAllLanes, value, offset);
        value = largest ? larger(value, other) : value + other;
    }
    return value;
}

// The block's sums to its column of the partial sums.
template <class Number>
__device__ void store_partials(const Number* sums, double* partials, int64_t columns, int64_t column) {
    __shared__ double parts[kRows][kWarps];
    const int warp = threadIdx.x / cuda::kWarp;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const double total = warp_total(sums[row], is_max(row));
        if (threadIdx.x % cuda::kWarp == 0) parts[row][warp] = total;
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
        const int row = threadIdx.x;
        double total = parts[row][0];
        for (int i = 1; i < kWarps; ++i) total = is_max(row) ? larger(total, parts[row][i]) : total + parts[row][i];
        partials[row * columns + column] = total;
    }
}

__global__ void __launch_bounds__(kThreads)
    tokens_kernel(PolicyLoss loss, Bounds rule, PolicyLossOutputs out, Workspace workspace, bool aligned) {
    const double normalizer = value_of(loss.rule.normalizer);
    const Scales scales = {static_cast<float>(-1.0 / normalizer),
                           static_cast<float>(value_of(loss.rule.kl_coef) / normalizer)};
    const float entropy_scale = static_cast<float>(-value_of(loss.rule.entropy_coef) / normalizer);
    const bool grouped = loss.groups.level != PolicyLevel::token;
    float sums[kRows] = {};
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPack;
    int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
    for (; t < loss.count; t += stride) {
        Token tokens[kPack];
        float gradient[kPack], entropy_gradient[kPack];
        load_tokens(loss, t, aligned, tokens);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            gradient[i] = 0.0f;
            entropy_gradient[i] = 0.0f;
            if (tokens[i].weight == 0.0f) continue;
            entropy_gradient[i] = entropy_scale * tokens[i].weight;
            GroupRatio ratio = {kNan, kNan, kNan, kNan, kNan, kNan};
            if (grouped) {
                const int64_t group = group_at(loss.groups, t + i);
                if (group >= 0 && group < loss.groups.groups) ratio = workspace.ratios[group];
            }
            gradient[i] = add_token(loss, rule, tokens[i], grouped ? &ratio : nullptr, scales, sums);
        }
        if (out.gradient) store_pack(out.gradient, t, loss.count, aligned, gradient);
        if (out.entropy_gradient) store_pack(out.entropy_gradient, t, loss.count, aligned, entropy_gradient);
    }
    store_partials(sums, workspace.partials, workspace.columns, blockIdx.x);
}

// One block: the totals of all columns, and the loss.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(PolicyRule rule, PolicyLossOutputs out, Workspace workspace) {
    __shared__ double totals[kRows];
    const int lane = threadIdx.x % cuda::kWarp;
    for (int row = threadIdx.x / cuda::kWarp; row < kRows; row += kWarps) {
        const double* partials = workspace.partials + row * workspace.columns;
        double total = 0.0;
        for (int64_t i = lane; i < workspace.columns; i += cuda::kWarp) {
            total = is_max(row) ? larger(total, partials[i]) : total + partials[i];
        }
        total = warp_total(total, is_max(row));
        if (lane == 0) totals[row] = total;
    }
    __syncthreads();
    if (threadIdx.x < kPolicyLossSums) {
        const int row = threadIdx.x;
        out.sums[row] = row == kSumClipped ? totals[kSumClippedHigh] + totals[kSumClippedLow] : totals[row];
    }
    if (threadIdx.x == 0) {
        double loss = -totals[kObjective];
        if (rule.kl != PolicyKl::none) {
            loss += value_of(rule.kl_coef) * totals[kSumRefKlK1 + static_cast<int>(rule.kl) - 1];
        }
        loss -= value_of(rule.entropy_coef) * totals[kSumEntropy];
        if (workspace.misplaced && *workspace.misplaced != 0) loss = kNan;
        *out.loss = static_cast<float>(loss / value_of(rule.normalizer));
    }
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
__global__ void __launch_bounds__(1024) groups_kernel(PolicyLoss loss, Bounds rule, Workspace workspace) {
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
__global__ void __launch_bounds__(kThreads) leaves_kernel(PolicyLoss loss, Bounds rule, Workspace workspace) {
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

// Whether every input and output allows 16-byte accesses.
bool all_aligned(const PolicyTokens& in, const PolicyLossOutputs& out) {
    std::uintptr_t bits = 0;
    for (const void* address : {static_cast<const void*>(in.logprob), static_cast<const void*>(in.old_logprob),
                                static_cast<const void*>(in.advantage), static_cast<const void*>(in.weight),
                                static_cast<const void*>(in.entropy), static_cast<const void*>(in.ref_logprob),
                                static_cast<const void*>(in.importance), static_cast<const void*>(out.gradient),
                                static_cast<const void*>(out.entropy_gradient)}) {
        bits |= reinterpret_cast<std::uintptr_t>(address);
    }
    return bits % 16 == 0;
}

// Threads for a group of average size: a power of two, so that small turns do not wait for idle warps.
unsigned group_threads(int64_t tokens, int64_t groups) {
    unsigned threads = cuda::kWarp;
    while (threads < 1024 && threads * groups * 4 < tokens) threads *= 2;
    return threads;
}

}  // namespace

int64_t policy_loss_workspace(const PolicyLoss& loss) { return workspace_of(loss, nullptr).bytes; }

void policy_loss_cuda(const PolicyLoss& loss, const PolicyLossOutputs& out, void* memory, int device, void* stream) {
    const Workspace workspace = workspace_of(loss, memory);
    const Bounds rule = bounds_of(loss.rule);
    const PolicyGroups& shared = loss.groups;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const auto launched = [] { cuda::check(cudaGetLastError(), "policy_loss"); };
    const cuda::DeviceGuard guard(device);
    if (shared.level != PolicyLevel::token) {
        const unsigned blocks = shared.groups < kMaxGroupBlocks ? shared.groups : kMaxGroupBlocks;
        const unsigned run_blocks = blocks_of(loss.count, kMaxGroupBlocks);
        cuda::check(cudaMemsetAsync(workspace.bounds, 0, (2 * shared.groups + 1) * 8, on), "policy_loss");
        bounds_kernel<<<run_blocks, kThreads, 0, on>>>(loss, workspace);
        launched();
        if (blocks > 0) {
            groups_kernel<<<blocks, group_threads(loss.count, shared.groups), 0, on>>>(loss, rule, workspace);
            launched();
        }
        if (shared.level == PolicyLevel::path) {
            const unsigned leaf_blocks = workspace.columns - workspace.token_blocks;
            leaves_kernel<<<leaf_blocks, kThreads, 0, on>>>(loss, rule, workspace);
            launched();
        }
        if (shared.level == PolicyLevel::path && blocks > 0) {
            segments_kernel<<<blocks, kThreads, 0, on>>>(loss, workspace);
            launched();
        }
    }
    const unsigned blocks = workspace.token_blocks;
    tokens_kernel<<<blocks, kThreads, 0, on>>>(loss, rule, out, workspace, all_aligned(loss.tokens, out));
    launched();
    finish_kernel<<<1, kThreads, 0, on>>>(loss.rule, out, workspace);
    launched();
}

}  // namespace arpo
