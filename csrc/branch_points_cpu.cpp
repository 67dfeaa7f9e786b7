#include "branch_points.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace arpo {
namespace {

struct Contender {
    float score;
    int32_t wish;
    int64_t key;
    int64_t path;
};

bool served_first(const Contender& a, const Contender& b) {
    return branch_precedes(a.score, a.key, a.path, b.score, b.key, b.path);
}

// Shares the room of one tree among its contenders, which it puts in order.
void share(int32_t room, Contender* begin, Contender* end, int32_t* children) {
    std::sort(begin, end, served_first);
    int64_t before = 0;
    for (const Contender* c = begin; c != end; ++c) {
        children[c->path] = branch_granted(room, before, c->wish);
        before += c->wish;
    }
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
    struct Wished {
        int64_t children = 0;
        int64_t paths = 0;
    };
    std::vector<Wished> wished(static_cast<size_t>(paths.trees));
    for (int64_t i = 0; i < paths.paths; ++i) {
        children[i] = branch_wish(rule, paths, i).children;
        wished[paths.tree[i]].children += children[i];
        wished[paths.tree[i]].paths += children[i] > 0;
    }

    // Order matters only in trees that wish for more than they have room for. Their contenders, tree by tree: `next` is
    // where the next contender of a tree goes, and in the end where those of the next tree begin.
    std::vector<int64_t> next(static_cast<size_t>(paths.trees), -1);
    int64_t total = 0;
    for (int64_t tree = 0; tree < paths.trees; ++tree) {
        if (wished[tree].children <= paths.room[tree]) continue;
        next[tree] = total;
        total += wished[tree].paths;
    }
    std::vector<Contender> contenders(static_cast<size_t>(total));
    for (int64_t i = 0; i < paths.paths; ++i) {
        const int64_t tree = paths.tree[i];
        if (children[i] == 0 || next[tree] < 0) continue;
        contenders[next[tree]++] = {branch_wish(rule, paths, i).score, children[i], paths.key[i], i};
    }
    for (int64_t tree = 0; tree < paths.trees; ++tree) {
        if (next[tree] < 0) continue;
        Contender* end = contenders.data() + next[tree];
        share(paths.room[tree], end - wished[tree].paths, end, children);
    }
}

}  // namespace arpo
