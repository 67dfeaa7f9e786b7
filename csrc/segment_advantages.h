// From the advantages of leaves to those of the segments they share. Semantics: arpo_ext/ops/group_advantages.py.
//
// A kind of credit is a struct of float64 sums over what lies below one segment. Every backend adds in one order, the
// leaves of a segment ascending and then its children descending, so that results do not depend on timing.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace arpo {

// Codes as in arpo_ext/ops/group_advantages.py.
enum class Credit : int { mean = 0, turn = 1, prefix = 2 };

struct SegmentTree {
    const float* leaf;            // [L] advantages
    const float* leaf_weight;     // [L] or null: all 1
    const float* entropy;         // [S]; null but for turn credit
    const int64_t* subgroup;      // [L], 0 initial, else a branch; null but for prefix credit
    const int64_t* parent;        // [S], parent[s] in [-1, s)
    const int64_t* leaf_segment;  // [L], values in [0, S)
    int64_t leaves;               // L
    int64_t segments;             // S
};

// What a leaf brings to the segment it ends in.
struct LeafShare {
    float advantage;
    float weight;
    float entropy;  // of the segment
    bool branch;
};

ARPO_HOST_DEVICE inline LeafShare share_of(const SegmentTree& tree, int64_t l) {
    return {tree.leaf[l], tree.leaf_weight == nullptr ? 1.0f : tree.leaf_weight[l],
            tree.entropy == nullptr ? 0.0f : tree.entropy[tree.leaf_segment[l]],
            tree.subgroup != nullptr && tree.subgroup[l] != 0};
}

ARPO_HOST_DEVICE inline float entropy_of(const SegmentTree& tree, int64_t s) {
    return tree.entropy == nullptr ? 0.0f : tree.entropy[s];
}

// One credit for all the rows that share a segment: its value times the sum of their weights.
ARPO_HOST_DEVICE inline void store_shared(double value, double weight, float* segment, float* pair) {
    *segment = static_cast<float>(value);
    pair[0] = static_cast<float>(value <= 0.0 ? 0.0 : weight * value);
    pair[1] = static_cast<float>(value >= 0.0 ? 0.0 : weight * value);
}

// The mean over the leaves below, and the weighted sums of the positive and of the negative ones.
struct MeanCredit {
    double count = 0.0;
    double sum = 0.0;
    double positive = 0.0;
    double negative = 0.0;

    ARPO_HOST_DEVICE void add_leaf(const LeafShare& leaf) {
        const double advantage = leaf.advantage;
        const double weighted = leaf.weight * advantage;
        count += 1.0;
        sum += advantage;
        if (!(advantage <= 0.0)) positive += weighted;
        if (!(advantage >= 0.0)) negative += weighted;
    }

    ARPO_HOST_DEVICE void add_child(const MeanCredit& child, float) {
        count += child.count;
        sum += child.sum;
        positive += child.positive;
        negative += child.negative;
    }

    ARPO_HOST_DEVICE void store(float* segment, float* pair) const {
        *segment = count > 0.0 ? static_cast<float>(sum / count) : 0.0f;
        pair[0] = static_cast<float>(positive);
        pair[1] = static_cast<float>(negative);
    }
};

// The mean of the children's values, weighted by e^entropy of each child. A leaf that ends here counts as a child with
// the entropy of this segment. The weights are kept relative to the largest one met, e^top.
struct TurnCredit {
    double top = -INFINITY;
    double share = 0.0;
    double value = 0.0;
    double count = 0.0;
    double weight = 0.0;

    ARPO_HOST_DEVICE void add(double entropy, double worth) {
        if (!(entropy <= top)) {
            const double shrink = share > 0.0 ? exp(top - entropy) : 0.0;
            share *= shrink;
            value *= shrink;
            top = entropy;
        }
        const double relative = exp(entropy - top);
        share += relative;
        value += relative * worth;
    }

    ARPO_HOST_DEVICE void add_leaf(const LeafShare& leaf) {
        add(leaf.entropy, leaf.advantage);
        count += 1.0;
        weight += leaf.weight;
    }

    ARPO_HOST_DEVICE void add_child(const TurnCredit& child, float entropy) {
        if (child.count == 0.0) return;
        add(entropy, child.value / child.share);
        count += child.count;
        weight += child.weight;
    }

    ARPO_HOST_DEVICE void store(float* segment, float* pair) const {
        store_shared(count > 0.0 ? value / share : 0.0, weight, segment, pair);
    }
};

// Where an initial leaf is below: the mean over the initial leaves plus the mean over the branches. Elsewhere 0.
struct PrefixCredit {
    double initial = 0.0;
    double initial_sum = 0.0;
    double branches = 0.0;
    double branch_sum = 0.0;
    double weight = 0.0;

    ARPO_HOST_DEVICE void add_leaf(const LeafShare& leaf) {
        if (leaf.branch) {
            branches += 1.0;
            branch_sum += leaf.advantage;
        } else {
            initial += 1.0;
            initial_sum += leaf.advantage;
            weight += leaf.weight;
        }
    }

    ARPO_HOST_DEVICE void add_child(const PrefixCredit& child, float) {
        initial += child.initial;
        initial_sum += child.initial_sum;
        branches += child.branches;
        branch_sum += child.branch_sum;
        weight += child.weight;
    }

    ARPO_HOST_DEVICE void store(float* segment, float* pair) const {
        const double own = initial > 0.0 ? initial_sum / initial : 0.0;
        const double gained = initial > 0.0 && branches > 0.0 ? branch_sum / branches : 0.0;
        store_shared(own + gained, weight, segment, pair);
    }
};

// segment [S], pair [S, 2]. Throws std::invalid_argument on a bad parent or leaf segment.
void segment_advantages_cpu(Credit credit, const SegmentTree& tree, float* segment, float* pair);

// The same on a GPU: a leaf whose segment is out of range is left out, a segment whose parent is not smaller is a root.
// sums: workspace of segment_advantages_workspace(S) bytes.
int64_t segment_advantages_workspace(int64_t segments);
void segment_advantages_cuda(Credit credit, const SegmentTree& tree, float* segment, float* pair, void* sums,
                             int device, void* stream);

}  // namespace arpo
