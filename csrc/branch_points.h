// Where a rollout path wants to branch, and how scarce room is shared. Semantics: arpo_ext/ops/branch_points.py.
//
// The wish is computed by one inline function on every backend. It is exact integer arithmetic and float32 operations
// that are rounded one by one, never contracted to fused multiply-adds, so that all backends decide alike.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace arpo {

// Codes as in arpo_ext/ops/branch_points.py.
enum class BranchPolicy : int { paper = 0, random = 1, chain = 2, reference = 3, aepo = 4, at2po = 5, appo = 6 };

struct BranchRule {
    BranchPolicy policy;
    float base;
    float weight;
    float threshold;
    float penalty;
    int32_t width;
    uint64_t seed;
};

// The inputs of L paths in T trees. `room` is read by branch_points only, a pointer that the policy does not read may be
// null.
struct BranchPaths {
    const float* entropy_now;   // [L]
    const float* entropy_root;  // [L]
    const int64_t* tree;        // [L], values in [0, T)
    const int32_t* room;        // [T]
    const int64_t* key;         // [L]
    const int32_t* turn;        // [L]
    const int32_t* streak;      // [L], read by aepo
    const int32_t* siblings;    // [L], read by at2po
    const float* value;         // [L], read by appo
    int64_t paths;              // L
    int64_t trees;              // T
};

struct BranchWish {
    float score;
    int32_t children;
};

// float32 sum and product with exactly one rounding. The host file is compiled without contraction (CMakeLists.txt).
ARPO_HOST_DEVICE inline float add_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

ARPO_HOST_DEVICE inline float multiply_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// One step of splitmix64 (Steele, Lea and Flood 2014): add the golden ratio, then mix.
ARPO_HOST_DEVICE inline uint64_t splitmix64(uint64_t state) {
    state += 0x9E3779B97F4A7C15ull;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    return state ^ (state >> 31);
}

// A draw in [0, 1) with 24 random bits, a function of its arguments alone.
ARPO_HOST_DEVICE inline float branch_draw(uint64_t seed, int64_t tree, int64_t key, int32_t turn) {
    uint64_t state = splitmix64(seed);
    state = splitmix64(state ^ static_cast<uint64_t>(tree));
    state = splitmix64(state ^ static_cast<uint64_t>(key));
    state = splitmix64(state ^ static_cast<uint64_t>(static_cast<int64_t>(turn)));
    return static_cast<float>(state >> 40) * 0x1p-24f;
}

// Into [0, 1]; NaN stays NaN.
ARPO_HOST_DEVICE inline float unit_clamped(float x) { return x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x); }

// weight * (now - root).
ARPO_HOST_DEVICE inline float weighted_change(const BranchRule& rule, const BranchPaths& paths, int64_t i) {
    return multiply_rounded(rule.weight, add_rounded(paths.entropy_now[i], -paths.entropy_root[i]));
}

ARPO_HOST_DEVICE inline float branch_draw(const BranchRule& rule, const BranchPaths& paths, int64_t i) {
    return branch_draw(rule.seed, paths.tree[i], paths.key[i], paths.turn[i]);
}

ARPO_HOST_DEVICE inline BranchWish branch_wish(const BranchRule& rule, const BranchPaths& paths, int64_t i) {
    float score = 0.0f;
    bool wishes = false;
    switch (rule.policy) {
        case BranchPolicy::paper:
            score = add_rounded(rule.base, weighted_change(rule, paths, i));
            wishes = score > rule.threshold;
            break;
        case BranchPolicy::random: {
            const float draw = branch_draw(rule, paths, i);
            score = add_rounded(rule.base, -draw);
            wishes = draw < rule.base;
            break;
        }
        case BranchPolicy::reference: {
            const float x = unit_clamped(add_rounded(branch_draw(rule, paths, i), -weighted_change(rule, paths, i)));
            score = add_rounded(rule.base, -x);
            wishes = x <= rule.base;
            break;
        }
        case BranchPolicy::aepo: {
            const float penalty = unit_clamped(multiply_rounded(rule.penalty, static_cast<float>(paths.streak[i])));
            score = multiply_rounded(add_rounded(rule.base, weighted_change(rule, paths, i)),
                                     add_rounded(1.0f, -penalty));
            wishes = score > rule.threshold;
            break;
        }
        case BranchPolicy::at2po:
            score = add_rounded(paths.entropy_now[i],
                                -multiply_rounded(rule.weight, static_cast<float>(paths.siblings[i])));
            wishes = add_rounded(score, -score) == 0.0f;  // finite
            break;
        case BranchPolicy::appo:
            score = multiply_rounded(paths.entropy_now[i], paths.value[i]);
            wishes = paths.entropy_now[i] > 0.0f && paths.value[i] > 0.0f && score > 0.0f;
            break;
        case BranchPolicy::chain:
            break;
    }
    return {score, wishes ? rule.width : 0};
}

// Whether path a is served before path b of the same tree.
ARPO_HOST_DEVICE inline bool branch_precedes(float score_a, int64_t key_a, int64_t a, float score_b, int64_t key_b,
                                             int64_t b) {
    if (score_a != score_b) return score_a > score_b;
    if (key_a != key_b) return key_a < key_b;
    return a < b;
}

// What a path gets when the paths before it wished for `before` children in all.
ARPO_HOST_DEVICE inline int32_t branch_granted(int32_t room, int64_t before, int32_t wish) {
    const int64_t left = static_cast<int64_t>(room) - before;
    if (left <= 0) return 0;
    return left < wish ? static_cast<int32_t>(left) : wish;
}

// score [L], wish [L].
void branch_scores_cpu(const BranchRule& rule, const BranchPaths& paths, float* score, int32_t* wish);
// children [L]. Throws std::invalid_argument on a tree index out of range.
void branch_points_cpu(const BranchRule& rule, const BranchPaths& paths, int32_t* children);

// The same on a GPU; paths whose tree index is out of range get no children.
void branch_scores_cuda(const BranchRule& rule, const BranchPaths& paths, float* score, int32_t* wish, int device,
                        void* stream);
void branch_points_cuda(const BranchRule& rule, const BranchPaths& paths, int32_t* children, int device, void* stream);

}  // namespace arpo
