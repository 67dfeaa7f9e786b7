// One pass over the tokens, which moves at least 20 bytes for each: four inputs and the gradient. Ratios over groups
// take two: the first sums the log ratios, which settles the ratio and gradient of a group; the second is the same with
// the ratio given. Tokens are taken in runs of one group, so groups may come in any order, and runs shorter than a
// vector cost a vector.
#include "policy_loss.h"

#include <cstdlib>
#include <new>

#include "vec.h"

namespace arpo::ARPO_ISA {
namespace {

using std::int64_t;

#include "policy_loss_tokens.h"

// float32 sums run over one block, float64 sums over the blocks of a part and over the parts. The number of parts is
// fixed, so that the result does not depend on the number of threads.
constexpr int64_t kBlock = 1024;
constexpr int kParts = 64;
constexpr int64_t kTokensPerThread = 16384;
// Four streams at once are more than the processor foresees: asking 1 KiB ahead took 256 x 8192 tokens from 3.1 ms to
// 1.7 ms on one AVX-512 core.
constexpr int64_t kAhead = 256;

struct Totals {
    double objective = 0.0;
    double sums[kPolicyLossSums] = {};
    int64_t nan = 0;  // tokens whose log ratio is NaN
};

// Memory of malloc: a std::vector's code, compiled for this instruction set, could serve everybody.
template <class T>
struct Buffer {
    T* data = nullptr;
    explicit Buffer(int64_t count) { resize(count); }
    // Zeros, whatever it held.
    void resize(int64_t count) {
        std::free(data);
        data = static_cast<T*>(std::calloc(count > 0 ? count : 1, sizeof(T)));
        if (!data) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T& operator[](int64_t i) const { return data[i]; }
};

double value_of(const PolicyNumber& number) { return number.address ? *number.address : number.value; }

Rule rule_of(const PolicyRule& rule) {
    const double normalizer = value_of(rule.normalizer);
    const auto narrow = [](double value) { return static_cast<float>(value); };
    return {rule.clip,
            rule.kl,
            narrow(1.0 - rule.clip_low),
            narrow(1.0 + rule.clip_high),
            narrow(rule.dual_clip),
            narrow(rule.tau_positive),
            narrow(rule.tau_negative),
            narrow(-1.0 / normalizer),
            narrow(value_of(rule.kl_coef) / normalizer),
            narrow(-value_of(rule.entropy_coef) / normalizer)};
}

void add_block(const BlockSums& block, Totals& totals) {
    double* sums = totals.sums;
    totals.objective += sum(block.objective);
    totals.nan += block.nan;
    sums[kSumWeight] += sum(block.weight);
    sums[kSumTokens] += block.tokens;
    sums[kSumClippedHigh] += sum(block.high);
    sums[kSumClippedLow] += sum(block.low);
    sums[kSumDualClipped] += sum(block.dual);
    sums[kSumRatio] += sum(block.ratio);
    sums[kSumKlK1] += sum(block.k1);
    sums[kSumKlK2] += 0.5 * sum(block.k2);
    sums[kSumKlK3] += sum(block.k3);
    sums[kSumRefKlK1] += sum(block.ref1);
    sums[kSumRefKlK2] += 0.5 * sum(block.ref2);
    sums[kSumRefKlK3] += sum(block.ref3);
    sums[kSumEntropy] += sum(block.entropy);
    const float ratio_max = largest(block.ratio_max), log_ratio_max = largest(block.log_ratio_max);
    if (ratio_max > sums[kMaxRatio]) sums[kMaxRatio] = ratio_max;
    if (log_ratio_max > sums[kMaxLogRatio]) sums[kMaxLogRatio] = log_ratio_max;
}

void merge(Totals& into, const Totals& from) {
    into.objective += from.objective;
    into.nan += from.nan;
    for (int i = 0; i < kPolicyLossSums; ++i) {
        if (i == kMaxRatio || i == kMaxLogRatio) {
            if (from.sums[i] > into.sums[i]) into.sums[i] = from.sums[i];
        } else {
            into.sums[i] += from.sums[i];
        }
    }
}

// Inlined by order: GCC 12 takes a function that only prefetches for one without effect and drops the call.
__attribute__((always_inline)) inline void prefetch_tokens(const PolicyTokens& in, int64_t t, int advantages) {
    prefetch(in.logprob + t);
    prefetch(in.old_logprob + t);
    prefetch(in.weight + t);
    if (advantages > 0) prefetch(in.advantage + advantages * t);
}

// Fewer than 16 tokens at t, padded with tokens of weight 0. advantages: how many a token has; 0 where leaves have them.
struct Padded {
    float columns[7][2 * kLanes] = {};
    PolicyTokens in;

