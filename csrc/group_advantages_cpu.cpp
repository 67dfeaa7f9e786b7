// 12 bytes read and 4 written per leaf, all from the cache at ordinary sizes: the floor is the arithmetic, about four
// additions, one product and four conversions a leaf.
//
// Leaves of a tree that stand together, in any order of the trees, are a range: its sums stay in registers and its
// advantages are written while its rewards are still in the first cache. Scattered leaves take two passes in the order
// of memory, with sums kept by tree; those of subgroups are sorted by counting.
#include "group_advantages.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "check.h"

namespace arpo {
namespace {

constexpr int64_t kLeavesPerThread = 16384;

void check_index(const char* name, const int64_t* index, int64_t l, int64_t leaves) {
    ARPO_CHECK(index[l] >= 0 && index[l] < leaves, "group_advantages: got ", name, " index ", index[l], " at leaf ", l,
               "; expected 0 to ", leaves - 1);
}

void check_indices(const char* name, const int64_t* index, int64_t leaves) {
    for (int64_t l = 0; l < leaves; ++l) check_index(name, index, l, leaves);
}

void check_lengths(const int64_t* length, int64_t leaves) {
    for (int64_t l = 0; l < leaves; ++l) {
        ARPO_CHECK(length[l] >= 0, "group_advantages: got length ", length[l], " of leaf ", l,
                   "; expected at least 0");
    }
}

// The leaves of one tree after another: order[begin[k]] to order[begin[k + 1] - 1]; no order: the leaves themselves.
struct Ranges {
    std::vector<int64_t> begin;
    std::vector<int64_t> order;

