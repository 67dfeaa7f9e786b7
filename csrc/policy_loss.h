// The policy loss over tokens: loss, gradients and every metric in one pass, or in two where ratios span groups of
// tokens. Definitions: arpo_ext/ops/policy_loss.py.
#pragma once

#include <cstdint>

#include "isa.h"

namespace arpo {

// Codes as in arpo_ext/ops/_policy_loss_op.py. The clip "dual" is ppo with a finite dual_clip.
enum class PolicyClip : int { ppo, gppo, cispo, sapo };
enum class PolicyKl : int { none, k1, k2, k3 };
// Where the ratio of a token comes from: its own, its group's, or that of the paths it is on, which only leaves know.
enum class PolicyLevel : int { token, group, path };

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

// A number given as such, or as the address of one on the kernel's device.
struct PolicyNumber {
    const double* address;
    double value;
};

// What each token brings: [N], or null where the caller gave none.
struct PolicyTokens {
    const float* logprob;
    const float* old_logprob;
    const float* advantage;  // [N, 2] if they are pairs; not read for packed paths
    const float* weight;     // where it is 0 nothing else of the token counts
    const float* entropy;
    const float* ref_logprob;
    const float* importance;
};

// Which tokens share a ratio. At level group: those of one group[N], int32 or int64 in [0, groups). At level path groups
// are segments, and each of the leaves has a ratio over the segments on its path to the root. Addresses do not tell the
// level: those of arrays without elements are null.
struct PolicyGroups {
    PolicyLevel level;
    const void* group;
    bool wide;  // int64
    std::int64_t groups;
    bool mean_gradient;  // the gradient of a mean, not each token's own
    const std::int64_t* parent;
    const std::int64_t* leaf_segment;
    const float* leaf_weight;  // [leaves] or null: all 1
    const float* leaf_advantage;
    std::int64_t leaves;
};

struct PolicyRule {
    PolicyClip clip;
    double clip_low;
    double clip_high;
    double dual_clip;  // inf: none
    double tau_positive;
    double tau_negative;
    const double* clip_numbers;  // null, or on the kernel's device the five before, which then count
    PolicyKl kl;
    PolicyNumber normalizer;
    PolicyNumber kl_coef;
    PolicyNumber entropy_coef;
};

struct PolicyLoss {
    PolicyTokens tokens;
    std::int64_t count;  // N
    bool pairs;
    PolicyGroups groups;
    PolicyRule rule;
};

struct PolicyLossOutputs {
    float* loss;              // one number
    double* sums;             // [kPolicyLossSums]
    float* gradient;          // [N], or null: not wanted
    float* entropy_gradient;  // [N], or null: not wanted
};

struct PolicyLossOnCpu {
    PolicyLoss loss;
    PolicyLossOutputs out;
    int threads;
    std::int64_t* misplaced;  // first token of nonzero weight whose group is out of range; else -1
};

ARPO_CPU_KERNEL(policy_loss_forward, PolicyLossOnCpu)

// The same on a GPU, where an index out of range makes the loss NaN. The workspace, of policy_loss_workspace bytes and
// 16-byte alignment, need not be initialised.
std::int64_t policy_loss_workspace(const PolicyLoss& loss);
void policy_loss_cuda(const PolicyLoss& loss, const PolicyLossOutputs& out, void* workspace, int device, void* stream);

}  // namespace arpo
