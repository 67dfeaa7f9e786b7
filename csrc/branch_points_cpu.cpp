#include "branch_points.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace arpo {
namespace {

struct Contender {
    int64_t tree;
    float score;
    int32_t wish;
    int64_t key;
    int64_t path;
};

bool served_first(const Contender& a, const Contender& b) {
    if (a.tree != b.tree) return a.tree < b.tree;
    return branch_precedes(a.score, a.key, a.path, b.score, b.key, b.path);
}

void check_trees(const BranchPaths& paths) {
    for (int64_t i = 0; i < paths.paths; ++i) {
        if (paths.tree[i] < 0 || paths.tree[i] >= paths.trees) {
            throw std::invalid_argument("branch_points: got tree index " + std::to_string(paths.tree[i]) +
                                        "; expected 0 to " + std::to_string(paths.trees - 1));
        }
    }
}

}  // namespace

void branch_scores_cpu(const BranchRule& rule, const BranchPaths& paths, float* score, int32_t* wish) {
    for (int64_t i = 0; i < paths.paths; ++i) {
        const BranchWish w = branch_wish(rule, paths, i);
        score[i] = w.score;
        wish[i] = w.children;
    }
}

void branch_points_cpu(const BranchRule& rule, const BranchPaths& paths, int32_t* children) {
    check_trees(paths);
    std::vector<int64_t> wished(static_cast<size_t>(paths.trees), 0);
    for (int64_t i = 0; i < paths.paths; ++i) {
        children[i] = branch_wish(rule, paths, i).children;
        wished[paths.tree[i]] += children[i];
    }

    // Order matters only in trees that wish for more than they have room for.
    std::vector<Contender> contenders;
    for (int64_t i = 0; i < paths.paths; ++i) {
        const int64_t tree = paths.tree[i];
        if (children[i] > 0 && wished[tree] > paths.room[tree]) {
            const BranchWish w = branch_wish(rule, paths, i);
            contenders.push_back({tree, w.score, w.children, paths.key[i], i});
        }
    }
    std::sort(contenders.begin(), contenders.end(), served_first);

    int64_t tree = -1;
    int64_t before = 0;
    for (const Contender& c : contenders) {
        if (c.tree != tree) {
            tree = c.tree;
            before = 0;
        }
        children[c.path] = branch_granted(paths.room[tree], before, c.wish);
        before += c.wish;
    }
}

}  // namespace arpo
