// F32x16 in two 256-bit registers (AVX2, FMA, F16C). Included by vec.h, inside the namespace.

struct F32x16 {
    __m256 lo, hi;
    static F32x16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
};
struct Mask16 {
    __m256 lo, hi;
};

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 fms(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

inline Mask16 not_equal(F32x16 a, F32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_NEQ_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NEQ_UQ)};
}
inline Mask16 greater(F32x16 a, F32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Mask16 both(Mask16 a, Mask16 b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
inline F32x16 choose(Mask16 m, F32x16 yes, F32x16 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline int count(Mask16 m) {
    return __builtin_popcount(_mm256_movemask_ps(m.lo)) + __builtin_popcount(_mm256_movemask_ps(m.hi));
}
// a where the mask is set, 0 elsewhere.
inline F32x16 keep(Mask16 m, F32x16 a) { return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)}; }

inline __m256 shift_to_exponent(__m256 a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
inline F32x16 shift_to_exponent(F32x16 a) { return {shift_to_exponent(a.lo), shift_to_exponent(a.hi)}; }

// 2^(k/8 - 127) for an integer 0 <= k < 2040 in the low bits; the table holds what 2^(j/8) has above the line 1 + j/8.
inline __m256 power_of_eighths(__m256 k) {
    const __m256i table = _mm256_setr_epi32(0, -289342, -509968, -655657, -719629, -694486, -572163, -343865);
    const __m256i bits = _mm256_castps_si256(k);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(table, bits)));
}
inline F32x16 power_of_eighths(F32x16 k) { return {power_of_eighths(k.lo), power_of_eighths(k.hi)}; }

inline float sum(F32x16 a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(F32x16 a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
// Four pairs a register: the halves in order 0 1 4 5 | 2 3 6 7 after the shuffle, put right by the permutation.
inline __m256 in_order(__m256 a) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}
inline void load_pairs(const float* p, F32x16& even, F32x16& odd) {
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    const __m256 c = _mm256_loadu_ps(p + 16), d = _mm256_loadu_ps(p + 24);
    even = {in_order(_mm256_shuffle_ps(a, b, 0x88)), in_order(_mm256_shuffle_ps(c, d, 0x88))};
    odd = {in_order(_mm256_shuffle_ps(a, b, 0xdd)), in_order(_mm256_shuffle_ps(c, d, 0xdd))};
}

inline void load2(const float* p, F32x16& a, F32x16& b) {
    a = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    b = {_mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24)};
}

inline __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256 even_bfloat16(__m256i both) { return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)); }
inline __m256 odd_bfloat16(__m256i both) {
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void load2(const BFloat16* p, F32x16& even, F32x16& odd) {
    const __m256i first = load_bits(p), second = load_bits(p + 16);
    even = {even_bfloat16(first), even_bfloat16(second)};
    odd = {odd_bfloat16(first), odd_bfloat16(second)};
}

inline __m256 half_to_float(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void load2(const Half* p, F32x16& a, F32x16& b) {
    a = {half_to_float(p), half_to_float(p + 8)};
    b = {half_to_float(p + 16), half_to_float(p + 24)};
}

// Nearest-even bfloat16 in the high half of each 32-bit lane. Of the NaNs, one whose payload is all ones becomes 0.
inline __m256i round_bfloat16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

inline __m256i pack(const BFloat16*, __m256 even, __m256 odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_bfloat16(even), 16), round_bfloat16(odd), 0xaa);
}
// 32 elements as two registers, in the order of memory.
inline void pack(const BFloat16* type, F32x16 even, F32x16 odd, __m256i& first, __m256i& second) {
    first = pack(type, even.lo, odd.lo);
    second = pack(type, even.hi, odd.hi);
}
inline __m256i round_half(F32x16 a) {
    const __m128i low = _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT), 1);
}
inline void pack(const Half*, F32x16 a, F32x16 b, __m256i& first, __m256i& second) {
    first = round_half(a);
    second = round_half(b);
}

inline void store2(float* p, F32x16 a, F32x16 b) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
    _mm256_storeu_ps(p + 16, b.lo);
    _mm256_storeu_ps(p + 24, b.hi);
}
template <class T>
inline void store2(T* p, F32x16 a, F32x16 b) {
    __m256i first, second;
    pack(p, a, b, first, second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), second);
}

// Past the caches; p must be 64-byte aligned. Call stream_fence before another thread reads.
inline void stream2(float* p, F32x16 a, F32x16 b) {
    _mm256_stream_ps(p, a.lo);
    _mm256_stream_ps(p + 8, a.hi);
    _mm256_stream_ps(p + 16, b.lo);
    _mm256_stream_ps(p + 24, b.hi);
}
template <class T>
inline void stream2(T* p, F32x16 a, F32x16 b) {
    __m256i first, second;
    pack(p, a, b, first, second);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), first);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), second);
}
inline void stream_fence() { _mm_sfence(); }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
