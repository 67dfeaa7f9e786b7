// Token positions to branch at, and the future value of APPO. Semantics: arpo_ext/ops/branch_tokens.py.
//
// All backends choose the same positions: z-scores are float64 arithmetic in one fixed order (kTokenLanes partial sums,
// position t in lane t % kTokenLanes, added up in halves), each operation rounded once and never contracted, then
// rounded to float32; what follows are comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace arpo {

// Over which positions a z-score is taken. Codes as in arpo_ext/ops/branch_tokens.py.
enum class TokenScope : int { row = 0, tree = 1, none = 2 };

struct TokenRule {
    TokenScope scope;
    int64_t count;         // places of a tree in the result
    int64_t min_distance;  // between positions chosen in one row, at least 1
    bool fallback;
    double eps;
};

struct TokenRows {
    const float* entropy;      // [rows, tokens]
    const float* value;        // [rows, tokens] or null
    const uint8_t* mask;       // [rows, tokens] or null
    const uint8_t* candidate;  // [rows, tokens] or null
    const int64_t* tree;       // [rows]
    const int64_t* key;        // [rows] or null: the row's index
    const int32_t* room;       // [trees]
    int64_t rows;
    int64_t tokens;
    int64_t trees;
};

// [trees, count]; -1, -1, 0 where nothing was chosen.
struct TokenChoice {
    int64_t* row;
    int64_t* token;
    float* score;
};

struct FutureValue {
    const float* log_ratio;  // [rows, tokens]
    const uint8_t* mask;     // [rows, tokens] or null
    int64_t rows;
    int64_t tokens;
    double gamma;
    float low;
    float high;
    float* value;  // [rows, tokens]
};

constexpr int kTokenLanes = 32;
// Positions whose best order is kept, so that a choice does not read all of them again.
constexpr int kTokenBlock = 64;

inline ARPO_HOST_DEVICE int64_t token_blocks(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }

// float64 operations with exactly one rounding. The host file is compiled without contraction (CMakeLists.txt).
#ifdef __CUDA_ARCH__
__device__ inline double added(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double multiplied(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double divided(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline double square_root(double a) { return __dsqrt_rn(a); }
#else
inline double added(double a, double b) { return a + b; }
inline double multiplied(double a, double b) { return a * b; }
inline double divided(double a, double b) { return a / b; }
inline double square_root(double a) { return std::sqrt(a); }
#endif

ARPO_HOST_DEVICE inline bool is_finite(float x) { return x - x == 0.0f; }

struct ZScale {
    double mean;
    double inverse;  // 1 / (standard deviation + eps), or 0: all are equal
};

// From the number of positions, their mean, and the sum of their squared distances from it (biased deviation).
ARPO_HOST_DEVICE inline ZScale z_scale(double positions, double mean, double squares, double eps) {
    if (positions == 0.0) return {0.0, 0.0};
    const double deviation = added(square_root(divided(squares, positions)), eps);
    return {mean, deviation > 0.0 ? divided(1.0, deviation) : 0.0};
}

ARPO_HOST_DEVICE inline double mean_of(double positions, double sum) {
    return positions == 0.0 ? 0.0 : divided(sum, positions);
}

ARPO_HOST_DEVICE inline float z_score(const ZScale& scale, float x) {
    return static_cast<float>(multiplied(added(x, -scale.mean), scale.inverse));
}

ARPO_HOST_DEVICE inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// Larger is served first; 0 is never chosen. Bit 32: strict; below it the score in an order of unsigned integers.
// z_value is 1 where there is no value. No branches: which way they go is noise, and they kept this from being vectors.
ARPO_HOST_DEVICE inline uint64_t token_order(float z_entropy, float z_value, bool may, bool fallback) {
    const float score = product(z_entropy, z_value) + 0.0f;  // -0.0 becomes 0.0
    const uint32_t strict = static_cast<uint32_t>(z_entropy > 0.0f) & static_cast<uint32_t>(z_value > 0.0f) &
                            static_cast<uint32_t>(score > 0.0f);
    const uint32_t chosen = static_cast<uint32_t>(may) & static_cast<uint32_t>(is_finite(score)) &
                            (strict | static_cast<uint32_t>(fallback));
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits ^= (0u - (bits >> 31)) | 0x80000000u;
    return (static_cast<uint64_t>(strict & chosen) << 32) | (bits & (0u - chosen));
}

ARPO_HOST_DEVICE inline float token_score(uint64_t order) {
    uint32_t bits = static_cast<uint32_t>(order);
    bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

// e^x for |x| <= 20 to 1e-14 relative, by operations that are the same everywhere: libraries differ in the last bit.
// NaN stays NaN.
ARPO_HOST_DEVICE inline double exp_everywhere(double x) {
    constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
    const double shifted = added(multiplied(x, 1.4426950408889634), kRounder);
    const double n = added(shifted, -kRounder);
    const double r = added(added(x, -multiplied(n, 0x1.62e42feep-1)), -multiplied(n, 0x1.a39ef35793c76p-33));
    double sum = 1.0 / 39916800;
    const double coefficients[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                                   1.0 / 24,      1.0 / 6,      1.0 / 2,     1.0,        1.0};
    for (const double coefficient : coefficients) sum = added(multiplied(sum, r), coefficient);
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return multiplied(sum, power);
}

// gamma to the length of a segment, in which it may have underflowed: 0 would turn an infinity from the right into NaN,
// where gamma step by step leaves it infinite. The smallest normal number changes no finite result.
ARPO_HOST_DEVICE inline double segment_decay(double power, double gamma) {
    constexpr double kSmallest = 2.2250738585072014e-308;
    return gamma > 0.0 && power < kSmallest ? kSmallest : power;
}

// exp of the discounted sum, as published: clamped to 20 nats, then clipped around 1.
ARPO_HOST_DEVICE inline float future_value_of(double sum, float low, float high) {
    const float value = static_cast<float>(exp_everywhere(sum < -20.0 ? -20.0 : (sum > 20.0 ? 20.0 : sum)));
    return value < low ? low : (value > high ? high : value);
}

// Throws std::invalid_argument on a tree index out of range.
void branch_tokens_cpu(const TokenRule& rule, const TokenRows& rows, const TokenChoice& choice, int threads);
void future_value_cpu(const FutureValue& args, int threads);

// On a GPU rows whose tree index is out of range are left out.
int64_t branch_tokens_scratch_bytes(int64_t rows, int64_t tokens);
void branch_tokens_cuda(const TokenRule& rule, const TokenRows& rows, const TokenChoice& choice, void* scratch,
                        int device, void* stream);
void future_value_cuda(const FutureValue& args, int device, void* stream);

}  // namespace arpo
