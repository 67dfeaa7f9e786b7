// Bytes: every input once, 10 a position with entropy, value, mask and candidate; operations: about 30 a position in
// float64 and 10 of integers. At 64 x 1024 that is 0.65 MB and 2.6 M operations: 0.2 ms on one core, bound by arithmetic.
//
// A thread takes a tree: it scores the tree's rows into `order`, keeps the best of every kTokenBlock positions, and
// chooses one position after the other, looking at blocks and then at one block.
#include "branch_tokens.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace arpo {
namespace {

constexpr int64_t kWorthThreads = 1 << 17;  // positions, about 0.5 ms on one core

// x or 0.
inline float kept(float x, uint32_t counts) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0u - counts;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// One row, padded to whole blocks: what does not count is 0 and has weight 0.
struct Row {
    std::vector<float> entropy;
    std::vector<float> value;
    std::vector<float> weight;
    std::vector<uint8_t> ones;  // stands for an absent mask
    int64_t padded;
    int64_t counted = 0;

    explicit Row(int64_t tokens)
        : entropy(token_blocks(tokens) * kTokenBlock),
          value(entropy.size()),
          weight(entropy.size()),
          ones(entropy.size(), 1),
          padded(static_cast<int64_t>(entropy.size())) {}

    const uint8_t* flags(const uint8_t* all, int64_t row, int64_t tokens) const {
        return all ? all + row * tokens : ones.data();
    }

    void read(const TokenRows& in, int64_t row) {
        const float* first = in.entropy + row * in.tokens;
        const float* second = in.value ? in.value + row * in.tokens : first;
        counted = select(in.tokens, first, second, flags(in.mask, row, in.tokens), entropy.data(), value.data(),
                         weight.data());
    }

