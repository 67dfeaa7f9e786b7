// Runs the blocks of a launch one after another, and the threads of a block as fibers: each runs until it has to wait,
// in an order the test chooses. Whatever the order, a correct kernel gives the same result.
#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_emulation {

Position position;
bool kernel_runs = false;
std::uintptr_t stacks = 0;

namespace {

constexpr int kWarp = 32;

// For __builtin_setjmp, which saves a stack and a place in the code: no signal mask, hence no system call, and nothing that
// the address sanitizer takes for the end of a stack.
using Place = void* [5];

enum class Order { forward, reverse, shuffled };
enum class State { ready, at_barrier, in_warp, finished };

struct Thread {
    State state = State::finished;
    Index index{};
    Position position{};
    // What it waits for in a warp, and what comes of it.
    Collective collective{};
    unsigned mask = 0;
    std::uint64_t value = 0;
    int source = 0;
    int predicate = 0;
    std::uint64_t result = 0;
    Place where{};
    bool started = false;
};

struct Warp {
    unsigned waiting = 0, finished = 0;  // by lane
};

struct Machine {
    Order order = Order::forward;
    std::uint64_t seed = 0;
    int multiprocessors = 132;
    cudaError_t error = cudaSuccess;

    std::vector<Thread> threads{kMostThreads};
    Warp warps[kMostThreads / kWarp];
    int count = 0, current = 0;
    Index block{};
    Dimensions block_size, grid_size;
    const std::function<void()>* body = nullptr;
    const char* kernel = "";
    Vote vote = Vote::none;
    std::exception_ptr failure;
    Place scheduler{};
};
Machine machine;

std::uint64_t random_number() {
    machine.seed = machine.seed * 6364136223846793005ull + 1442695040888963407ull;
    return machine.seed >> 33;
}

void arrange(std::vector<std::int64_t>& order) {
    std::iota(order.begin(), order.end(), 0);
    if (machine.order == Order::reverse) std::reverse(order.begin(), order.end());
    if (machine.order != Order::shuffled) return;
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

char* stack_of(int thread) { return reinterpret_cast<char*>(stacks) + thread * kStack; }

// Not known to the compiler, which would leave out the place after the call if it knew that the call never comes back.
__attribute__((noipa)) void jump(Place& place) { __builtin_longjmp(place, 1); }

__attribute__((noipa)) void yield() {
    if (__builtin_setjmp(machine.threads[machine.current].where) == 0) jump(machine.scheduler);
}

// Serves one thread after another; the stack is kept for the next block.
void fiber() {
    for (;;) {
        (*machine.body)();
        machine.threads[machine.current].state = State::finished;
        machine.warps[machine.current / kWarp].finished |= 1u << machine.current % kWarp;
        yield();
    }
}

__attribute__((noipa)) void resume(int index) {
    Thread& thread = machine.threads[index];
    machine.current = index;
    position = thread.position;
    if (__builtin_setjmp(machine.scheduler) == 0) {
        if (thread.started) jump(thread.where);
        thread.started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = stack_of(index);
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, fiber, 0);
        setcontext(&context);
    }
    machine.threads[machine.current].position = position;
}

std::string waiting() {
    int at_barrier = 0, in_warp = 0, finished = 0;
    for (int i = 0; i < machine.count; ++i) {
        const State state = machine.threads[i].state;
        at_barrier += state == State::at_barrier;
        in_warp += state == State::in_warp;
        finished += state == State::finished;
    }
    std::ostringstream text;
    text << at_barrier << " threads wait at __syncthreads, " << in_warp << " in a warp collective, " << finished
         << " have finished";
    return text.str();
}

void run_block(const Index& block, std::uint32_t serial, std::vector<std::int64_t>& order) {
    machine.block = block;
    std::fill(std::begin(machine.warps), std::end(machine.warps), Warp{});
    for (int i = 0; i < machine.count; ++i) {
        Thread& thread = machine.threads[i];
        thread.state = State::ready;
        thread.position = {serial, static_cast<std::uint16_t>(i), 0, 0};
    }
    arrange(order);
    for (bool moved = true; moved;) {
        moved = false;
        for (const std::int64_t i : order) {
            if (machine.threads[i].state != State::ready) continue;
            moved = true;
            resume(static_cast<int>(i));
            if (machine.failure) return;
        }
        if (machine.order == Order::shuffled) arrange(order);
    }
    const auto finished = [](const Thread& thread) { return thread.state == State::finished; };
    if (!std::all_of(machine.threads.begin(), machine.threads.begin() + machine.count, finished)) {
        throw std::runtime_error(std::string(machine.kernel) + ": deadlock, " + waiting());
    }
}

void run_blocks(const Config& config) {
    const Dimensions& grid = config.grid;
    std::vector<std::int64_t> blocks(static_cast<std::size_t>(grid.x) * grid.y * grid.z), threads(machine.count);
    arrange(blocks);
    std::uint32_t serial = 0;
    for (const std::int64_t block : blocks) {
        memory_begin_block(config.shared);
        const std::int64_t plane = static_cast<std::int64_t>(grid.x) * grid.y;
        const Index index{static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block % plane / grid.x),
                          static_cast<unsigned>(block / plane)};
        run_block(index, ++serial, threads);
        if (machine.failure) std::rethrow_exception(machine.failure);
    }
}

