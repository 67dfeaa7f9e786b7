// 12 bytes read and 4 written per leaf, all from the cache at ordinary sizes: the floor is the arithmetic, about four
// additions, one product and four conversions a leaf.
//
// Leaves of a tree that stand together, in any order of the trees, are a range: its sums stay in registers and its
// advantages are written while its rewards are still in the first cache. Scattered ones are sorted by counting first.
#include "group_advantages.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace arpo {
namespace {

constexpr int64_t kLeavesPerThread = 16384;

void check_index(const char* name, const int64_t* index, int64_t leaves) {
    // One pass without a branch per leaf, and a second one only to name the culprit.
    uint64_t highest = 0;
    for (int64_t l = 0; l < leaves; ++l) highest = std::max(highest, static_cast<uint64_t>(index[l]));
    if (leaves == 0 || highest < static_cast<uint64_t>(leaves)) return;
    for (int64_t l = 0; l < leaves; ++l) {
        ARPO_CHECK(index[l] >= 0 && index[l] < leaves, "group_advantages: got ", name, " index ", index[l],
                   " at leaf ", l, "; expected 0 to ", leaves - 1);
    }
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

// Whether the leaves of every tree stand together; `begin` then holds where each starts.
bool contiguous(const int64_t* tree, int64_t leaves, std::vector<int64_t>& begin) {
    std::vector<bool> met(static_cast<size_t>(leaves));
    for (int64_t l = 0; l < leaves; ++l) {
        if (l > 0 && tree[l] == tree[l - 1]) continue;
        if (met[tree[l]]) return false;
        met[tree[l]] = true;
        begin.push_back(l);
    }
    begin.push_back(leaves);
    return true;
}

// With subgroups, the leaves of a tree are sorted by subgroup.
Ranges ranges_of(const GroupLeaves& in, bool by_subgroup) {
    Ranges ranges;
    if (!by_subgroup && contiguous(in.tree, in.leaves, ranges.begin)) return ranges;
    ranges.begin.clear();
    std::vector<int64_t> order(static_cast<size_t>(in.leaves));
    for (int64_t l = 0; l < in.leaves; ++l) order[l] = l;
    if (by_subgroup) order = sorted_by(in.subgroup, in.leaves, order);
    ranges.order = sorted_by(in.tree, in.leaves, order);
    for (int64_t i = 0; i < in.leaves; ++i) {
        if (i == 0 || in.tree[ranges.order[i]] != in.tree[ranges.order[i - 1]]) ranges.begin.push_back(i);
    }
    ranges.begin.push_back(in.leaves);
    return ranges;
}

struct Identity {
    int64_t operator[](int64_t i) const { return i; }
};

template <Estimator kEstimator, class Order>
void tree_advantages(const GroupLeaves& in, Order order, int64_t begin, int64_t end, double eps, float* leaf) {
    TreeSums sums;
    sums.tree.shift = in.reward[order[begin]];
    for (int64_t i = begin; i < end; ++i) add_leaf(sums, kEstimator, in, order[i]);
    for (int64_t from = begin, to; from < end; from = to) {
        to = end;
        if (uses_subgroups(kEstimator)) {
            const int64_t own = in.subgroup[order[from]];
            sums.subgroup = Moments{};
            sums.subgroup.shift = in.reward[order[from]];
            for (to = from; to < end && in.subgroup[order[to]] == own; ++to) sums.subgroup.add(in.reward[order[to]]);
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

template <Estimator kEstimator>
void advantages(double eps, const GroupLeaves& in, float* leaf, int threads) {
    const Ranges ranges = ranges_of(in, uses_subgroups(kEstimator));
    for_each_tree(ranges, in.leaves, threads, [&](int64_t k) {
        const int64_t begin = ranges.begin[k], end = ranges.begin[k + 1];
        if (ranges.order.empty()) {
            tree_advantages<kEstimator>(in, Identity{}, begin, end, eps, leaf);
        } else {
            tree_advantages<kEstimator>(in, ranges.order.data(), begin, end, eps, leaf);
        }
    });
}

// The sums over the batch are taken tree by tree in one order, whatever the number of threads.
void whitened_advantages(double eps, const GroupLeaves& in, float* leaf, int threads) {
    const Ranges ranges = ranges_of(in, false);
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
    check_index("tree", in.tree, in.leaves);
    if (uses_subgroups(estimator)) check_index("subgroup", in.subgroup, in.leaves);
    if (in.length != nullptr) check_lengths(in.length, in.leaves);
    switch (estimator) {
        case Estimator::none:
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
