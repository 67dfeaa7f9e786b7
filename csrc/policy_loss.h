// The clipped policy loss over tokens: loss, gradient and every metric in one pass. Definitions:
// arpo_ext/ops/policy_loss.py.
#pragma once

#include <cstdint>

#include "isa.h"

namespace arpo {

// Codes as in arpo_ext/ops/policy_loss.py.
enum class PolicyClip : int { ppo = 0, dual = 1 };

// Order of PolicyLossSums in arpo_ext/ops/policy_loss.py.
enum PolicyLossSum : int {
    kSumWeight,
    kSumTokens,
    kSumClipped,
    kSumClippedHigh,
    kSumClippedLow,
    kSumDualClipped,
    kSumRatio,
    kMaxRatio,
    kSumKlK1,
    kSumKlK3,
    kMaxLogRatio,
    kSumKlK2,
    kSumRefKlK1,
    kSumRefKlK2,
    kSumRefKlK3,
    kSumEntropy,
    kPolicyLossSums
};

struct PolicyLoss {
    const float* logprob;      // [N]
    const float* old_logprob;  // [N]
    const float* advantage;    // [N], or [N, 2]: weighted sums of the positive and of the negative advantages
    bool advantage_is_pair;
    const float* weight;       // [N]; where it is 0 nothing else of the token counts
    std::int64_t tokens;       // N
    const double* normalizer;  // one number, or null: `normalizer_value`
    double normalizer_value;
    PolicyClip clip;
    double clip_low;
    double clip_high;
    double dual_clip;
    float* loss;      // one number
    double* sums;     // [kPolicyLossSums]
    float* gradient;  // [N], or null: not wanted
    int threads;
};

ARPO_CPU_KERNEL(policy_loss_forward, PolicyLoss)

}  // namespace arpo