std::uint64_t combined(const Thread& one, int first, int lane) {
    std::uint64_t result = one.collective == Collective::all ? 1 : 0;
    bool any = false;
    for (int other = 0; other < kWarp; ++other) {
        if ((one.mask >> other & 1) == 0) continue;
        const std::uint64_t value = machine.threads[first + other].value;
        const auto word = static_cast<std::uint32_t>(value), so_far = static_cast<std::uint32_t>(result);
        const auto number = static_cast<std::int32_t>(word), number_so_far = static_cast<std::int32_t>(so_far);
        switch (one.collective) {
            case Collective::sync:
            case Collective::shuffle: break;
            case Collective::ballot: result |= (value & 1) << other; break;
            case Collective::any: result |= value; break;
            case Collective::all: result &= value; break;
            case Collective::add: result = so_far + word; break;
            case Collective::min: result = any ? std::min(so_far, word) : word; break;
            case Collective::max: result = any ? std::max(so_far, word) : word; break;
            case Collective::min_signed: result = any ? std::min(number_so_far, number) : number; break;
            case Collective::max_signed: result = any ? std::max(number_so_far, number) : number; break;
            case Collective::bit_and: result = any ? so_far & word : word; break;
            case Collective::bit_or: result = so_far | word; break;
            case Collective::bit_xor: result = so_far ^ word; break;
            case Collective::match:
                result |= static_cast<std::uint64_t>(value == machine.threads[first + lane].value) << other;
                break;
        }
        any = true;
    }
    return result;
}

// What a shuffle reads from a lane that takes no part is anything.
std::uint64_t shuffled(const Thread& one, int first, int source) {
    return (one.mask >> source & 1) != 0 ? machine.threads[first + source].value : 0xffffffffffffffffull;
}

// Everybody in the mask is there.
void meet(const Thread& one, int first) {
    std::uint32_t syncs = 0;
    for (unsigned left = one.mask; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        Thread& thread = machine.threads[first + lane];
        if (thread.collective != one.collective || thread.mask != one.mask) {
            fail("meets a lane of its mask in another warp collective");
        }
        thread.result = one.collective == Collective::shuffle ? shuffled(one, first, thread.source)
                                                              : combined(one, first, lane);
        syncs = std::max(syncs, thread.position.warp_syncs);
    }
    if (syncs >> 14 != 0) fail("comes to more barriers than the emulation can count");
    for (unsigned left = one.mask; left != 0; left &= left - 1) {
        Thread& thread = machine.threads[first + __builtin_ctz(left)];
        thread.state = State::ready;
        // Shuffles and votes order no memory accesses.
        if (one.collective == Collective::sync) thread.position.warp_syncs = syncs + 1;
    }
    machine.warps[first / kWarp].waiting &= ~one.mask;
    position = machine.threads[machine.current].position;
}

}  // namespace

Index thread_index() { return machine.threads[machine.current].index; }
int lane() { return machine.current % kWarp; }
Index block_index() { return machine.block; }
Dimensions block_dimensions() { return machine.block_size; }
Dimensions grid_dimensions() { return machine.grid_size; }

