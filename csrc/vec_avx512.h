// F32x16 in one 512-bit register. Included by vec.h, inside the namespace.

struct F32x16 {
    __m512 v;
    static F32x16 set(float x) { return {_mm512_set1_ps(x)}; }
};
using Mask16 = __mmask16;

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 fms(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }

inline Mask16 not_equal(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
inline Mask16 greater(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask16 both(Mask16 a, Mask16 b) { return _kand_mask16(a, b); }
inline F32x16 choose(Mask16 m, F32x16 yes, F32x16 no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline int count(Mask16 m) { return __builtin_popcount(m); }
// a where the mask is set, 0 elsewhere.
inline F32x16 keep(Mask16 m, F32x16 a) { return {_mm512_maskz_mov_ps(m, a.v)}; }

inline F32x16 shift_to_exponent(F32x16 a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}

// 2^(k/8 - 127) for an integer 0 <= k < 2040 in the low bits; the table holds what 2^(j/8) has above the line 1 + j/8.
inline F32x16 power_of_eighths(F32x16 k) {
    const __m512i table = _mm512_broadcast_i32x8(_mm256_setr_epi32(
        0, -289342, -509968, -655657, -719629, -694486, -572163, -343865));
    const __m512i bits = _mm512_castps_si512(k.v);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 20), _mm512_permutexvar_epi32(bits, table)))};
}

inline float sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void load_pairs(const float* p, F32x16& even, F32x16& odd) {
    const __m512 first = _mm512_loadu_ps(p), second = _mm512_loadu_ps(p + 16);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even.v = _mm512_permutex2var_ps(first, evens, second);
    odd.v = _mm512_permutex2var_ps(first, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), second);
}

inline void load2(const float* p, F32x16& a, F32x16& b) {
    a.v = _mm512_loadu_ps(p);
    b.v = _mm512_loadu_ps(p + 16);
}

inline void load2(const BFloat16* p, F32x16& even, F32x16& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline void load2(const Half* p, F32x16& a, F32x16& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}

// Nearest-even bfloat16 in the high half of each 32-bit lane. Of the NaNs, one whose payload is all ones becomes 0.
inline __m512i round_bfloat16(F32x16 a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

inline __m512i pack(const BFloat16*, F32x16 even, F32x16 odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bfloat16(even), 16), round_bfloat16(odd));
}

inline __m512i pack(const Half*, F32x16 a, F32x16 b) {
    const __m256i low = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline void store2(float* p, F32x16 a, F32x16 b) {
    _mm512_storeu_ps(p, a.v);
    _mm512_storeu_ps(p + 16, b.v);
}
template <class T>
inline void store2(T* p, F32x16 a, F32x16 b) {
    _mm512_storeu_si512(p, pack(p, a, b));
}

// Past the caches; p must be 64-byte aligned. Call stream_fence before another thread reads.
inline void stream2(float* p, F32x16 a, F32x16 b) {
    _mm512_stream_ps(p, a.v);
    _mm512_stream_ps(p + 16, b.v);
}
template <class T>
inline void stream2(T* p, F32x16 a, F32x16 b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack(p, a, b));
}
inline void stream_fence() { _mm_sfence(); }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
