// Plain loops that the compiler turns into vector code for each instruction set: every choice is a select, never a
// branch. Comparisons are written so that NaN falls through to the arithmetic and shows in the loss.
#include "policy_loss.h"

#include <cstring>

namespace arpo::ARPO_ISA {
namespace {

using std::int64_t;

constexpr float kLogRatioBound = 20.0f;
// float32 sums run over one block, float64 sums over the blocks of a part and over the parts. The number of parts is
// fixed, so that the result does not depend on the number of threads.
constexpr int64_t kBlock = 1024;
constexpr int kParts = 64;
constexpr int64_t kTokensPerThread = 16384;

struct Exp {
    float value;  // e^x
    float above;  // e^x - 1 - x without cancellation
};

// Cephes' expf for |x| <= 20: x = n ln 2 + f, e^f = 1 + f + f^2 p(f).
inline Exp exp_and_above(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    const float rest = p * f * f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float value = (rest + f + 1.0f) * power;
    return {value, n == 0.0f ? rest : value - 1.0f - x};
}

// The two sides of a clip at ratio r: a token's objective is positive * above + negative * below, with
// d(above)/d(log r) = above_slope and so on. Another clip is another such function.
struct Sides {
    float above;
    float above_slope;
    float below;
    float below_slope;
};

struct Bounds {
    float low;   // 1 - clip_low
    float high;  // 1 + clip_high
    float dual;
};

template <PolicyClip clip>
inline Sides clip_sides(float r, const Bounds& bounds) {
    const bool over = r > bounds.high;
    const bool under = r < bounds.low;
    Sides s = {over ? bounds.high : r, over ? 0.0f : r, under ? bounds.low : r, under ? 0.0f : r};
    if (clip == PolicyClip::dual) {
        const bool far = r > bounds.dual;
        s.below = far ? bounds.dual : s.below;
        s.below_slope = far ? 0.0f : s.below_slope;
    }
    return s;
}

struct Totals {
    double objective = 0.0;
    double sums[kPolicyLossSums] = {};
    bool nan = false;
};

template <PolicyClip clip, bool pair, bool want_gradient>
void run_block(const PolicyLoss& args, const Bounds& bounds, float scale, int64_t begin, int64_t end, Totals& totals) {
    const float* __restrict logprob = args.logprob;
    const float* __restrict old_logprob = args.old_logprob;
    const float* __restrict advantage = args.advantage;
    const float* __restrict weight = args.weight;
    float* __restrict gradient = args.gradient;
    float objective = 0, weights = 0, tokens = 0, high = 0, low = 0, dual = 0, ratios = 0, k1 = 0, k3 = 0;
    float ratio_max = 0, log_ratio_max = 0;
    int nan = 0;
#pragma omp simd reduction(+ : objective, weights, tokens, high, low, dual, ratios, k1, k3) \
    reduction(max : ratio_max, log_ratio_max) reduction(| : nan)
    for (int64_t t = begin; t < end; ++t) {
        const float w = weight[t];
        const bool trained = w != 0.0f;
        const float x_read = logprob[t] - old_logprob[t];
        const float x = trained ? x_read : 0.0f;
        float positive, negative;
        if (pair) {
            const float positive_read = advantage[2 * t], negative_read = advantage[2 * t + 1];
            positive = trained ? positive_read : 0.0f;
            negative = trained ? negative_read : 0.0f;
        } else {
            const float a_read = advantage[t] * w;
            const float a = trained ? a_read : 0.0f;
            positive = a <= 0.0f ? 0.0f : a;
            negative = a >= 0.0f ? 0.0f : a;
        }
        const bool beyond = (x > kLogRatioBound) | (x < -kLogRatioBound);
        const float guarded = x > kLogRatioBound ? kLogRatioBound : x < -kLogRatioBound ? -kLogRatioBound : x;
        const Exp e = exp_and_above(guarded);
        const float r = e.value;
        const Sides s = clip_sides<clip>(r, bounds);
        objective += positive * s.above + negative * s.below;
        if (want_gradient) {
            const float slope = positive * s.above_slope + negative * s.below_slope;
            gradient[t] = beyond ? 0.0f : slope * scale;
        }
        const float size = x < 0.0f ? -x : x;
        const float r_seen = trained ? r : 0.0f;
        weights += w;
        tokens += trained ? 1.0f : 0.0f;
        high += (positive > 0.0f) & (r > bounds.high) ? w : 0.0f;
        low += (negative < 0.0f) & (r < bounds.low) ? w : 0.0f;
        if (clip == PolicyClip::dual) dual += (negative < 0.0f) & (r > bounds.dual) ? w : 0.0f;
        ratios += w * r_seen;
        k1 -= w * x;
        k3 += w * (beyond ? r - 1.0f - x : e.above);
        ratio_max = r_seen > ratio_max ? r_seen : ratio_max;
        log_ratio_max = size > log_ratio_max ? size : log_ratio_max;
        nan |= x != x ? 1 : 0;
    }
    double* sums = totals.sums;
    totals.objective += objective;
    totals.nan = totals.nan || nan != 0;
    sums[kSumWeight] += weights;
    sums[kSumTokens] += tokens;
    sums[kSumClippedHigh] += high;
    sums[kSumClippedLow] += low;
    sums[kSumDualClipped] += dual;
    sums[kSumRatio] += ratios;
    sums[kSumKlK1] += k1;
    sums[kSumKlK3] += k3;
    if (ratio_max > sums[kMaxRatio]) sums[kMaxRatio] = ratio_max;
    if (log_ratio_max > sums[kMaxLogRatio]) sums[kMaxLogRatio] = log_ratio_max;
}

void merge(Totals& into, const Totals& from) {
    into.objective += from.objective;
    into.nan = into.nan || from.nan;
    for (int i = 0; i < kPolicyLossSums; ++i) {
        if (i == kMaxRatio || i == kMaxLogRatio) {
            if (from.sums[i] > into.sums[i]) into.sums[i] = from.sums[i];
        } else {
            into.sums[i] += from.sums[i];
        }
    }
}

using BlockFunction = void (*)(const PolicyLoss&, const Bounds&, float, int64_t, int64_t, Totals&);

template <PolicyClip clip>
BlockFunction block_function(const PolicyLoss& args) {
    if (args.advantage_is_pair) return args.gradient ? run_block<clip, true, true> : run_block<clip, true, false>;
    return args.gradient ? run_block<clip, false, true> : run_block<clip, false, false>;
}

BlockFunction block_function(const PolicyLoss& args) {
    switch (args.clip) {
        case PolicyClip::dual: return block_function<PolicyClip::dual>(args);
        case PolicyClip::ppo: break;
    }
    return block_function<PolicyClip::ppo>(args);
}

}  // namespace

void policy_loss_forward(const PolicyLoss& args) {
    const double normalizer = args.normalizer ? *args.normalizer : args.normalizer_value;
    const Bounds bounds = {static_cast<float>(1.0 - args.clip_low), static_cast<float>(1.0 + args.clip_high),
                           static_cast<float>(args.dual_clip)};
    const float scale = static_cast<float>(-1.0 / normalizer);
    const BlockFunction run = block_function(args);

    Totals parts[kParts];
    const int64_t blocks = (args.tokens + kBlock - 1) / kBlock;
    const int64_t useful = (args.tokens + kTokensPerThread - 1) / kTokensPerThread;
    const int threads = static_cast<int>(useful < args.threads ? (useful < 1 ? 1 : useful) : args.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < kParts; ++p) {
        for (int64_t b = blocks * p / kParts; b < blocks * (p + 1) / kParts; ++b) {
            const int64_t end = (b + 1) * kBlock;
            run(args, bounds, scale, b * kBlock, end < args.tokens ? end : args.tokens, parts[p]);
        }
    }

    Totals total;
    for (const Totals& part : parts) merge(total, part);
    total.sums[kSumClipped] = total.sums[kSumClippedHigh] + total.sums[kSumClippedLow];
    if (total.nan) total.sums[kMaxRatio] = total.sums[kMaxLogRatio] = __builtin_nan("");
    *args.loss = static_cast<float>(-total.objective / normalizer);
    for (int i = 0; i < kPolicyLossSums; ++i) args.sums[i] = total.sums[i];
}

}  // namespace arpo::ARPO_ISA