// Leaves the thread without unwinding its stack: the compiler takes the calls that watch memory for calls that never
// throw.
void fail(const char* what) {
    std::ostringstream text;
    text << machine.kernel << ": thread " << machine.current << " of block " << machine.block.x << " " << what;
    machine.failure = std::make_exception_ptr(std::runtime_error(text.str()));
    __builtin_longjmp(machine.scheduler, 1);
}

int block_barrier(Vote vote, int predicate) {
    Thread& self = machine.threads[machine.current];
    self.predicate = predicate != 0;
    self.state = State::at_barrier;
    self.position = position;
    machine.vote = vote;
    int votes = 0;
    for (int i = 0; i < machine.count; ++i) {
        if (machine.threads[i].state == State::finished) fail("waits at __syncthreads for threads that have finished");
        if (machine.threads[i].state != State::at_barrier) {
            yield();
            return static_cast<int>(self.result);
        }
        votes += machine.threads[i].predicate;
    }
    const int result = vote == Vote::any ? votes > 0 : vote == Vote::all ? votes == machine.count : votes;
    for (int i = 0; i < machine.count; ++i) {
        Thread& thread = machine.threads[i];
        thread.state = State::ready;
        thread.result = static_cast<std::uint64_t>(result);
        if (++thread.position.barriers >> 15 != 0) fail("comes to more barriers than the emulation can count");
    }
    position = self.position;
    return result;
}

std::uint64_t warp(Collective collective, unsigned mask, std::uint64_t value, int source) {
    Thread& self = machine.threads[machine.current];
    Warp& warp = machine.warps[machine.current / kWarp];
    const int lane = machine.current % kWarp, first = machine.current - lane;
    if ((mask >> lane & 1) == 0) fail("calls a warp collective whose mask leaves it out");
    if ((mask & warp.finished) != 0) fail("waits in a warp collective for a lane that has finished");
    if (machine.count - first < kWarp && mask >> (machine.count - first) != 0) {
        fail("names a lane in a warp mask that the block does not have");
    }
    self.collective = collective;
    self.mask = mask;
    self.value = value;
    self.source = source;
    self.state = State::in_warp;
    self.position = position;
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) == mask) {
        meet(self, first);
    } else {
        yield();
    }
    return self.result;
}

void run(const char* kernel, const Config& config, const std::function<void()>& thread) {
    static std::mutex one_launch;
    const std::lock_guard<std::mutex> lock(one_launch);
    const Dimensions& grid = config.grid;
    const Dimensions& block = config.block;
    const std::uint64_t count = static_cast<std::uint64_t>(block.x) * block.y * block.z;
    if (count == 0 || count > kMostThreads || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 ||
        grid.z == 0 || grid.z > 65535) {
        machine.error = cudaErrorInvalidConfiguration;
        return;
    }
    if (stacks == 0) {
        void* mapped = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        stacks = reinterpret_cast<std::uintptr_t>(mapped);
    }
    machine.kernel = kernel;
    machine.count = static_cast<int>(count);
    machine.body = &thread;
    machine.failure = nullptr;
    machine.grid_size = grid;
    machine.block_size = block;
    for (int i = 0; i < machine.count; ++i) {
        const unsigned n = static_cast<unsigned>(i);
        machine.threads[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    }
    memory_begin_launch();
    kernel_runs = true;
    try {
        run_blocks(config);
    } catch (...) {
        kernel_runs = false;
        // Threads that still wait are given up with their stacks.
        machine.threads.assign(kMostThreads, Thread{});
        throw;
    }
    kernel_runs = false;
}

}  // namespace cuda_emulation

cudaError_t cudaGetLastError() {
    const cudaError_t error = cuda_emulation::machine.error;
    cuda_emulation::machine.error = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = cuda_emulation::machine.multiprocessors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t size, cudaStream_t) {
    std::memset(address, value, size);
    return cudaSuccess;
}

// For the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) void cuda_emulation_configure(int order, std::uint64_t seed,
                                                                                int multiprocessors) {
    cuda_emulation::machine.order = static_cast<cuda_emulation::Order>(order);
    cuda_emulation::machine.seed = seed;
    cuda_emulation::machine.multiprocessors = multiprocessors;
}