    // Bits and no branches: half of the mask's are guessed wrong, at 15 cycles each.
    static int32_t select(int64_t tokens, const float* __restrict first, const float* __restrict second,
                          const uint8_t* __restrict mask, float* __restrict entropy, float* __restrict value,
                          float* __restrict weight) {
        int32_t total = 0;
        for (int64_t t = 0; t < tokens; ++t) {
            const uint32_t counts = static_cast<uint32_t>(mask[t] != 0) & static_cast<uint32_t>(is_finite(first[t])) &
                                    static_cast<uint32_t>(is_finite(second[t]));
            entropy[t] = kept(first[t], counts);
            value[t] = kept(second[t], counts);
            weight[t] = static_cast<float>(static_cast<int32_t>(counts));
            total += static_cast<int32_t>(counts);
        }
        return total;
    }
};

double halved(double* lane) {
    for (int width = kTokenLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    return lane[0];
}

double sum_of(const std::vector<float>& x) {
    double lane[kTokenLanes] = {};
    for (size_t t = 0; t < x.size(); t += kTokenLanes) {
        for (int j = 0; j < kTokenLanes; ++j) lane[j] += x[t + j];
    }
    return halved(lane);
}

double squares_of(const std::vector<float>& x, const std::vector<float>& weight, double mean) {
    double lane[kTokenLanes] = {};
    for (size_t t = 0; t < x.size(); t += kTokenLanes) {
        for (int j = 0; j < kTokenLanes; ++j) {
            const double distance = (x[t + j] - mean) * weight[t + j];
            lane[j] += distance * distance;
        }
    }
    return halved(lane);
}

struct Scales {
    ZScale entropy;
    ZScale value;
};

Scales scales_of_row(const Row& row, double eps) {
    const double n = static_cast<double>(row.counted);
    const double entropy = mean_of(n, sum_of(row.entropy));
    const double value = mean_of(n, sum_of(row.value));
    return {z_scale(n, entropy, squares_of(row.entropy, row.weight, entropy), eps),
            z_scale(n, value, squares_of(row.value, row.weight, value), eps)};
}

Scales scales_of_tree(const TokenRows& in, const std::vector<int64_t>& rows, Row& row, double eps) {
    double n = 0, entropy = 0, value = 0, entropy_squares = 0, value_squares = 0;
    for (int64_t r : rows) {
        row.read(in, r);
        n += static_cast<double>(row.counted);
        entropy += sum_of(row.entropy);
        value += sum_of(row.value);
    }
    entropy = mean_of(n, entropy);
    value = mean_of(n, value);
    for (int64_t r : rows) {
        row.read(in, r);
        entropy_squares += squares_of(row.entropy, row.weight, entropy);
        value_squares += squares_of(row.value, row.weight, value);
    }
    return {z_scale(n, entropy, entropy_squares, eps), z_scale(n, value, value_squares, eps)};
}

void score_row(const TokenRows& in, int64_t r, const Row& row, const Scales& scales, bool fallback,
               uint64_t* __restrict order) {
    const uint8_t* __restrict candidate = row.flags(in.candidate, r, in.tokens);
    const float* __restrict entropy = row.entropy.data();
    const float* __restrict value = row.value.data();
    const float* __restrict weight = row.weight.data();
    const bool has_value = in.value != nullptr;
    for (int64_t t = 0; t < in.tokens; ++t) {
        const float z_value = has_value ? z_score(scales.value, value[t]) : 1.0f;
        const bool may = (candidate[t] != 0) & (weight[t] != 0.0f);
        order[t] = token_order(z_score(scales.entropy, entropy[t]), z_value, may, fallback);
    }
    std::fill(order + in.tokens, order + row.padded, 0);
}

struct Worker {
    Row row;
    std::vector<uint64_t> order;  // [rows of a tree, padded tokens]
    std::vector<uint64_t> best;   // the largest of every kTokenBlock of them

    Worker(int64_t tokens, size_t rows)
        : row(tokens), order(rows * row.padded), best(rows * token_blocks(tokens)) {}
};

void score_tree(const TokenRule& rule, const TokenRows& in, const std::vector<int64_t>& rows, Worker& worker) {
    Row& row = worker.row;
    Scales scales{{0.0, 1.0}, {0.0, 1.0}};
    if (rule.scope == TokenScope::tree) scales = scales_of_tree(in, rows, row, rule.eps);
    for (size_t slot = 0; slot < rows.size(); ++slot) {
        row.read(in, rows[slot]);
        if (rule.scope == TokenScope::row) scales = scales_of_row(row, rule.eps);
        score_row(in, rows[slot], row, scales, rule.fallback, worker.order.data() + slot * row.padded);
    }
}

uint64_t best_of_block(const uint64_t* order) {
    uint64_t best = order[0];
    for (int j = 1; j < kTokenBlock; ++j) best = std::max(best, order[j]);
    return best;
}

// Chooses up to `limit` positions, best first; `order` loses what is chosen or too near.
void choose(const TokenRows& in, const TokenRule& rule, const std::vector<int64_t>& rows, int64_t limit,
            Worker& worker, const TokenChoice& choice, int64_t place) {
    const int64_t blocks = token_blocks(in.tokens);
    const auto begin = worker.best.begin(), end = begin + rows.size() * blocks;
    for (auto best = begin; best != end; ++best) *best = best_of_block(worker.order.data() + (best - begin) * kTokenBlock);
    for (int64_t taken = 0; taken < limit; ++taken, ++place) {
        const auto best = std::max_element(begin, end);
        if (best == end || *best == 0) return;
        const int64_t slot = (best - begin) / blocks;
        uint64_t* row = worker.order.data() + slot * worker.row.padded;
        const int64_t token = std::find(worker.order.data() + (best - begin) * kTokenBlock, row + worker.row.padded, *best) - row;
        choice.row[place] = rows[slot];
        choice.token[place] = token;
        choice.score[place] = token_score(*best);
        const int64_t reach = std::min(rule.min_distance - 1, in.tokens);
        const int64_t first = std::max<int64_t>(token - reach, 0);
        const int64_t last = std::min(token + reach, in.tokens - 1);
        std::fill(row + first, row + last + 1, 0);
        for (int64_t block = first / kTokenBlock; block <= last / kTokenBlock; ++block) {
            begin[slot * blocks + block] = best_of_block(row + block * kTokenBlock);
        }
    }
}

// The rows of each tree, by key, then index.
std::vector<std::vector<int64_t>> rows_of_trees(const TokenRows& in) {
    std::vector<std::vector<int64_t>> found(static_cast<size_t>(in.trees));
    for (int64_t r = 0; r < in.rows; ++r) {
        if (in.tree[r] < 0 || in.tree[r] >= in.trees) {
            throw std::invalid_argument("branch_tokens: got tree index " + std::to_string(in.tree[r]) +
                                        "; expected 0 to " + std::to_string(in.trees - 1));
        }
        found[in.tree[r]].push_back(r);
    }
    if (in.key) {
        for (auto& rows : found) {
            std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return in.key[a] < in.key[b]; });
        }
    }
    return found;
}

