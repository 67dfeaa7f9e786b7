// Sixteen tokens at a time. Comparisons and selects are arranged so that NaN falls through to the arithmetic and shows
// in the loss.
#include "policy_loss.h"

#include "vec.h"

namespace arpo::ARPO_ISA {
namespace {

using std::int64_t;

constexpr float kLogRatioBound = 20.0f;
constexpr int kLanes = 16;
// float32 sums run over one block, float64 sums over the blocks of a part and over the parts. The number of parts is
// fixed, so that the result does not depend on the number of threads.
constexpr int64_t kBlock = 1024;
constexpr int kParts = 64;
constexpr int64_t kTokensPerThread = 16384;

struct Inputs {
    const float* logprob;
    const float* old_logprob;
    const float* advantage;
    const float* weight;

    Inputs from(int64_t t, bool pair) const {
        return {logprob + t, old_logprob + t, advantage + (pair ? 2 * t : t), weight + t};
    }
};

struct Bounds {
    float low;   // 1 - clip_low
    float high;  // 1 + clip_high
    float dual;
    float gradient_scale;  // -1 / normalizer
};

struct Totals {
    double objective = 0.0;
    double sums[kPolicyLossSums] = {};
    int64_t nan = 0;  // tokens whose log ratio is NaN
};

struct Ratio {
    F32x16 r;      // e^guarded
    F32x16 above;  // r - 1 - x, without cancellation where x is near 0
};

// Cephes' expf for |guarded| <= 20: guarded = n ln 2 + f, e^f = 1 + f + f^2 p(f). x is the same before guarding.
inline Ratio ratio_of(F32x16 guarded, F32x16 x) {
    // Adding 1.5 * 2^23 rounds to an integer; 127 more leaves n + 127 in the low bits, which shifted is 2^n.
    const F32x16 magic = F32x16::set(12582912.0f + 127.0f);
    const F32x16 biased = fma(guarded, F32x16::set(1.44269504f), magic);
    const F32x16 n = biased - magic;
    const F32x16 f = fma(n, F32x16::set(2.12194440e-4f), fma(n, F32x16::set(-0.693359375f), guarded));
    F32x16 p = F32x16::set(1.9875691500e-4f);
    p = fma(p, f, F32x16::set(1.3981999507e-3f));
    p = fma(p, f, F32x16::set(8.3334519073e-3f));
    p = fma(p, f, F32x16::set(4.1665795894e-2f));
    p = fma(p, f, F32x16::set(1.6666665459e-1f));
    p = fma(p, f, F32x16::set(5.0000001201e-1f));
    const F32x16 one = F32x16::set(1.0f);
    const F32x16 rest = p * (f * f);
    const F32x16 r = (rest + f + one) * shift_to_exponent(biased);
    return {r, choose(not_equal(n, F32x16::set(0.0f)), r - one - x, rest)};
}

// The two sides of a clip at ratio r: a token's objective is positive * above + negative * below, and the slopes are
// their derivatives with respect to log r. Another clip is another specialisation.
struct Sides {
    F32x16 above, above_slope, below, below_slope;
};

template <PolicyClip clip>
inline Sides clip_sides(F32x16 r, const Bounds& bounds) {
    const F32x16 zero = F32x16::set(0.0f), low = F32x16::set(bounds.low), high = F32x16::set(bounds.high);
    const Mask16 over = greater(r, high), under = greater(low, r);
    Sides s = {min(high, r), choose(over, zero, r), max(low, r), choose(under, zero, r)};
    if (clip == PolicyClip::dual) {
        const F32x16 dual = F32x16::set(bounds.dual);
        s.below = min(dual, s.below);
        s.below_slope = choose(greater(r, dual), zero, s.below_slope);
    }
    return s;
}

struct BlockSums {
    F32x16 objective, weight, high, low, dual, ratio, k1, k2, k3, ratio_max, log_ratio_max;
    int tokens, nan;
};

template <PolicyClip clip, bool pair, bool want_gradient>
inline void add_tokens(const Inputs& in, const Bounds& bounds, float* gradient, BlockSums& sums) {
    const F32x16 zero = F32x16::set(0.0f), bound = F32x16::set(kLogRatioBound);
    F32x16 w = load(in.weight);
    const Mask16 trained = not_equal(w, zero);
    const F32x16 x = keep(trained, load(in.logprob) - load(in.old_logprob));
    F32x16 positive, negative;
    if (pair) {
        load_pairs(in.advantage, positive, negative);
        positive = keep(trained, positive);
        negative = keep(trained, negative);
    } else {
        const F32x16 a = keep(trained, load(in.advantage) * w);
        positive = max(zero, a);
        negative = min(zero, a);
    }
    const F32x16 guarded = max(zero - bound, min(bound, x));
    const Ratio ratio = ratio_of(guarded, x);
    const F32x16 r = ratio.r;
    const Sides s = clip_sides<clip>(r, bounds);
    sums.objective = sums.objective + fma(positive, s.above, negative * s.below);
    if (want_gradient) {
        const F32x16 slope = fma(positive, s.above_slope, negative * s.below_slope);
        store(gradient, choose(not_equal(guarded, x), zero, slope * F32x16::set(bounds.gradient_scale)));
    }
    const Mask16 rising = greater(positive, zero), falling = greater(zero, negative);
    sums.weight = sums.weight + w;
    sums.high = sums.high + keep(both(rising, greater(r, F32x16::set(bounds.high))), w);
    sums.low = sums.low + keep(both(falling, greater(F32x16::set(bounds.low), r)), w);
    if (clip == PolicyClip::dual) sums.dual = sums.dual + keep(both(falling, greater(r, F32x16::set(bounds.dual))), w);
    sums.ratio = fma(w, r, sums.ratio);
    sums.k1 = sums.k1 - w * x;
    sums.k2 = fma(w * x, x, sums.k2);
    sums.k3 = fma(w, ratio.above, sums.k3);
    sums.ratio_max = max(sums.ratio_max, keep(trained, r));
    sums.log_ratio_max = max(sums.log_ratio_max, max(x, zero - x));
    sums.tokens += count(trained);
    sums.nan += count(not_equal(x, x));
}

void add_block(const BlockSums& block, Totals& totals) {
    double* sums = totals.sums;
    totals.objective += sum(block.objective);
    totals.nan += block.nan;
    sums[kSumWeight] += sum(block.weight);
    sums[kSumTokens] += block.tokens;
    sums[kSumClippedHigh] += sum(block.high);
    sums[kSumClippedLow] += sum(block.low);
    sums[kSumDualClipped] += sum(block.dual);
    sums[kSumRatio] += sum(block.ratio);
    sums[kSumKlK1] += sum(block.k1);
    sums[kSumKlK3] += sum(block.k3);
    sums[kSumKlK2] += 0.5 * sum(block.k2);
    const float ratio_max = largest(block.ratio_max), log_ratio_max = largest(block.log_ratio_max);
    if (ratio_max > sums[kMaxRatio]) sums[kMaxRatio] = ratio_max;
    if (log_ratio_max > sums[kMaxLogRatio]) sums[kMaxLogRatio] = log_ratio_max;
}

template <PolicyClip clip, bool pair, bool want_gradient>
void run_block(const Inputs& in, const Bounds& bounds, int64_t tokens, float* gradient, Totals& totals) {
    const F32x16 zero = F32x16::set(0.0f);
    BlockSums sums = {zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, 0, 0};
    int64_t t = 0;
    for (; t + kLanes <= tokens; t += kLanes) {
        add_tokens<clip, pair, want_gradient>(in.from(t, pair), bounds, gradient + t, sums);
    }
    if (t < tokens) {
        // The last tokens, padded with tokens of weight 0.
        float logprob[kLanes] = {}, old_logprob[kLanes] = {}, advantage[2 * kLanes] = {}, weight[kLanes] = {};
        float padded_gradient[kLanes];
        const Inputs rest = in.from(t, pair);
        const std::size_t left = static_cast<std::size_t>(tokens - t) * sizeof(float);
        std::memcpy(logprob, rest.logprob, left);
        std::memcpy(old_logprob, rest.old_logprob, left);
        std::memcpy(advantage, rest.advantage, pair ? 2 * left : left);
        std::memcpy(weight, rest.weight, left);
        const Inputs padded = {logprob, old_logprob, advantage, weight};
        add_tokens<clip, pair, want_gradient>(padded, bounds, padded_gradient, sums);
        if (want_gradient) std::memcpy(gradient + t, padded_gradient, left);
    }
    add_block(sums, totals);
}

void merge(Totals& into, const Totals& from) {
    into.objective += from.objective;
    into.nan += from.nan;
    for (int i = 0; i < kPolicyLossSums; ++i) {
        if (i == kMaxRatio || i == kMaxLogRatio) {
            if (from.sums[i] > into.sums[i]) into.sums[i] = from.sums[i];
        } else {
            into.sums[i] += from.sums[i];
        }
    }
}

using BlockFunction = void (*)(const Inputs&, const Bounds&, int64_t, float*, Totals&);

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
                           static_cast<float>(args.dual_clip), static_cast<float>(-1.0 / normalizer)};
    const Inputs in = {args.logprob, args.old_logprob, args.advantage, args.weight};
    const BlockFunction run = block_function(args);

    Totals parts[kParts];
    const int64_t blocks = (args.tokens + kBlock - 1) / kBlock;
    const int64_t useful = args.tokens / kTokensPerThread + 1;
    const int threads = static_cast<int>(useful < args.threads ? useful : args.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int p = 0; p < kParts; ++p) {
        for (int64_t b = blocks * p / kParts; b < blocks * (p + 1) / kParts; ++b) {
            const int64_t begin = b * kBlock, left = args.tokens - begin;
            float* gradient = args.gradient ? args.gradient + begin : nullptr;
            run(in.from(begin, args.advantage_is_pair), bounds, left < kBlock ? left : kBlock, gradient, parts[p]);
        }
    }

    Totals total;
    for (const Totals& part : parts) merge(total, part);
    total.sums[kSumClipped] = total.sums[kSumClippedHigh] + total.sums[kSumClippedLow];
    if (total.nan > 0) total.sums[kMaxRatio] = total.sums[kMaxLogRatio] = __builtin_nan("");
    *args.loss = static_cast<float>(-total.objective / normalizer);
    for (int i = 0; i < kPolicyLossSums; ++i) args.sums[i] = total.sums[i];
}

}  // namespace arpo::ARPO_ISA
