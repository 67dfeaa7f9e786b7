#include "group_advantages.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace arpo {
namespace {

[[noreturn]] void reject(const std::string& got, int64_t lowest, int64_t highest) {
    throw std::invalid_argument("group_advantages: got " + got + "; expected " + std::to_string(lowest) + " to " +
                                std::to_string(highest));
}

int64_t highest_tree(const int64_t* tree, int64_t leaves) {
    int64_t highest = -1;
    for (int64_t l = 0; l < leaves; ++l) {
        if (tree[l] < 0 || tree[l] >= leaves) {
            reject("tree index " + std::to_string(tree[l]) + " at leaf " + std::to_string(l), 0, leaves - 1);
        }
        highest = std::max(highest, tree[l]);
    }
    return highest;
}

void check_segments(const SegmentTree& tree) {
    for (int64_t s = 0; s < tree.segments; ++s) {
        if (tree.parent[s] < -1 || tree.parent[s] >= s) {
            reject("parent " + std::to_string(tree.parent[s]) + " of segment " + std::to_string(s), -1, s - 1);
        }
    }
    for (int64_t l = 0; l < tree.leaves; ++l) {
        if (tree.leaf_segment[l] < 0 || tree.leaf_segment[l] >= tree.segments) {
            reject("segment " + std::to_string(tree.leaf_segment[l]) + " of leaf " + std::to_string(l), 0,
                   tree.segments - 1);
        }
    }
}

void add(SegmentTotals& into, const SegmentTotals& from) {
    into.count += from.count;
    into.sum += from.sum;
    into.positive += from.positive;
    into.negative += from.negative;
}

}  // namespace

void group_advantages_cpu(Estimator estimator, double eps, const float* reward, const int64_t* tree, int64_t leaves,
                          float* leaf) {
    const size_t trees = static_cast<size_t>(highest_tree(tree, leaves) + 1);
    std::vector<GroupSums> sums(trees);
    for (int64_t l = 0; l < leaves; ++l) {
        GroupSums& group = sums[tree[l]];
        if (group.count == 0.0) group.shift = reward[l];
        group.add(reward[l]);
    }
    std::vector<GroupStatistics> statistics(trees);
    std::transform(sums.begin(), sums.end(), statistics.begin(), group_statistics);
    for (int64_t l = 0; l < leaves; ++l) {
        leaf[l] = leaf_advantage(estimator, statistics[tree[l]], reward[l], eps);
    }
}

void segment_advantages_cpu(const SegmentTree& tree, float* segment, float* pair) {
    check_segments(tree);
    std::vector<SegmentTotals> totals(static_cast<size_t>(tree.segments));
    for (int64_t l = 0; l < tree.leaves; ++l) add(totals[tree.leaf_segment[l]], segment_share(tree, l));
    // Children follow their parents, so every segment is complete before it is passed on.
    for (int64_t s = tree.segments - 1; s >= 0; --s) {
        if (tree.parent[s] >= 0) add(totals[tree.parent[s]], totals[s]);
        segment[s] = segment_mean(totals[s]);
        pair[2 * s] = static_cast<float>(totals[s].positive);
        pair[2 * s + 1] = static_cast<float>(totals[s].negative);
    }
}

}  // namespace arpo