// The row is cut into kTokenLanes equal segments (the last ones padded with 0), so that a GPU takes them side by side:
// first the sum that each adds by itself, then what enters each from its right, then the positions. `x` holds position
// lane * segment + j at j * kTokenLanes + lane.
void discount_row(const FutureValue& args, int64_t row, int64_t segment, double decay, double* x) {
    const float* log_ratio = args.log_ratio + row * args.tokens;
    const uint8_t* mask = args.mask ? args.mask + row * args.tokens : nullptr;
    float* value = args.value + row * args.tokens;
    for (int lane = 0; lane < kTokenLanes; ++lane) {
        const int64_t start = lane * segment;
        const int64_t held = std::max<int64_t>(std::min(segment, args.tokens - start), 0);
        for (int64_t j = 0; j < held; ++j) {
            x[j * kTokenLanes + lane] = kept(log_ratio[start + j], mask == nullptr || mask[start + j] != 0);
        }
        for (int64_t j = held; j < segment; ++j) x[j * kTokenLanes + lane] = 0.0;
    }
    double sum[kTokenLanes] = {};
    for (int64_t j = segment - 1; j >= 0; --j) {
        for (int lane = 0; lane < kTokenLanes; ++lane) sum[lane] = x[j * kTokenLanes + lane] + args.gamma * sum[lane];
    }
    double entering = 0.0;
    for (int lane = kTokenLanes - 1; lane >= 0; --lane) {
        const double left = sum[lane] + decay * entering;
        sum[lane] = entering;
        entering = left;
    }
    for (int64_t j = segment - 1; j >= 0; --j) {
        double* __restrict at = x + j * kTokenLanes;
        for (int lane = 0; lane < kTokenLanes; ++lane) {
            sum[lane] = at[lane] + args.gamma * sum[lane];
            at[lane] = future_value_of(sum[lane], args.low, args.high);
        }
    }
    for (int lane = 0; lane < kTokenLanes; ++lane) {
        const int64_t start = lane * segment;
        for (int64_t j = 0; j < segment && start + j < args.tokens; ++j) {
            value[start + j] = static_cast<float>(x[j * kTokenLanes + lane]);
        }
    }
}

}  // namespace

void branch_tokens_cpu(const TokenRule& rule, const TokenRows& in, const TokenChoice& choice, int threads) {
    const std::vector<std::vector<int64_t>> trees = rows_of_trees(in);
    std::fill(choice.row, choice.row + in.trees * rule.count, -1);
    std::fill(choice.token, choice.token + in.trees * rule.count, -1);
    std::fill(choice.score, choice.score + in.trees * rule.count, 0.0f);
    if (in.rows * in.tokens < kWorthThreads) threads = 1;
    size_t most = 0;
    for (const auto& rows : trees) most = std::max(most, rows.size());
    // Here, because an allocation that fails among the threads would end the process.
    std::vector<Worker> workers(threads, Worker(in.tokens, most));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t tree = 0; tree < in.trees; ++tree) {
        const int64_t limit = std::min<int64_t>(in.room[tree], rule.count);
        if (limit <= 0 || trees[tree].empty()) continue;
        Worker& worker = workers[omp_get_thread_num()];
        score_tree(rule, in, trees[tree], worker);
        choose(in, rule, trees[tree], limit, worker, choice, tree * rule.count);
    }
}

void future_value_cpu(const FutureValue& args, int threads) {
    const int64_t segment = (args.tokens + kTokenLanes - 1) / kTokenLanes;
    double decay = 1.0;
    for (int64_t j = 0; j < segment; ++j) decay *= args.gamma;
    decay = segment_decay(decay, args.gamma);
    if (args.rows * args.tokens < kWorthThreads) threads = 1;
    std::vector<std::vector<double>> spaces(threads, std::vector<double>(segment * kTokenLanes));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < args.rows; ++row) {
        discount_row(args, row, segment, decay, spaces[omp_get_thread_num()].data());
    }
}

}  // namespace arpo
