// What the stand-ins for the CUDA headers need: blocks, barriers and warps as scheduler.cpp runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_emulation {

struct Index {
    unsigned x, y, z;
};
struct Dimensions {
    unsigned x, y, z;
    constexpr Dimensions(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs. Functions, so that reading them is no access of the kernel's.
Index thread_index();
int lane();  // in its warp
Index block_index();
Dimensions block_dimensions();
Dimensions grid_dimensions();

struct Config {
    Dimensions grid, block;
    std::size_t shared;
};
inline Config config(Dimensions grid, Dimensions block, std::size_t shared = 0, void* = nullptr) {
    return {grid, block, shared};
}

// Runs all threads of all blocks. Throws std::runtime_error where the kernel breaks a rule of CUDA.
void run(const char* kernel, const Config& config, const std::function<void()>& thread);

template <class Kernel, class... Args>
void launch(const char* name, const Config& config, const Kernel& kernel, const Args&... args) {
    run(name, config, [&] { kernel(args...); });
}

[[noreturn]] void fail(const char* what);

enum class Vote { none, any, all, count };
// Waits for the block; the vote over everybody's predicate.
int block_barrier(Vote vote, int predicate);

enum class Collective { sync, shuffle, ballot, any, all, add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor, match };
// Waits for the lanes of `mask`, which must all come to the same collective. `source` is the lane a shuffle reads.
std::uint64_t warp(Collective collective, unsigned mask, std::uint64_t value, int source);

// The block's variable declared at `site`.
void* shared(const void* site, std::size_t size, std::size_t alignment);
void* dynamic_shared();
template <class T>
T& shared_variable(const char* site) {
    return *static_cast<T*>(shared(site, sizeof(T), alignof(T) > 16 ? alignof(T) : 16));
}

// An atomic access: it races with ordinary ones of other threads, not with atomic ones.
void touch_atomically(const volatile void* address, std::size_t size);
void threadfence();

template <class T>
std::uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace cuda_emulation