    Padded(const PolicyTokens& from, int64_t t, int64_t count, int64_t advantages) {
        const auto copy = [&](int column, const float* source, int64_t width) -> const float* {
            if (!source) return nullptr;
            std::memcpy(columns[column], source + width * t, static_cast<std::size_t>(width * count) * sizeof(float));
            return columns[column];
        };
        in = {copy(0, from.logprob, 1), copy(1, from.old_logprob, 1), copy(2, from.advantage, advantages),
              copy(3, from.weight, 1),  copy(4, from.entropy, 1),     copy(5, from.ref_logprob, 1),
              copy(6, from.importance, 1)};
    }
};

using BlockFunction = void (*)(const PolicyTokens&, int64_t, int64_t, const Rule&, const GroupRatio&, const Gradients&,
                               Totals&);

// The tokens begin to end - 1, at most kBlock.
template <Level level, PolicyClip clip, bool pair>
void run_block(const PolicyTokens& in, int64_t begin, int64_t end, const Rule& rule, const GroupRatio& group,
               const Gradients& out, Totals& totals) {
    const F32x16 zero = F32x16::set(0.0f);
    BlockSums sums = {zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, 0, 0};
    int64_t t = begin;
    for (; t + kLanes <= end; t += kLanes) {
        prefetch_tokens(in, t + kAhead, level == Level::path ? 0 : pair ? 2 : 1);
        add_tokens<level, clip, pair>(in, t, rule, group, out, sums);
    }
    if (t < end) {
        float gradient[kLanes], entropy_gradient[kLanes];
        const Padded rest(in, t, end - t, level == Level::path ? 0 : pair ? 2 : 1);
        const Gradients padded = {out.logprob ? gradient : nullptr, out.entropy ? entropy_gradient : nullptr,
                                  out.shared};
        add_tokens<level, clip, pair>(rest.in, 0, rule, group, padded, sums);
        const std::size_t bytes = static_cast<std::size_t>(end - t) * sizeof(float);
        if (out.logprob) std::memcpy(out.logprob + t, gradient, bytes);
        if (out.entropy) std::memcpy(out.entropy + t, entropy_gradient, bytes);
    }
    add_block(sums, totals);
}

template <PolicyClip clip>
BlockFunction token_function(bool pair) {
    return pair ? run_block<Level::token, clip, true> : run_block<Level::token, clip, false>;
}

BlockFunction block_function(const PolicyLoss& loss) {
    constexpr PolicyClip any = PolicyClip::ppo;
    switch (loss.groups.level) {
        case Level::path: return run_block<Level::path, any, false>;
        case Level::group:
            return loss.pairs ? run_block<Level::group, any, true> : run_block<Level::group, any, false>;
        case Level::token: break;
    }
    switch (loss.rule.clip) {
        case PolicyClip::gppo: return token_function<PolicyClip::gppo>(loss.pairs);
        case PolicyClip::cispo: return token_function<PolicyClip::cispo>(loss.pairs);
        case PolicyClip::sapo: return token_function<PolicyClip::sapo>(loss.pairs);
        case PolicyClip::ppo: break;
    }
    return token_function<PolicyClip::ppo>(loss.pairs);
}

#include "policy_loss_groups.h"

}  // namespace

void policy_loss_forward(const PolicyLossOnCpu& args) {
    const PolicyLoss& loss = args.loss;
    const Rule rule = rule_of(loss.rule);
    const BlockFunction run = block_function(loss);
    const int64_t useful = loss.count / kTokensPerThread + 1;
    const int threads = static_cast<int>(useful < args.threads ? useful : args.threads);
    const int64_t blocks = (loss.count + kBlock - 1) / kBlock;
    const auto part_begin = [&](int part) {
        const int64_t begin = blocks * part / kParts * kBlock;
        return begin < loss.count ? begin : loss.count;
    };
    const bool cispo = loss.rule.clip == PolicyClip::cispo;
    const bool shared = loss.groups.level == Level::path || (loss.groups.mean_gradient && !cispo);
    const Gradients out = {args.out.gradient, args.out.entropy_gradient, shared};

    Totals parts[kParts], total;
    *args.misplaced = -1;
    if (loss.groups.level != Level::token) {
        const GroupRatios ratios(loss, rule, part_begin, threads, shared && args.out.gradient, total);
        *args.misplaced = ratios.misplaced;
        if (ratios.misplaced >= 0) return;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int p = 0; p < kParts; ++p) {
            for_each_run(loss.groups, part_begin(p), part_begin(p + 1), [&](int64_t group, int64_t begin, int64_t end) {
                run(loss.tokens, begin, end, rule, ratios.at(group), out, parts[p]);
            });
        }
    } else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int p = 0; p < kParts; ++p) {
            const int64_t end = part_begin(p + 1);
            for (int64_t b = part_begin(p); b < end; b += kBlock) {
                run(loss.tokens, b, b + kBlock < end ? b + kBlock : end, rule, {}, out, parts[p]);
            }
        }
    }

    for (const Totals& part : parts) merge(total, part);
    double* sums = total.sums;
    sums[kSumClipped] = sums[kSumClippedHigh] + sums[kSumClippedLow];
    // Comparing drops NaN. Log ratios of inf and -inf make the ratio of their group NaN, and are not.
    if (total.nan > 0) sums[kMaxLogRatio] = __builtin_nan("");
    if (sums[kSumRatio] != sums[kSumRatio]) sums[kMaxRatio] = sums[kSumRatio];
    double value = -total.objective;
    if (loss.rule.kl != PolicyKl::none) {
        value += value_of(loss.rule.kl_coef) * sums[kSumRefKlK1 + static_cast<int>(loss.rule.kl) - 1];
    }
    value -= value_of(loss.rule.entropy_coef) * sums[kSumEntropy];
    *args.out.loss = static_cast<float>(value / value_of(loss.rule.normalizer));
    for (int i = 0; i < kPolicyLossSums; ++i) args.out.sums[i] = sums[i];
}

}  // namespace arpo::ARPO_ISA
