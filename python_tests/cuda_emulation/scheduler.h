// Between scheduler.cpp, which runs the threads, and memory.cpp, which watches their accesses.
#pragma once

#include <cstdint>
#include <string>

#include "emulation.h"

namespace cuda_emulation {

// Where the running thread stands. Two accesses of one block are in order if a barrier of the block lies between them,
// or one of their warp.
struct Position {
    std::uint32_t block;    // counted over the launch, from 1
    std::uint16_t thread;   // in its block
    std::uint32_t warp_syncs;
    std::uint32_t barriers;
};
extern Position position;
extern bool kernel_runs;

constexpr int kMostThreads = 1024;
constexpr std::size_t kStack = 256 * 1024;
// One after another, by thread.
extern std::uintptr_t stacks;
// The thread whose stack holds the address; -1: none's.
inline int owner_of_stack(std::uintptr_t address) {
    return address - stacks < kMostThreads * kStack ? static_cast<int>((address - stacks) / kStack) : -1;
}

void memory_begin_launch();
void memory_begin_block(std::size_t dynamic_shared);

}  // namespace cuda_emulation
