// F32x16 in four 16-byte vectors of the compiler: SSE2 on x86, NEON on ARM, nothing assumed. Included by vec.h, inside
// the namespace.

typedef float F4 __attribute__((vector_size(16)));
typedef std::int32_t I4 __attribute__((vector_size(16)));
typedef std::uint32_t U4 __attribute__((vector_size(16)));

struct F32x16 {
    F4 part[4];
    static F32x16 set(float x) {
        const F4 four = {x, x, x, x};
        return {{four, four, four, four}};
    }
};
struct Mask16 {
    I4 part[4];
};

inline U4 bits(F4 a) { return reinterpret_cast<U4>(a); }
inline F4 from_bits(U4 a) { return reinterpret_cast<F4>(a); }
inline F4 choose(I4 mask, F4 yes, F4 no) {
    return reinterpret_cast<F4>((reinterpret_cast<I4>(yes) & mask) | (reinterpret_cast<I4>(no) & ~mask));
}

template <class Function>
inline F32x16 each(Function function) {
    return {{function(0), function(1), function(2), function(3)}};
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
}
// Two roundings: the baseline has no fused instruction, and a library call per element would cost 20 times as much.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return each([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
}
inline F32x16 fms(F32x16 a, F32x16 b, F32x16 c) {
    return each([&](int i) { return a.part[i] * b.part[i] - c.part[i]; });
}
inline F32x16 max(F32x16 a, F32x16 b) {
    return each([&](int i) { return choose(a.part[i] > b.part[i], a.part[i], b.part[i]); });
}
inline F32x16 min(F32x16 a, F32x16 b) {
    return each([&](int i) { return choose(a.part[i] < b.part[i], a.part[i], b.part[i]); });
}

inline Mask16 not_equal(F32x16 a, F32x16 b) {
    return {{a.part[0] != b.part[0], a.part[1] != b.part[1], a.part[2] != b.part[2], a.part[3] != b.part[3]}};
}
inline Mask16 greater(F32x16 a, F32x16 b) {
    return {{a.part[0] > b.part[0], a.part[1] > b.part[1], a.part[2] > b.part[2], a.part[3] > b.part[3]}};
}
inline Mask16 both(Mask16 a, Mask16 b) {
    return {{a.part[0] & b.part[0], a.part[1] & b.part[1], a.part[2] & b.part[2], a.part[3] & b.part[3]}};
}
inline F32x16 choose(Mask16 m, F32x16 yes, F32x16 no) {
    return each([&](int i) { return choose(m.part[i], yes.part[i], no.part[i]); });
}
inline int count(Mask16 m) {
    const I4 total = m.part[0] + m.part[1] + m.part[2] + m.part[3];
    return -(total[0] + total[1] + total[2] + total[3]);
}
// a where the mask is set, 0 elsewhere.
inline F32x16 keep(Mask16 m, F32x16 a) {
    return each([&](int i) { return reinterpret_cast<F4>(reinterpret_cast<I4>(a.part[i]) & m.part[i]); });
}

inline F32x16 shift_to_exponent(F32x16 a) {
    return each([&](int i) { return from_bits(bits(a.part[i]) << 23); });
}

inline float sum(F32x16 a) {
    const F4 four = (a.part[0] + a.part[1]) + (a.part[2] + a.part[3]);
    return (four[0] + four[1]) + (four[2] + four[3]);
}
inline float largest(F32x16 a) {
    float found = a.part[0][0];
    for (const F4& four : a.part) {
        for (int i = 0; i < 4; ++i) found = found > four[i] ? found : four[i];
    }
    return found;
}

template <class V>
inline V load_bits(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline F32x16 load(const float* p) {
    F32x16 a;
    std::memcpy(a.part, p, sizeof a.part);
    return a;
}
inline void store(float* p, F32x16 a) { std::memcpy(p, a.part, sizeof a.part); }
inline void load_pairs(const float* p, F32x16& even, F32x16& odd) {
    const F32x16 first = load(p), second = load(p + 16);
    for (int i = 0; i < 4; ++i) {
        const F4 *four = i < 2 ? first.part + 2 * i : second.part + 2 * (i - 2);
        even.part[i] = F4{four[0][0], four[0][2], four[1][0], four[1][2]};
        odd.part[i] = F4{four[0][1], four[0][3], four[1][1], four[1][3]};
    }
}

inline void load2(const float* p, F32x16& a, F32x16& b) {
    a = each([&](int i) { return load_bits<F4>(p + 4 * i); });
    b = each([&](int i) { return load_bits<F4>(p + 16 + 4 * i); });
}

// Each 32-bit lane holds an even element below and an odd one above (little-endian).
inline void load2(const BFloat16* p, F32x16& even, F32x16& odd) {
    even = each([&](int i) { return from_bits(load_bits<U4>(p + 8 * i) << 16); });
    odd = each([&](int i) { return from_bits(load_bits<U4>(p + 8 * i) & 0xffff0000u); });
}

// Value of a float16 in the low half of each lane. Scaling by 2^112 moves the exponent and normalises denormals.
inline F4 half_to_float(U4 half) {
    const U4 magnitude = (half & 0x7fffu) << 13;
    const U4 not_finite = reinterpret_cast<U4>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    const F4 scaled = from_bits(magnitude) * 0x1p112f;
    return from_bits(bits(scaled) | not_finite | ((half & 0x8000u) << 16));
}
inline void load2(const Half* p, F32x16& even, F32x16& odd) {
    even = each([&](int i) { return half_to_float(load_bits<U4>(p + 8 * i) & 0xffffu); });
    odd = each([&](int i) { return half_to_float(load_bits<U4>(p + 8 * i) >> 16); });
}

// Nearest-even bfloat16 in the low half of each lane; NaN stays NaN.
inline U4 narrow(const BFloat16*, F4 a) {
    const U4 rounded = (bits(a) + 0x7fffu + ((bits(a) >> 16) & 1u)) >> 16;
    const U4 nan = reinterpret_cast<U4>(a != a);
    return (nan & 0x7fc0u) | (~nan & rounded);
}

// Nearest-even float16 in the low half of each lane; too large becomes infinity.
inline U4 narrow(const Half*, F4 a) {
    const U4 sign = (bits(a) >> 16) & 0x8000u;
    const U4 magnitude = bits(a) & 0x7fffffffu;
    const U4 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 makes the hardware round a float16 denormal at its last bit.
    const U4 denormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const U4 is_small = reinterpret_cast<U4>(magnitude < 0x38800000u);
    const U4 is_large = reinterpret_cast<U4>(magnitude >= 0x477ff000u);
    const U4 is_nan = reinterpret_cast<U4>(magnitude > 0x7f800000u);
    const U4 finite = (is_small & denormal) | (~is_small & normal);
    const U4 special = 0x7c00u | (is_nan & 0x0200u);
    return sign | (is_large & special) | (~is_large & finite);
}

inline void store2(float* p, F32x16 a, F32x16 b) {
    std::memcpy(p, a.part, sizeof a.part);
    std::memcpy(p + 16, b.part, sizeof b.part);
}
template <class T>
inline void store2(T* p, F32x16 even, F32x16 odd) {
    for (int i = 0; i < 4; ++i) {
        const U4 both = narrow(p, even.part[i]) | (narrow(p, odd.part[i]) << 16);
        std::memcpy(p + 8 * i, &both, sizeof both);
    }
}

template <class T>
inline void stream2(T* p, F32x16 a, F32x16 b) {
    store2(p, a, b);
}
inline void stream_fence() {}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
