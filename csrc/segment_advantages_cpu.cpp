// Reads every input once and writes every result once; the sums of S segments, 32 or 40 bytes each, stay in the cache.
#include "segment_advantages.h"

#include <vector>

#include "check.h"

namespace arpo {
namespace {

void check(const SegmentTree& tree) {
    for (int64_t s = 0; s < tree.segments; ++s) {
        ARPO_CHECK(tree.parent[s] >= -1 && tree.parent[s] < s, "group_advantages: got parent ", tree.parent[s],
                   " of segment ", s, "; expected -1 to ", s - 1);
    }
    for (int64_t l = 0; l < tree.leaves; ++l) {
        ARPO_CHECK(tree.leaf_segment[l] >= 0 && tree.leaf_segment[l] < tree.segments, "group_advantages: got segment ",
                   tree.leaf_segment[l], " of leaf ", l, "; expected 0 to ", tree.segments - 1);
    }
}

template <class Sums>
void attribute(const SegmentTree& tree, float* segment, float* pair) {
    std::vector<Sums> sums(static_cast<size_t>(tree.segments));
    for (int64_t l = 0; l < tree.leaves; ++l) sums[tree.leaf_segment[l]].add_leaf(share_of(tree, l));
    // Children follow their parents, so every segment is complete before it is passed on.
    for (int64_t s = tree.segments - 1; s >= 0; --s) {
        if (tree.parent[s] >= 0) sums[tree.parent[s]].add_child(sums[s], entropy_of(tree, s));
        sums[s].store(segment + s, pair + 2 * s);
    }
}

}  // namespace

void segment_advantages_cpu(Credit credit, const SegmentTree& tree, float* segment, float* pair) {
    check(tree);
    switch (credit) {
        case Credit::mean:
            return attribute<MeanCredit>(tree, segment, pair);
        case Credit::turn:
            return attribute<TurnCredit>(tree, segment, pair);
        case Credit::prefix:
            return attribute<PrefixCredit>(tree, segment, pair);
    }
}

}  // namespace arpo
