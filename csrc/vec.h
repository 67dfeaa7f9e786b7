// Sixteen floats at a time, the one vector type CPU kernels are written in. The file is included by *_cpu.cpp only,
// once per instruction set, and everything in it lives in that set's namespace: the same inline function compiled with
// other instructions is another function, never a copy the linker may pick instead.
//
// F32x16 has + - * /, fma(a, b, c) = a*b + c, max and min (b if either is NaN), not_equal (true for NaN), greater
// (false for NaN), choose(mask, yes, no), and exp below. load and store move 16 adjacent floats; load_pairs reads 16
// pairs. load2/store2 move 32 adjacent elements of any Dtype, in an order of the type's own on which both agree:
// two-byte types may come as even and odd elements, which costs one instruction a vector instead of two. Stored as
// BFloat16, NaN stays NaN if it is the usual quiet one (kNan in row_sums.h) or was loaded as BFloat16: a test for
// others slows gradients by a tenth.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(ARPO_ISA_avx2) || defined(ARPO_ISA_avx512)
#include <immintrin.h>
#define ARPO_TABLE 1  // one instruction looks eight or sixteen floats up in a register, and a*b+c is rounded once
#endif

#include "dtype.h"

namespace arpo {
namespace ARPO_ISA {

#if defined(ARPO_ISA_avx512)
#include "vec_avx512.h"
#elif defined(ARPO_ISA_avx2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

// Natural exponential of d / temperature for d <= 0, as 2^n * 2^f with n + f = d * log2(e) / temperature. Relative
// error below 1.35e-7 plus the rounding of d, down to 2^-126. Below that it fades to 0, and 0 it is from 2^-127 on:
// -inf is probability 0. NaN stays NaN.
struct Exp {
    // Not vectors, of which the compiler does not see that their parts are equal and want one register.
    float scale_high, scale_low, lowest;  // scale = log2(e) / temperature, as the sum of two floats
#ifndef ARPO_TABLE
    float step_high, step_low;  // its inverse; step_high has 16 bits, so that its product with n is exact
#endif

    explicit Exp(double temperature) {
        const double scale = 1.4426950408889634 / temperature;
        scale_high = static_cast<float>(scale);
        scale_low = static_cast<float>(scale - scale_high);
        lowest = static_cast<float>(-127.0 / scale);
#ifndef ARPO_TABLE
        float step = static_cast<float>(1 / scale);
        std::uint32_t bits;
        std::memcpy(&bits, &step, sizeof bits);
        bits &= 0xffffff00u;
        std::memcpy(&step, &bits, sizeof bits);
        step_high = step;
        step_low = static_cast<float>(1 / scale - step);
#endif
    }

    // d raised to the largest value whose exponential is 0: finite, so that d * exp(d) is 0 and not NaN.
    F32x16 clamp(F32x16 d) const { return max(F32x16::set(lowest), d); }

#ifdef ARPO_TABLE
    // d must be clamped. n in steps of 1/8: adding the magic number rounds to them and leaves 8 * (n + 127) in the low
    // bits, of which the table makes 2^n.
    static constexpr float kMagic = 1572864.0f + 127.0f;

    F32x16 operator()(F32x16 d) const {
        const F32x16 magic = F32x16::set(kMagic), scale = F32x16::set(scale_high);
        const F32x16 n_biased = fma(d, scale, magic);
        return raised(n_biased, fma(d, F32x16::set(scale_low), fms(d, scale, n_biased - magic)));
    }

    // The rounding of d * scale adds an error of |d * scale| * 2^-24. Besides the step saved, two multiplications
    // become additions, of which processors with units for each do more at a time.
    F32x16 rough(F32x16 d) const {
        const F32x16 magic = F32x16::set(kMagic), scale = F32x16::set(scale_high);
        const F32x16 n_biased = fma(d, scale, magic);
        return raised(n_biased, fms(d, scale, n_biased - magic));
    }

    // 2^n * 2^f. Of the polynomial, which is small, only the last addition's rounding counts.
    static F32x16 raised(F32x16 n_biased, F32x16 f) {
        // Minimax of 2^f - 1 on [-1/16, 1/16] with the value 0 at 0: 2.7e-8 of 2^f.
        F32x16 p = F32x16::set(0.055496223f);
        p = fma(p, f, F32x16::set(0.24025764f));
        p = fma(p, f, F32x16::set(0.69314724f));
        const F32x16 power = power_of_eighths(n_biased);
        return fma(power * f, p, power);
    }
#else
    F32x16 rough(F32x16 d) const { return (*this)(d); }

    // d must be clamped. n in whole steps: n + 127 in the low bits; shifted to the exponent field that is 2^n, and 0
    // for n = -127.
    F32x16 operator()(F32x16 d) const {
        const F32x16 magic = F32x16::set(12582912.0f + 127.0f);
        const F32x16 scale = F32x16::set(scale_high), n_biased = fma(d, scale, magic);
        const F32x16 n = n_biased - magic;
        // d * scale - n: the part of d above n * step, which is small, so that two roundings do no harm.
        const F32x16 f = ((d - n * F32x16::set(step_high)) - n * F32x16::set(step_low)) * scale;
        // Minimax on [-1/2, 1/2] with p(0) = 1: relative error 2.6e-9 exact, 8.2e-8 in float32.
        F32x16 p = F32x16::set(0.00015594677824992687f);
        p = fma(p, f, F32x16::set(0.0013406643411144614f));
        p = fma(p, f, F32x16::set(0.009617692790925503f));
        p = fma(p, f, F32x16::set(0.055503103882074356f));
        p = fma(p, f, F32x16::set(0.24022652208805084f));
        p = fma(p, f, F32x16::set(0.6931472420692444f));
        p = fma(p, f, F32x16::set(1.0f));
        return p * shift_to_exponent(n_biased);
    }
#endif
};

}  // namespace ARPO_ISA
}  // namespace arpo
