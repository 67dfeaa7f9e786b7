// Stands in for CUDA's header of this name: what csrc/*.cu and *.cuh use of the language and of the runtime.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

using dim3 = cuda_emulation::Dimensions;
#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
#define blockDim (::cuda_emulation::block_dimensions())
#define gridDim (::cuda_emulation::grid_dimensions())
constexpr int warpSize = 32;

// The runtime.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t size, cudaStream_t stream);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
    return cudaSuccess;
}

// Barriers, votes and shuffles.

inline void __syncthreads() { cuda_emulation::block_barrier(cuda_emulation::Vote::none, 0); }
inline int __syncthreads_or(int x) { return cuda_emulation::block_barrier(cuda_emulation::Vote::any, x); }
inline int __syncthreads_and(int x) { return cuda_emulation::block_barrier(cuda_emulation::Vote::all, x); }
inline int __syncthreads_count(int x) { return cuda_emulation::block_barrier(cuda_emulation::Vote::count, x); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_emulation::warp(cuda_emulation::Collective::sync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
    return static_cast<unsigned>(cuda_emulation::warp(cuda_emulation::Collective::ballot, mask, x != 0, 0));
}
inline int __any_sync(unsigned mask, int x) {
    return static_cast<int>(cuda_emulation::warp(cuda_emulation::Collective::any, mask, x != 0, 0));
}
inline int __all_sync(unsigned mask, int x) {
    return static_cast<int>(cuda_emulation::warp(cuda_emulation::Collective::all, mask, x != 0, 0));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
    const std::uint64_t bits = cuda_emulation::to_bits(x);
    return static_cast<unsigned>(cuda_emulation::warp(cuda_emulation::Collective::match, mask, bits, 0));
}

namespace cuda_emulation {
// A lane outside its segment of `width` lanes reads itself.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
    const int first = lane() / width * width;
    const int from = source < first || source >= first + width ? lane() : source;
    return from_bits<T>(warp(Collective::shuffle, mask, to_bits(value), from));
}
template <class T>
T reduce(Collective unsigned_kind, Collective signed_kind, unsigned mask, T value) {
    static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "__reduce_*_sync takes 32-bit integers");
    const Collective kind = std::is_signed<T>::value ? signed_kind : unsigned_kind;
    return static_cast<T>(warp(kind, mask, static_cast<std::uint32_t>(value), 0));
}
}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() / width * width + source % width, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() - static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() + static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() ^ lanes, width);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return cuda_emulation::reduce(cuda_emulation::Collective::add, cuda_emulation::Collective::add, mask, value);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return cuda_emulation::reduce(cuda_emulation::Collective::min, cuda_emulation::Collective::min_signed, mask, value);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return cuda_emulation::reduce(cuda_emulation::Collective::max, cuda_emulation::Collective::max_signed, mask, value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return static_cast<unsigned>(cuda_emulation::warp(cuda_emulation::Collective::bit_and, mask, value, 0));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return static_cast<unsigned>(cuda_emulation::warp(cuda_emulation::Collective::bit_or, mask, value, 0));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return static_cast<unsigned>(cuda_emulation::warp(cuda_emulation::Collective::bit_xor, mask, value, 0));
}

// Atomics: no other thread runs in between, so plain code does.

namespace cuda_emulation {
template <class T, class Change>
__attribute__((no_sanitize("thread"))) T change_atomically(T* address, const Change& change) {
    touch_atomically(address, sizeof(T));
    const T old = *address;
    *address = change(old);
    return old;
}
}  // namespace cuda_emulation

template <class T>
struct NotDeduced {
    using type = T;
};
template <class T>
using Same = typename NotDeduced<T>::type;

template <class T>
T atomicAdd(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* address, Same<T> value) {
    static_assert(std::is_integral<T>::value, "CUDA has integer atomicMin only");
    return cuda_emulation::change_atomically(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, Same<T> value) {
    static_assert(std::is_integral<T>::value, "CUDA has integer atomicMax only");
    return cuda_emulation::change_atomically(address, [&](T old) { return value > old ? value : old; });
}
template <class T>
T atomicAnd(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, Same<T> expected, Same<T> value) {
    return cuda_emulation::change_atomically(address, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { cuda_emulation::threadfence(); }
inline void __threadfence_block() { cuda_emulation::threadfence(); }

// Loads and stores with a cache hint; CUDA faults where the address is not aligned to the size of the type.

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_emulation {
template <class T>
T load(const T* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) fail("loads from a misaligned address");
    return *address;
}
template <class T>
void store(T* address, const T& value) {
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) fail("stores to a misaligned address");
    *address = value;
}
}  // namespace cuda_emulation

#define CUDA_EMULATION_LOAD(name) \
    template <class T>            \
    T name(const T* address) {    \
        return cuda_emulation::load(address); \
    }
#define CUDA_EMULATION_STORE(name)              \
    template <class T>                          \
    void name(T* address, const Same<T>& value) { \
        cuda_emulation::store(address, value);  \
    }
CUDA_EMULATION_LOAD(__ldg)
CUDA_EMULATION_LOAD(__ldca)
CUDA_EMULATION_LOAD(__ldcg)
CUDA_EMULATION_LOAD(__ldcs)
CUDA_EMULATION_LOAD(__ldlu)
CUDA_EMULATION_LOAD(__ldcv)
CUDA_EMULATION_STORE(__stcg)
CUDA_EMULATION_STORE(__stcs)
CUDA_EMULATION_STORE(__stwb)
CUDA_EMULATION_STORE(__stwt)
#undef CUDA_EMULATION_LOAD
#undef CUDA_EMULATION_STORE

// Arithmetic. The approximate functions are off by as much as CUDA allows them to be.

using std::max;
using std::min;
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __float_as_int(float x) { return cuda_emulation::from_bits<int>(cuda_emulation::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cuda_emulation::from_bits<unsigned>(cuda_emulation::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_emulation::from_bits<float>(cuda_emulation::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulation::from_bits<float>(cuda_emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) {
    return cuda_emulation::from_bits<long long>(cuda_emulation::to_bits(x));
}
inline double __longlong_as_double(long long x) { return cuda_emulation::from_bits<double>(cuda_emulation::to_bits(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

namespace cuda_emulation {
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
// Up to 2^-22 relative to either side, by the last bit of the argument; whole powers are exact.
inline float approximately(double exact, float argument) {
    const float sign = (__float_as_uint(argument) & 1) != 0 ? 1.0f : -1.0f;
    return argument == rintf(argument) ? static_cast<float>(exact)
                                       : static_cast<float>(exact * (1.0 + sign * 0x1p-23));
}
// Instructions as the sources spell them in asm("..."): results first.
namespace ptx {
inline void max_NaN_f32(float& result, float a, float b) { result = isnan(a) || isnan(b) ? NAN : fmaxf(a, b); }
inline void ex2_approx_ftz_f32(float& result, float x) {
    result = flushed(approximately(exp2(static_cast<double>(flushed(x))), flushed(x)));
}
inline void lg2_approx_ftz_f32(float& result, float x) {
    result = static_cast<float>(log2(static_cast<double>(flushed(x))) + 0x1p-23);
}
}  // namespace ptx
}  // namespace cuda_emulation
inline float __expf(float x) {
    float result;
    cuda_emulation::ptx::ex2_approx_ftz_f32(result, x * 1.44269504f);
    return result;
}
