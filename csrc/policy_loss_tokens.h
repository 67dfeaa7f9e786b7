// Sixteen tokens of the policy loss at a time. Included by policy_loss_cpu.cpp only, inside an instruction set's
// namespace. Comparisons and selects are arranged so that NaN falls through to the arithmetic and shows in the loss.

constexpr float kLogRatioBound = 20.0f;
constexpr int kLanes = 16;

// The rule in float32. Gradients are scaled by -1 / normalizer, kl_coef / normalizer and -entropy_coef / normalizer.
struct Rule {
    PolicyClip clip;
    PolicyKl kl;
    float low, high, dual, tau_positive, tau_negative;
    float scale, kl_scale, entropy_scale;
};

struct Exponential {
    F32x16 r;      // e^v
    F32x16 above;  // e^v - 1 - x, without cancellation where x is v and near 0
};

// Cephes' expf for |v| <= 80: v = n ln 2 + f, e^f = 1 + f + f^2 p(f).
inline Exponential exponential(F32x16 v, F32x16 x) {
    // Adding 1.5 * 2^23 rounds to an integer; 127 more leaves n + 127 in the low bits, which shifted is 2^n.
    const F32x16 magic = F32x16::set(12582912.0f + 127.0f);
    const F32x16 biased = fma(v, F32x16::set(1.44269504f), magic);
    const F32x16 n = biased - magic;
    const F32x16 f = fma(n, F32x16::set(2.12194440e-4f), fma(n, F32x16::set(-0.693359375f), v));
    F32x16 p = F32x16::set(1.9875691500e-4f);
    p = fma(p, f, F32x16::set(1.3981999507e-3f));
    p = fma(p, f, F32x16::set(8.3334519073e-3f));
    p = fma(p, f, F32x16::set(4.1665795894e-2f));
    p = fma(p, f, F32x16::set(1.6666665459e-1f));
    p = fma(p, f, F32x16::set(5.0000001201e-1f));
    const F32x16 one = F32x16::set(1.0f);
    const F32x16 rest = p * (f * f);
    const F32x16 r = (rest + f + one) * shift_to_exponent(biased);
    return {r, choose(not_equal(n, F32x16::set(0.0f)), r - one - x, rest)};
}

inline F32x16 guarded(F32x16 x) {
    return max(F32x16::set(-kLogRatioBound), min(F32x16::set(kLogRatioBound), x));
}

// Where there is no slope; not where x is NaN, which has to show in the gradient.
inline Mask16 beyond_guard(F32x16 x) {
    return greater(max(x, F32x16::set(0.0f) - x), F32x16::set(kLogRatioBound));
}

// The two sides of a clip at ratio r: a token's objective is positive * above + negative * below (times logprob for
// cispo), and the slopes are their derivatives with respect to log r (to logprob for cispo).
struct Sides {
    F32x16 above, above_slope, below, below_slope;
};

// 4 / tau * sigmoid(t) and its derivative in log r, 4 * sigmoid(t) * (1 - sigmoid(t)) * r, with t = tau * (r - 1).
inline void soft_gate(F32x16 r, float tau, F32x16& gate, F32x16& slope) {
    const F32x16 zero = F32x16::set(0.0f), one = F32x16::set(1.0f);
    const F32x16 t = F32x16::set(tau) * (r - one);
    const F32x16 size = min(F32x16::set(80.0f), max(zero - t, t));
    const F32x16 e = exponential(zero - size, zero).r;
    const F32x16 inverse = one / (one + e);
    gate = F32x16::set(4.0f / tau) * choose(greater(zero, t), e * inverse, inverse);
    slope = F32x16::set(4.0f) * e * inverse * inverse * r;
}

template <PolicyClip clip>
inline Sides clip_sides(F32x16 r, const Rule& rule) {
    Sides s;
    if (clip == PolicyClip::sapo) {
        soft_gate(r, rule.tau_positive, s.above, s.above_slope);
        soft_gate(r, rule.tau_negative, s.below, s.below_slope);
        return s;
    }
    const F32x16 zero = F32x16::set(0.0f), low = F32x16::set(rule.low), high = F32x16::set(rule.high);
    if (clip == PolicyClip::cispo) {
        const F32x16 kept = max(low, min(high, r));
        return {kept, kept, kept, kept};
    }
    const F32x16 dual = F32x16::set(rule.dual);
    s.above = min(high, r);
    s.above_slope = choose(greater(r, high), clip == PolicyClip::gppo ? high : zero, r);
    s.below = min(dual, max(low, r));
    s.below_slope = choose(greater(low, r), zero, choose(greater(r, dual), zero, r));
    return s;
}

// What a group's tokens have in common: its ratio, the sides there, and the gradient, if the group shares one.
struct GroupRatio {
    float r, above, above_slope, below, below_slope, gradient;
};

using Level = PolicyLevel;

struct BlockSums {
    F32x16 objective, weight, high, low, dual, ratio, k1, k2, k3, ref1, ref2, ref3, entropy, ratio_max, log_ratio_max;
    int tokens, nan;
};

struct Gradients {
    float* logprob;
    float* entropy;
    bool shared;  // the group's, not each token's own
};