    int64_t size() const { return static_cast<int64_t>(begin.size()) - 1; }
};

// Stable: `order` sorted by key, whose values are in [0, keys).
std::vector<int64_t> sorted_by(const int64_t* key, int64_t keys, const std::vector<int64_t>& order) {
    std::vector<int64_t> next(static_cast<size_t>(keys) + 1);
    for (int64_t l : order) ++next[key[l] + 1];
    for (int64_t k = 0; k < keys; ++k) next[k + 1] += next[k];
    std::vector<int64_t> sorted(order.size());
    for (int64_t l : order) sorted[next[key[l]]++] = l;
    return sorted;
}

// Whether the leaves of every tree stand together; `begin` then holds where each starts, and the indices are checked.
bool contiguous(const int64_t* tree, int64_t leaves, std::vector<int64_t>& begin) {
    std::vector<bool> met(static_cast<size_t>(leaves));
    for (int64_t l = 0; l < leaves; ++l) {
        if (l > 0 && tree[l] == tree[l - 1]) continue;
        check_index("tree", tree, l, leaves);
        if (met[tree[l]]) return false;
        met[tree[l]] = true;
        begin.push_back(l);
    }
    begin.push_back(leaves);
    return true;
}

// The leaves sorted by tree, and those of a tree by subgroup if there are any.
Ranges sorted_ranges(const GroupLeaves& in, const int64_t* subgroup) {
    check_indices("tree", in.tree, in.leaves);
    Ranges ranges;
    std::vector<int64_t> order(static_cast<size_t>(in.leaves));
    for (int64_t l = 0; l < in.leaves; ++l) order[l] = l;
    if (subgroup != nullptr) order = sorted_by(subgroup, in.leaves, order);
    ranges.order = sorted_by(in.tree, in.leaves, order);
    for (int64_t i = 0; i < in.leaves; ++i) {
        if (i == 0 || in.tree[ranges.order[i]] != in.tree[ranges.order[i - 1]]) ranges.begin.push_back(i);
    }
    ranges.begin.push_back(in.leaves);
    return ranges;
}

// Four sums side by side, since one waits for the addition before it.
Moments moments_of(const float* reward, int64_t count) {
    constexpr int kLanes = 4;
    Moments moments;
    moments.shift = reward[0];
    moments.count = static_cast<double>(count);
    double sum[kLanes] = {}, square[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) {
            const double offset = static_cast<double>(reward[i + k]) - moments.shift;
            sum[k] += offset;
            square[k] += offset * offset;
        }
    }
    for (; i < count; ++i) {
        const double offset = static_cast<double>(reward[i]) - moments.shift;
        sum[i % kLanes] += offset;
        square[i % kLanes] += offset * offset;
    }
    moments.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    moments.square = (square[0] + square[1]) + (square[2] + square[3]);
    // Rewards that differ have an offset whose square is not 0 in float64. Infinite ones that do not have NaN.
    moments.differs = moments.square > 0.0;
    if (moments.square != moments.square) {
        moments.differs = std::any_of(reward, reward + count, [&](float r) { return !(r == moments.shift); });
    }
    return moments;
}

void apply(const LeafRule& rule, const float* reward, int64_t begin, int64_t end, float* leaf) {
    if (rule.scale == 0.0 || rule.only != -1) {
        for (int64_t l = begin; l < end; ++l) leaf[l] = static_cast<float>(rule(reward[l], l));
        return;
    }
    const double origin = rule.origin, scale = rule.scale, bias = rule.bias;
    for (int64_t l = begin; l < end; ++l) {
        leaf[l] = static_cast<float>((static_cast<double>(reward[l]) - origin) * scale + bias);
    }
}

constexpr bool needs_moments_only(Estimator e) { return e != Estimator::opo && e != Estimator::grpo_passk; }

template <Estimator kEstimator>
TreeSums sums_of_range(const GroupLeaves& in, int64_t begin, int64_t end) {
    TreeSums sums;
    if (needs_moments_only(kEstimator)) {
        sums.tree = moments_of(in.reward + begin, end - begin);
    } else {
        sums.tree.shift = in.reward[begin];
        for (int64_t l = begin; l < end; ++l) add_leaf(sums, kEstimator, in, l);
    }
    return sums;
}

// One tree, its leaves order[begin] to order[end - 1] sorted by subgroup.
template <Estimator kEstimator>
void subgroup_advantages(const GroupLeaves& in, const int64_t* order, int64_t begin, int64_t end, double eps,
                         float* leaf) {
    TreeSums sums;
    sums.tree.shift = in.reward[order[begin]];
    for (int64_t i = begin; i < end; ++i) sums.tree.add(in.reward[order[i]]);
    for (int64_t from = begin, to; from < end; from = to) {
        sums.subgroup = Moments{};
        sums.subgroup.shift = in.reward[order[from]];
        for (to = from; to < end && in.subgroup[order[to]] == in.subgroup[order[from]]; ++to) {
            sums.subgroup.add(in.reward[order[to]]);
        }
        const LeafRule rule = leaf_rule(kEstimator, sums, eps);
        for (int64_t i = from; i < to; ++i) {
            leaf[order[i]] = static_cast<float>(rule(in.reward[order[i]], order[i]));
        }
    }
}

// Calls work(k) for every tree.
template <class Work>
void for_each_tree(const Ranges& ranges, int64_t leaves, int threads, const Work& work) {
    const int useful = static_cast<int>(std::clamp<int64_t>(leaves / kLeavesPerThread, 1, threads));
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
    for (int64_t k = 0; k < ranges.size(); ++k) work(k);
}

// Only what the estimator needs is kept by tree, so that it stays in the cache.
template <Estimator kEstimator>
void scattered_advantages(double eps, const GroupLeaves& in, float* leaf) {
    using Kept = std::conditional_t<needs_moments_only(kEstimator), Moments, TreeSums>;
    check_indices("tree", in.tree, in.leaves);
    const size_t trees = static_cast<size_t>(*std::max_element(in.tree, in.tree + in.leaves)) + 1;
    std::vector<Kept> kept(trees);
    for (int64_t l = 0; l < in.leaves; ++l) {
        Kept& sums = kept[in.tree[l]];
        if constexpr (std::is_same_v<Kept, Moments>) {
            if (sums.count == 0.0) sums.shift = in.reward[l];
            sums.add(in.reward[l]);
        } else {
            if (sums.tree.count == 0.0) sums.tree.shift = in.reward[l];
            add_leaf(sums, kEstimator, in, l);
        }
    }
    std::vector<LeafRule> rules(trees);
    for (size_t t = 0; t < trees; ++t) {
        TreeSums sums;
        if constexpr (std::is_same_v<Kept, Moments>) sums.tree = kept[t];
        else sums = kept[t];
        rules[t] = leaf_rule(kEstimator, sums, eps);
    }
    for (int64_t l = 0; l < in.leaves; ++l) leaf[l] = static_cast<float>(rules[in.tree[l]](in.reward[l], l));
}

template <Estimator kEstimator>
void advantages(double eps, const GroupLeaves& in, float* leaf, int threads) {
    if constexpr (uses_subgroups(kEstimator)) {
        check_indices("subgroup", in.subgroup, in.leaves);
        const Ranges ranges = sorted_ranges(in, in.subgroup);
        for_each_tree(ranges, in.leaves, threads, [&](int64_t k) {
            const int64_t* order = ranges.order.data();
            subgroup_advantages<kEstimator>(in, order, ranges.begin[k], ranges.begin[k + 1], eps, leaf);
        });
        return;
    }
    Ranges ranges;
    if (!contiguous(in.tree, in.leaves, ranges.begin)) return scattered_advantages<kEstimator>(eps, in, leaf);
    for_each_tree(ranges, in.leaves, threads, [&](int64_t k) {
        const int64_t begin = ranges.begin[k], end = ranges.begin[k + 1];
        apply(leaf_rule(kEstimator, sums_of_range<kEstimator>(in, begin, end), eps), in.reward, begin, end, leaf);
    });
}

// The sums over the batch are taken tree by tree in one order, whatever the number of threads.
void whitened_advantages(double eps, const GroupLeaves& in, float* leaf, int threads) {
    Ranges ranges;
    if (!contiguous(in.tree, in.leaves, ranges.begin)) ranges = sorted_ranges(in, nullptr);
    const auto at = [&](int64_t i) { return ranges.order.empty() ? i : ranges.order[i]; };
    std::vector<LeafRule> rules(static_cast<size_t>(ranges.size()));
    std::vector<BatchSums> parts(rules.size());
    for_each_tree(ranges, in.leaves, threads, [&](int64_t k) {
        TreeSums sums;
        sums.tree.shift = in.reward[at(ranges.begin[k])];
        for (int64_t i = ranges.begin[k]; i < ranges.begin[k + 1]; ++i) sums.tree.add(in.reward[at(i)]);
        rules[k] = leaf_rule(Estimator::reinforce_pp_baseline, sums, eps);
        for (int64_t i = ranges.begin[k]; i < ranges.begin[k + 1]; ++i) {
            parts[k].add(rules[k](in.reward[at(i)], at(i)), length_of(in, at(i)));
        }
    });
    BatchSums batch;
    for (const BatchSums& part : parts) batch.merge(part);
    const LeafRule whiten = whitening(batch, eps);
    for_each_tree(ranges, in.leaves, threads, [&](int64_t k) {
        for (int64_t i = ranges.begin[k]; i < ranges.begin[k + 1]; ++i) {
            const double deviation = rules[k](in.reward[at(i)], at(i));
            leaf[at(i)] = whitened(deviation, rules[k].scale == 0.0, whiten);
        }
    });
}

}  // namespace

