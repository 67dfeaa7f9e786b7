// Advantages of the leaves of rollout trees and of the segments above them. Semantics:
// arpo_ext/ops/group_advantages.py. Statistics are float64, taken relative to one reward of the tree, so that equal
// rewards deviate by exactly 0 and a large common offset costs no accuracy.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace arpo {

// Codes as in arpo_ext/ops/group_advantages.py.
enum class Estimator : int { grpo = 0, dr_grpo = 1, rloo = 2, none = 3 };

// Running sums over the leaves of one tree; `shift` is a reward of that tree, the same in all parts to be merged.
struct GroupSums {
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

    ARPO_HOST_DEVICE void merge(const GroupSums& other) {
        count += other.count;
        sum += other.sum;
        square += other.square;
        differs = differs || other.differs;
    }
};

// What an estimator needs to know of a tree.
struct GroupStatistics {
    double count;
    double mean;
    double std;  // unbiased; 0 for one leaf
    bool flat;   // one leaf, or all rewards equal
};

ARPO_HOST_DEVICE inline GroupStatistics group_statistics(const GroupSums& sums) {
    if (!sums.differs) return {sums.count, sums.shift, 0.0, true};
    const double offset = sums.sum / sums.count;
    // A reward that is NaN or infinite leaves no mean: the whole tree becomes NaN, whichever leaf held it.
    if (!(fabs(offset) <= 1.7976931348623157e308)) return {sums.count, NAN, NAN, false};
    const double spread = sums.square - sums.sum * offset;
    const double variance = spread > 0.0 ? spread / (sums.count - 1.0) : 0.0;
    return {sums.count, sums.shift + offset, sqrt(variance), false};
}

ARPO_HOST_DEVICE inline float leaf_advantage(Estimator estimator, const GroupStatistics& tree, float reward,
                                             double eps) {
    if (estimator == Estimator::none) return reward;
    if (tree.flat) return 0.0f;
    const double deviation = static_cast<double>(reward) - tree.mean;
    switch (estimator) {
        case Estimator::grpo:
            return static_cast<float>(deviation / (tree.std + eps));
        case Estimator::rloo:  // reward - (count * mean - reward) / (count - 1)
            return static_cast<float>(deviation * tree.count / (tree.count - 1.0));
        case Estimator::dr_grpo:
        case Estimator::none:
            break;
    }
    return static_cast<float>(deviation);
}

// Inputs of the attribution of L leaf advantages to S segments.
struct SegmentTree {
    const float* leaf;            // [L] advantages
    const float* leaf_weight;     // [L] or null: all 1
    const int64_t* parent;        // [S], parent[s] in [-1, s)
    const int64_t* leaf_segment;  // [L], values in [0, S)
    int64_t leaves;               // L
    int64_t segments;             // S
};

// What one leaf adds to every segment of its path.
struct SegmentTotals {
    double count = 0.0;
    double sum = 0.0;
    double positive = 0.0;
    double negative = 0.0;
};

ARPO_HOST_DEVICE inline SegmentTotals segment_share(const SegmentTree& tree, int64_t l) {
    const float advantage = tree.leaf[l];
    // Rounded to float32, so that float64 sums of shares are exact at ordinary magnitudes, in any order of addition.
    const float weighted = tree.leaf_weight == nullptr ? advantage : tree.leaf_weight[l] * advantage;
    return {1.0, advantage, advantage <= 0.0f ? 0.0 : weighted, advantage >= 0.0f ? 0.0 : weighted};
}

ARPO_HOST_DEVICE inline float segment_mean(const SegmentTotals& totals) {
    return totals.count > 0.0 ? static_cast<float>(totals.sum / totals.count) : 0.0f;
}

// leaf [L]. Throws std::invalid_argument on a tree index outside [0, L).
void group_advantages_cpu(Estimator estimator, double eps, const float* reward, const int64_t* tree, int64_t leaves,
                          float* leaf);
// segment [S], pair [S, 2]. Throws std::invalid_argument on a bad parent or leaf segment.
void segment_advantages_cpu(const SegmentTree& tree, float* segment, float* pair);

// The same on a GPU: a leaf whose tree index is out of range gets 0, one whose segment is out of range is left out,
// and a parent that is not smaller than its child ends the path.
void group_advantages_cuda(Estimator estimator, double eps, const float* reward, const int64_t* tree, int64_t leaves,
                           float* leaf, int device, void* stream);
// totals [S, 4] float64 is workspace.
void segment_advantages_cuda(const SegmentTree& tree, float* segment, float* pair, double* totals, int device,
                             void* stream);

}  // namespace arpo
