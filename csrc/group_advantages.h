// Advantages of the leaves of rollout trees and of the segments above them. Semantics:
// arpo_ext/ops/group_advantages.py. Statistics are float64, taken relative to one reward of the tree, so that equal
// rewards deviate by exactly 0 and a large common offset costs no accuracy.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace arpo {

// Codes as in arpo_ext/ops/group_advantages.py.
enum class Estimator : int {
    grpo = 0,
    dr_grpo = 1,
    rloo = 2,
    none = 3,
    opo = 4,
    grpo_passk = 5,
    reinforce_pp_baseline = 6,
    tree_grpo = 7,
    tree_grpo_sum = 8,
    appo = 9,
    at2po = 10,
};

ARPO_HOST_DEVICE constexpr bool uses_subgroups(Estimator e) {
    return e == Estimator::tree_grpo || e == Estimator::tree_grpo_sum || e == Estimator::appo;
}

// Inputs of the leaf part. Leaves of equal tree form a group; of equal tree and subgroup, a subgroup.
struct GroupLeaves {
    const float* reward;      // [L]
    const int64_t* tree;      // [L], values in [0, L)
    const int64_t* subgroup;  // [L], values in [0, L); null unless uses_subgroups
    const int64_t* length;    // [L], at least 0; null: all 1. Read by opo and reinforce_pp_baseline
    int64_t leaves;           // L
};

// Sums over some leaves; `shift` is a reward among them, the same in all parts to be merged.
struct Moments {
    double shift = 0.0;
    double count = 0.0;
    double sum = 0.0;      // of (reward - shift)
    double square = 0.0;   // of (reward - shift)^2
    bool differs = false;  // some reward is not equal to shift; true also for NaN

    ARPO_HOST_DEVICE void add(float reward) {
        const double value = reward;
        const double offset = value - shift;
        count += 1.0;
        sum += offset;
        square += offset * offset;
        differs = differs || !(value == shift);
    }

    ARPO_HOST_DEVICE void merge(const Moments& other) {
        count += other.count;
        sum += other.sum;
        square += other.square;
        differs = differs || other.differs;
    }
};

// The two largest rewards, and the first leaf that has the largest.
struct BestTwo {
    float best = -INFINITY;
    float second = -INFINITY;
    int64_t leaf = INT64_MAX;

    ARPO_HOST_DEVICE void add(float reward, int64_t l) { merge({reward, -INFINITY, l}); }

    ARPO_HOST_DEVICE void merge(const BestTwo& other) {
        const bool theirs = other.best > best || (other.best == best && other.leaf < leaf);
        const float loser = theirs ? best : other.best;
        second = fmaxf(loser, fmaxf(second, other.second));
        if (theirs) {
            best = other.best;
            leaf = other.leaf;
        }
    }
};

// What an estimator needs to know of a tree, and of one subgroup in it.
struct TreeSums {
    Moments tree;
    Moments subgroup;
    double tokens = 0.0;  // sum of length
    double scored = 0.0;  // sum of length * (reward - tree.shift)
    BestTwo top;

    ARPO_HOST_DEVICE void merge(const TreeSums& other) {
        tree.merge(other.tree);
        subgroup.merge(other.subgroup);
        tokens += other.tokens;
        scored += other.scored;
        top.merge(other.top);
    }
};

ARPO_HOST_DEVICE inline double length_of(const GroupLeaves& in, int64_t l) {
    if (in.length == nullptr) return 1.0;
    return in.length[l] > 0 ? static_cast<double>(in.length[l]) : 0.0;
}

// Adds leaf l to what is kept of its tree; its subgroup's moments are the caller's.
ARPO_HOST_DEVICE inline void add_leaf(TreeSums& sums, Estimator estimator, const GroupLeaves& in, int64_t l) {
    const float reward = in.reward[l];
    sums.tree.add(reward);
    if (estimator == Estimator::opo) {
        const double length = length_of(in, l);
        sums.tokens += length;
        sums.scored += length * (static_cast<double>(reward) - sums.tree.shift);
    }
    if (estimator == Estimator::grpo_passk) sums.top.add(reward, l);
}

struct Statistics {
    double mean;
    double std;  // 0 for one leaf
    bool flat;   // one leaf, or all rewards equal
};

// ddof 1 is the unbiased standard deviation, 0 the biased one.
ARPO_HOST_DEVICE inline Statistics statistics_of(const Moments& m, double ddof) {
    if (!m.differs) return {m.shift, 0.0, true};
    const double offset = m.sum / m.count;
    // A reward that is NaN or infinite leaves no mean: the whole group becomes NaN, whichever leaf held it.
    if (!(fabs(offset) <= 1.7976931348623157e308)) return {NAN, NAN, false};
    const double spread = m.square - m.sum * offset;
    return {m.shift + offset, spread > 0.0 ? sqrt(spread / (m.count - ddof)) : 0.0, false};
}

