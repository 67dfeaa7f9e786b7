// Ratios that groups of tokens share. Included by policy_loss_cpu.cpp only, inside an instruction set's namespace.

// Calls function(group, begin, end) for each run of at most kBlock adjacent tokens of one group.
template <class Index, class Function>
void for_each_run(const Index* group, int64_t begin, int64_t end, const Function& function) {
    while (begin < end) {
        const Index first = group[begin];
        const int64_t limit = begin + kBlock < end ? begin + kBlock : end;
        int64_t t = begin + 1;
        for (; t + kLanes <= limit; t += kLanes) {
            Index difference = 0;
            for (int i = 0; i < kLanes; ++i) difference |= group[t + i] ^ first;
            if (difference != 0) break;
        }
        while (t < limit && group[t] == first) ++t;
        function(static_cast<int64_t>(first), begin, t);
        begin = t;
    }
}

template <class Function>
void for_each_run(const PolicyGroups& groups, int64_t begin, int64_t end, const Function& function) {
    if (groups.wide) {
        for_each_run(static_cast<const int64_t*>(groups.group), begin, end, function);
    } else {
        for_each_run(static_cast<const std::int32_t*>(groups.group), begin, end, function);
    }
}

// Sums over tokens of nonzero weight: log ratios, number, the two sides of the advantage, logprobs.
struct GroupSums {
    double x, count, positive, negative, text;

    void add(const GroupSums& other) {
        x += other.x;
        count += other.count;
        positive += other.positive;
        negative += other.negative;
        text += other.text;
    }
};

struct Run {
    int64_t group, begin;
    GroupSums sums;
};

template <bool pair>
GroupSums run_sums(const PolicyTokens& in, int64_t begin, int64_t end, bool sides, bool text) {
    const F32x16 zero = F32x16::set(0.0f);
    F32x16 x = zero, positive = zero, negative = zero, texts = zero;
    int tokens = 0;
    const auto add = [&](const PolicyTokens& from, int64_t t) {
        const F32x16 w = load(from.weight + t), logprob = load(from.logprob + t);
        const Mask16 trained = not_equal(w, zero);
        x = x + keep(trained, logprob - load(from.old_logprob + t));
        tokens += count(trained);
        if (text) texts = texts + keep(trained, logprob);
        if (sides) {
            F32x16 up, down;
            load_advantage<pair>(from, t, trained, w, up, down);
            positive = positive + up;
            negative = negative + down;
        }
    };
    int64_t t = begin;
    for (; t + kLanes <= end; t += kLanes) {
        prefetch_tokens(in, t + kAhead, sides ? pair ? 2 : 1 : 0);
        add(in, t);
    }
    if (t < end) add(Padded(in, t, end - t, sides ? pair ? 2 : 1 : 0).in, 0);
    return {sum(x), static_cast<double>(tokens), sum(positive), sum(negative), sum(texts)};
}

// The sides of a clip at sixteen mean log ratios.
struct RatioSides {
    float r[kLanes], above[kLanes], above_slope[kLanes], below[kLanes], below_slope[kLanes];
};

template <PolicyClip clip>
void ratio_sides(const float* mean, const Rule& rule, RatioSides& out) {
    const F32x16 y = load(mean), g = guarded(y), zero = F32x16::set(0.0f);
    const F32x16 r = exponential(g, g).r;
    Sides s = clip_sides<clip>(r, rule);
    if (clip != PolicyClip::cispo) {
        const Mask16 outside = beyond_guard(y);
        s.above_slope = choose(outside, zero, s.above_slope);
        s.below_slope = choose(outside, zero, s.below_slope);
    }
    store(out.r, r);
    store(out.above, s.above);
    store(out.above_slope, s.above_slope);
    store(out.below, s.below);
    store(out.below_slope, s.below_slope);
}

void ratio_sides(const float* mean, const Rule& rule, RatioSides& out) {
    switch (rule.clip) {
        case PolicyClip::gppo: return ratio_sides<PolicyClip::gppo>(mean, rule, out);
        case PolicyClip::cispo: return ratio_sides<PolicyClip::cispo>(mean, rule, out);
        case PolicyClip::sapo: return ratio_sides<PolicyClip::sapo>(mean, rule, out);
        case PolicyClip::ppo: break;
    }
    return ratio_sides<PolicyClip::ppo>(mean, rule, out);
}

// The first pass: each group's ratio, and its gradient if its tokens share one. For packed paths the leaves' objective
// and clip sums go into `total`, and a segment's gradient is the sum over the leaves below it.
class GroupRatios {
   public:
    int64_t misplaced = -1;

