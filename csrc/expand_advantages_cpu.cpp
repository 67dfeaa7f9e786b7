// One pass: reads the mask once and writes 4 bytes a token, which is the floor; the arithmetic is one select a token.
//
// Results of some MiB are written past the caches, which saves reading the lines first and leaves the caches to others.
// Not the largest ones: malloc maps those anew, and the kernel's clearing of a page has just brought it into the cache.
#include "expand_advantages.h"

#include <cstring>

#include "vec.h"

namespace arpo::ARPO_ISA {
namespace {

using std::int64_t;

constexpr int64_t kTokensPerThread = 65536;
constexpr int64_t kStreamedBytes = 4 << 20;
constexpr int64_t kMappedBytes = 32 << 20;
constexpr int64_t kTile = 1024;

int useful_threads(int64_t tokens, int threads) {
    const int64_t useful = tokens / kTokensPerThread;
    return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// count is a multiple of 16 and `to` 64-byte aligned.
void stream(float* to, const float* from, int64_t count) {
#if defined(ARPO_ISA_avx512)
    for (int64_t i = 0; i < count; i += 16) _mm512_stream_ps(to + i, _mm512_load_ps(from + i));
#elif defined(ARPO_ISA_avx2)
    for (int64_t i = 0; i < count; i += 8) _mm256_stream_ps(to + i, _mm256_load_ps(from + i));
#else
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
#endif
}

// Makes streamed stores visible before the threads join.
void fence() {
#if defined(ARPO_ISA_avx512) || defined(ARPO_ISA_avx2)
    _mm_sfence();
#endif
}

template <class Mask>
void expand(const Mask* mask, float advantage, float* out, int64_t count) {
    for (int64_t t = 0; t < count; ++t) out[t] = masked(advantage, mask[t]);
}

template <class Mask>
void expand_streamed(const Mask* mask, float advantage, float* out, int64_t count) {
    alignas(64) float tile[kTile];
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(out) / sizeof(float) % 16);
    int64_t t = misaligned == 0 ? 0 : 16 - misaligned;
    if (t > count) t = count;
    expand(mask, advantage, out, t);
    for (; t + 16 <= count;) {
        const int64_t left = (count - t) / 16 * 16;
        const int64_t n = left < kTile ? left : kTile;
        expand(mask + t, advantage, tile, n);
        stream(out + t, tile, n);
        t += n;
    }
    expand(mask + t, advantage, out + t, count - t);
}

template <class Mask>
void expand_all(const ExpandRows& args) {
    const Mask* mask = static_cast<const Mask*>(args.mask);
    const int64_t bytes = args.rows * args.columns * static_cast<int64_t>(sizeof(float));
    const bool streamed = bytes >= kStreamedBytes && bytes <= kMappedBytes;
    const int threads = useful_threads(args.rows * args.columns, args.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t l = 0; l < args.rows; ++l) {
            const Mask* from = mask + l * args.mask_stride;
            float* to = args.out + l * args.columns;
            if (streamed) {
                expand_streamed(from, args.leaf[l], to, args.columns);
            } else {
                expand(from, args.leaf[l], to, args.columns);
            }
        }
        fence();
    }
}

}  // namespace

void expand_rows(const ExpandRows& args) {
    switch (args.mask_type) {
        case MaskType::byte:
            return expand_all<std::uint8_t>(args);
        case MaskType::int32:
            return expand_all<std::int32_t>(args);
        case MaskType::int64:
            return expand_all<std::int64_t>(args);
        case MaskType::float32:
            return expand_all<float>(args);
    }
}

// Every thread writes one part of the tokens, and finds its first leaf by adding lengths up.
void expand_packed(const ExpandPacked& args) {
    const int threads = useful_threads(args.total, args.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
        const int64_t begin = args.total / threads * part;
        const int64_t end = part + 1 == threads ? args.total : args.total / threads * (part + 1);
        int64_t first = 0;
        for (int64_t l = 0; l < args.leaves && first < end; ++l) {
            const int64_t after = first + args.length[l];
            for (int64_t t = first < begin ? begin : first; t < after && t < end; ++t) args.out[t] = args.leaf[l];
            first = after;
        }
    }
}

}  // namespace arpo::ARPO_ISA