// (reward - origin) * scale + bias; exactly 0 where scale is 0 and for every leaf but `only`, if that is not -1.
struct LeafRule {
    double origin = 0.0;
    double scale = 0.0;
    double bias = 0.0;
    int64_t only = -1;

    ARPO_HOST_DEVICE double operator()(float reward, int64_t l) const {
        if (scale == 0.0 || (only != -1 && only != l)) return 0.0;
        return (static_cast<double>(reward) - origin) * scale + bias;
    }
};

// For reinforce_pp_baseline the deviation from the tree's mean, which the batch then whitens.
ARPO_HOST_DEVICE inline LeafRule leaf_rule(Estimator estimator, const TreeSums& sums, double eps) {
    if (estimator == Estimator::none) return {0.0, 1.0};
    const Statistics tree = statistics_of(sums.tree, 1.0);
    const Statistics own = statistics_of(sums.subgroup, estimator == Estimator::appo ? 0.0 : 1.0);
    if (estimator != Estimator::appo && tree.mean != tree.mean) return {NAN, 1.0};
    if (tree.flat || (own.flat && (estimator == Estimator::tree_grpo || estimator == Estimator::appo))) return {};
    const double inverse = 1.0 / (tree.std + eps);
    switch (estimator) {
        case Estimator::rloo:  // reward - (count * mean - reward) / (count - 1)
            return {tree.mean, sums.tree.count / (sums.tree.count - 1.0)};
        case Estimator::opo:
            if (sums.tokens == 0.0) return {};
            return {sums.tree.shift + sums.scored / sums.tokens, 1.0};
        case Estimator::grpo_passk:
            return {sums.top.second, inverse, 0.0, sums.top.leaf};
        case Estimator::tree_grpo:
            // z = (reward - mean) * inverse has mean (own.mean - mean) * inverse and standard deviation own.std *
            // inverse over the subgroup.
            return {own.mean, 1.0 / (own.std + eps * (tree.std + eps))};
        case Estimator::tree_grpo_sum: {
            const double inner = own.flat ? 0.0 : 1.0 / (own.std + eps);
            // From the subgroup's mean: its spread may be tiny beside its distance from the tree's.
            return {own.mean, inverse + inner, (own.mean - tree.mean) * inverse};
        }
        case Estimator::appo:
            return {own.mean, 1.0 / (own.std + eps)};
        case Estimator::dr_grpo:
        case Estimator::reinforce_pp_baseline:
            return {tree.mean, 1.0};
        case Estimator::grpo:
        case Estimator::at2po:
        case Estimator::none:
            break;
    }
    return {tree.mean, inverse};
}

// Sums of the deviations of reinforce_pp_baseline over the leaves of all trees that have no NaN.
struct BatchSums {
    double tokens = 0.0;
    double sum = 0.0;
    double square = 0.0;

    ARPO_HOST_DEVICE void add(double deviation, double length) {
        if (deviation != deviation) return;
        tokens += length;
        sum += length * deviation;
        square += length * deviation * deviation;
    }

    ARPO_HOST_DEVICE void merge(const BatchSums& other) {
        tokens += other.tokens;
        sum += other.sum;
        square += other.square;
    }
};

// Whitens deviations: (deviation - origin) * scale.
ARPO_HOST_DEVICE inline LeafRule whitening(const BatchSums& sums, double eps) {
    const double mean = sums.tokens > 0.0 ? sums.sum / sums.tokens : 0.0;
    const double spread = sums.square - sums.sum * mean;
    if (!(spread > 0.0 && sums.tokens > 1.0)) return {};
    return {mean, 1.0 / (sqrt(spread / (sums.tokens - 1.0)) + eps)};
}

// flat: the deviation is 0 because its tree teaches nothing, and so stays 0 however the batch is centred.
ARPO_HOST_DEVICE inline float whitened(double deviation, bool flat, const LeafRule& rule) {
    if (deviation != deviation) return NAN;
    return flat ? 0.0f : static_cast<float>((deviation - rule.origin) * rule.scale);
}

// leaf [L]. Throws std::invalid_argument on a tree or subgroup outside [0, L) and on a negative length.
void group_advantages_cpu(Estimator estimator, double eps, const GroupLeaves& in, float* leaf, int threads);

// The same on a GPU: a leaf whose tree or subgroup is out of range gets 0. deviation [L] float64 is workspace, null
// unless the estimator is reinforce_pp_baseline.
void group_advantages_cuda(Estimator estimator, double eps, const GroupLeaves& in, float* leaf, double* deviation,
                           int device, void* stream);

}  // namespace arpo
