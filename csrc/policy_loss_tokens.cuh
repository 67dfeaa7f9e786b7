// Tokens of the policy loss on a GPU: the sides of a clip, four tokens a thread, and the sums of a block. Included by
// policy_loss_cuda.cu only.
#pragma once

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
constexpr float kLogRatioBound = 20.0f;
// Rows of the partial sums: PolicyLossSum, then the objective.
constexpr int kObjective = kPolicyLossSums;
constexpr int kRows = kPolicyLossSums + 1;
constexpr float kNan = NAN;

// What a group's tokens have in common: its ratio, the sides there, and the gradient, if the group shares one.
struct GroupRatio {
    float r, above, above_slope, below, below_slope, gradient;
};

// The bounds of a clip in float32.
struct Bounds {
    PolicyClip clip;
    float low, high, dual, tau_positive, tau_negative;
};

__device__ Bounds bounds_of(const PolicyRule& rule) {
    const double* given = rule.clip_numbers;
    const auto number = [&](int i, double value) { return given ? given[i] : value; };
    return {rule.clip,
            static_cast<float>(1.0 - number(0, rule.clip_low)),
            static_cast<float>(1.0 + number(1, rule.clip_high)),
            static_cast<float>(number(2, rule.dual_clip)),
            static_cast<float>(number(3, rule.tau_positive)),
            static_cast<float>(number(4, rule.tau_negative))};
}

__device__ double value_of(const PolicyNumber& number) { return number.address ? *number.address : number.value; }

// Comparisons are arranged so that NaN falls through.
__device__ float guarded(float x) {
    return x > kLogRatioBound ? kLogRatioBound : x < -kLogRatioBound ? -kLogRatioBound : x;
}
__device__ bool beyond_guard(float x) { return fabsf(x) > kLogRatioBound; }

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
    if (beyond_guard(mean) && rule.clip != PolicyClip::cispo) s.above_slope = s.below_slope = 0.0f;
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
        if (kl == PolicyKl::k3 && !beyond_guard(d)) gradient += scales.kl * w * (d - k3);
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

}  // namespace
}  // namespace arpo