// positive and negative of the tokens at t, 0 where the weight is.
template <bool pair>
inline void load_advantage(const PolicyTokens& in, std::int64_t t, Mask16 trained, F32x16 w, F32x16& positive,
                           F32x16& negative) {
    const F32x16 zero = F32x16::set(0.0f);
    if (pair) {
        load_pairs(in.advantage + 2 * t, positive, negative);
        positive = keep(trained, positive);
        negative = keep(trained, negative);
    } else {
        const F32x16 a = keep(trained, load(in.advantage + t) * w);
        positive = max(zero, a);
        negative = min(zero, a);
    }
    if (in.importance) {
        const F32x16 factor = keep(trained, load(in.importance + t));
        positive = positive * factor;
        negative = negative * factor;
    }
}

// The policy term of tokens with ratio r: objective and clip sums; returns its slopes.
template <Level level, PolicyClip clip, bool pair>
inline F32x16 add_policy(const PolicyTokens& in, std::int64_t t, const Rule& rule, const GroupRatio& group,
                         Mask16 trained, F32x16 w, F32x16 own_ratio, BlockSums& sums) {
    const F32x16 zero = F32x16::set(0.0f);
    const PolicyClip rule_clip = level == Level::token ? clip : rule.clip;
    F32x16 positive, negative;
    load_advantage<pair>(in, t, trained, w, positive, negative);
    const F32x16 r = level == Level::token ? own_ratio : F32x16::set(group.r);
    const Sides s = level == Level::token
                        ? clip_sides<clip>(r, rule)
                        : Sides{F32x16::set(group.above), F32x16::set(group.above_slope), F32x16::set(group.below),
                                F32x16::set(group.below_slope)};
    F32x16 objective = fma(positive, s.above, negative * s.below);
    if (rule_clip == PolicyClip::cispo) objective = objective * keep(trained, load(in.logprob + t));
    sums.objective = sums.objective + objective;
    sums.ratio = fma(w, r, sums.ratio);
    sums.ratio_max = max(sums.ratio_max, keep(trained, r));
    if (rule_clip != PolicyClip::sapo) {
        const bool cispo = rule_clip == PolicyClip::cispo;
        const Mask16 rising = cispo ? trained : greater(positive, zero);
        const Mask16 falling = cispo ? trained : greater(zero, negative);
        sums.high = sums.high + keep(both(rising, greater(r, F32x16::set(rule.high))), w);
        sums.low = sums.low + keep(both(falling, greater(F32x16::set(rule.low), r)), w);
        sums.dual = sums.dual + keep(both(falling, greater(r, F32x16::set(rule.dual))), w);
    }
    return fma(positive, s.above_slope, negative * s.below_slope);
}

// The estimates of the KL against the reference policy into the sums; returns the slope of the chosen one.
inline F32x16 add_reference(F32x16 d, F32x16 w, PolicyKl kl, BlockSums& sums) {
    const F32x16 zero = F32x16::set(0.0f);
    const F32x16 g = guarded(d);
    const F32x16 k3 = exponential(zero - g, zero - g).above;
    sums.ref1 = fma(w, d, sums.ref1);
    sums.ref2 = fma(w * d, d, sums.ref2);
    sums.ref3 = fma(w, k3, sums.ref3);
    if (kl == PolicyKl::k1) return w;
    if (kl == PolicyKl::k2) return w * d;
    return kl == PolicyKl::k3 ? choose(beyond_guard(d), zero, w * (g - k3)) : zero;
}

template <Level level, PolicyClip clip, bool pair>
inline void add_tokens(const PolicyTokens& in, std::int64_t t, const Rule& rule, const GroupRatio& group,
                       const Gradients& out, BlockSums& sums) {
    const F32x16 zero = F32x16::set(0.0f);
    const F32x16 w = load(in.weight + t);
    const Mask16 trained = not_equal(w, zero);
    const F32x16 logprob = load(in.logprob + t);
    const F32x16 x = keep(trained, logprob - load(in.old_logprob + t));
    const F32x16 g = guarded(x);
    const Exponential e = exponential(g, x);
    F32x16 gradient = zero;
    if (level != Level::path) {
        const F32x16 slope = add_policy<level, clip, pair>(in, t, rule, group, trained, w, e.r, sums);
        gradient = slope * F32x16::set(rule.scale);
        if (level == Level::token && clip != PolicyClip::cispo) {
            gradient = choose(beyond_guard(x), zero * gradient, gradient);
        }
    }
    if (level != Level::token && out.shared) gradient = F32x16::set(group.gradient);
    sums.weight = sums.weight + w;
    sums.k1 = sums.k1 - w * x;
    sums.k2 = fma(w * x, x, sums.k2);
    sums.k3 = fma(w, e.above, sums.k3);
    sums.log_ratio_max = max(sums.log_ratio_max, max(x, zero - x));
    sums.tokens += count(trained);
    sums.nan += count(not_equal(x, x));
    if (in.ref_logprob) {
        const F32x16 d = keep(trained, logprob - load(in.ref_logprob + t));
        gradient = fma(add_reference(d, w, rule.kl, sums), F32x16::set(rule.kl_scale), gradient);
    }
    if (in.entropy) sums.entropy = fma(w, keep(trained, load(in.entropy + t)), sums.entropy);
    // A weight of 0 times a scale or a group's ratio that is not finite would be NaN.
    if (out.logprob) store(out.logprob + t, keep(trained, gradient));
    if (out.entropy) store(out.entropy + t, keep(trained, w * F32x16::set(rule.entropy_scale)));
}