    template <class PartBegin>
    GroupRatios(const PolicyLoss& loss, const Rule& rule, const PartBegin& part_begin, int threads, bool gradient,
                Totals& total)
        : runs_(loss.count) {
        const bool paths = loss.groups.level == Level::path;
        const bool sides = gradient && !paths, text = paths && rule.clip == PolicyClip::cispo;
        int64_t lengths[kParts] = {};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int p = 0; p < kParts; ++p) {
            Run* next = &runs_[part_begin(p)];
            for_each_run(loss.groups, part_begin(p), part_begin(p + 1), [&](int64_t group, int64_t begin, int64_t end) {
                const GroupSums sums = loss.pairs ? run_sums<true>(loss.tokens, begin, end, sides, text)
                                                  : run_sums<false>(loss.tokens, begin, end, sides, text);
                if (sums.count > 0) *next++ = {group, begin, sums};
            });
            lengths[p] = next - &runs_[part_begin(p)];
        }
        int64_t used = paths ? loss.groups.groups : 0;
        const auto each_run = [&](const auto& function) {
            for (int p = 0; p < kParts; ++p) {
                for (int64_t i = 0; i < lengths[p]; ++i) function(runs_[part_begin(p) + i]);
            }
        };
        each_run([&](const Run& run) {
            const bool fits = run.group >= 0 && run.group < loss.groups.groups;
            if (!fits && misplaced < 0) {
                misplaced = run.begin;
                while (loss.tokens.weight[misplaced] == 0.0f) ++misplaced;
            }
            if (fits && run.group >= used) used = run.group + 1;
        });
        if (misplaced >= 0) return;
        Buffer<GroupSums> sums(used);
        each_run([&](const Run& run) { sums[run.group].add(run.sums); });
        count_ = used;
        ratios_.resize(used);
        paths ? from_paths(loss.groups, rule, sums.data, total) : from_groups(rule, sums.data);
    }

    // Tokens of a group that has no ratio all have weight 0.
    GroupRatio at(int64_t group) const { return group >= 0 && group < count_ ? ratios_[group] : GroupRatio{}; }

   private:
    Buffer<Run> runs_;
    Buffer<GroupRatio> ratios_{0};
    int64_t count_ = 0;

    void from_groups(const Rule& rule, const GroupSums* sums) {
        for (int64_t first = 0; first < count_; first += kLanes) {
            const int lanes = static_cast<int>(count_ - first < kLanes ? count_ - first : kLanes);
            float mean[kLanes] = {};
            for (int i = 0; i < lanes; ++i) {
                if (sums[first + i].count > 0) mean[i] = static_cast<float>(sums[first + i].x / sums[first + i].count);
            }
            RatioSides s;
            ratio_sides(mean, rule, s);
            for (int i = 0; i < lanes; ++i) {
                const GroupSums& group = sums[first + i];
                const double slope = group.positive * s.above_slope[i] + group.negative * s.below_slope[i];
                const double gradient = group.count > 0 ? rule.scale * slope / group.count : 0.0;
                ratios_[first + i] = {s.r[i],     s.above[i],       s.above_slope[i],
                                      s.below[i], s.below_slope[i], static_cast<float>(gradient)};
            }
        }
    }

    void from_paths(const PolicyGroups& tree, const Rule& rule, GroupSums* sums, Totals& total) {
        for (int64_t s = 0; s < count_; ++s) {
            if (tree.parent[s] >= 0) sums[s].add(sums[tree.parent[s]]);
        }
        Buffer<double> gradient(count_);
        for (int64_t first = 0; first < tree.leaves; first += kLanes) {
            const int64_t end = first + kLanes < tree.leaves ? first + kLanes : tree.leaves;
            float mean[kLanes] = {};
            for (int64_t l = first; l < end; ++l) {
                const GroupSums& path = sums[tree.leaf_segment[l]];
                if (path.count > 0) mean[l - first] = static_cast<float>(path.x / path.count);
            }
            RatioSides sides;
            ratio_sides(mean, rule, sides);
            for (int64_t l = first; l < end; ++l) {
                const GroupSums& path = sums[tree.leaf_segment[l]];
                const double slope = add_leaf(tree, rule, l, path, sides, static_cast<int>(l - first), total);
                gradient[tree.leaf_segment[l]] += slope;
            }
        }
        for (int64_t s = count_ - 1; s >= 0; --s) {
            if (tree.parent[s] >= 0) gradient[tree.parent[s]] += gradient[s];
            ratios_[s].gradient = static_cast<float>(rule.scale * gradient[s]);
        }
    }

    // One row of the packed tree into the sums; returns the slope of each of its tokens.
    static double add_leaf(const PolicyGroups& tree, const Rule& rule, int64_t l, const GroupSums& path,
                           const RatioSides& sides, int lane, Totals& total) {
        const double weight = tree.leaf_weight ? tree.leaf_weight[l] : 1.0;
        if (!(path.count > 0) || weight == 0.0) return 0.0;
        const double advantage = weight * tree.leaf_advantage[l], r = sides.r[lane], mass = weight * path.count;
        const bool up = !(advantage <= 0.0), down = !(advantage >= 0.0);
        const bool cispo = rule.clip == PolicyClip::cispo, sapo = rule.clip == PolicyClip::sapo;
        const double above = up ? advantage * sides.above[lane] : 0.0;
        const double below = down ? advantage * sides.below[lane] : 0.0;
        total.objective += (above + below) * (cispo ? path.text : path.count);
        total.sums[kSumRatio] += mass * r;
        if (r > total.sums[kMaxRatio]) total.sums[kMaxRatio] = r;
        if (!sapo && (up || cispo) && r > rule.high) total.sums[kSumClippedHigh] += mass;
        if (!sapo && (down || cispo) && r < rule.low) total.sums[kSumClippedLow] += mass;
        if (!sapo && down && r > rule.dual) total.sums[kSumDualClipped] += mass;
        return (up ? advantage * sides.above_slope[lane] : 0.0) + (down ? advantage * sides.below_slope[lane] : 0.0);
    }
};