void group_advantages_cpu(Estimator estimator, double eps, const GroupLeaves& in, float* leaf, int threads) {
    if (in.length != nullptr) check_lengths(in.length, in.leaves);
    switch (estimator) {
        case Estimator::none:
            check_indices("tree", in.tree, in.leaves);
            std::copy(in.reward, in.reward + in.leaves, leaf);
            return;
        case Estimator::grpo:
        case Estimator::at2po:
            return advantages<Estimator::grpo>(eps, in, leaf, threads);
        case Estimator::dr_grpo:
            return advantages<Estimator::dr_grpo>(eps, in, leaf, threads);
        case Estimator::rloo:
            return advantages<Estimator::rloo>(eps, in, leaf, threads);
        case Estimator::opo:
            return advantages<Estimator::opo>(eps, in, leaf, threads);
        case Estimator::grpo_passk:
            return advantages<Estimator::grpo_passk>(eps, in, leaf, threads);
        case Estimator::tree_grpo:
            return advantages<Estimator::tree_grpo>(eps, in, leaf, threads);
        case Estimator::tree_grpo_sum:
            return advantages<Estimator::tree_grpo_sum>(eps, in, leaf, threads);
        case Estimator::appo:
            return advantages<Estimator::appo>(eps, in, leaf, threads);
        case Estimator::reinforce_pp_baseline:
            return whitened_advantages(eps, in, leaf, threads);
    }
}

}  // namespace arpo
