// Watches every access of the kernels. They are compiled with -fsanitize=thread, which puts a call before each load and
// store; the functions called are these here, not libtsan's. Reported are: races between threads of a block without a
// barrier between them, and between blocks; shared memory read before it was written, or past its end; another
// thread's local memory; and the zones around tensors that a test has fenced.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace cuda_emulation {
namespace {

constexpr std::uintptr_t kPage = 4096;
constexpr std::uintptr_t kGranule = 2;  // the smallest element
constexpr std::size_t kArena = 256 * 1024, kGap = 64;

// The accesses to remember of one granule: the last one, and whether it stands for several threads of its block at one
// barrier, or for several blocks. In 8 bytes, because every access of every kernel reads and writes them.
struct Accesses {
    std::uint64_t block : 22, thread : 10, barriers : 15, warp_syncs : 14;  // block 0: none
    std::uint64_t several_threads : 1, several_blocks : 1, atomic : 1;

    bool any() const { return block != 0; }
    // Whether all of them are in order with an access here and now.
    bool before(const Position& now) const {
        if (!any()) return true;
        if (several_blocks || block != now.block) return false;
        if (barriers < now.barriers) return true;
        if (several_threads) return false;
        return thread == now.thread || (thread / 32 == now.thread / 32 && warp_syncs < now.warp_syncs);
    }
    void add(const Position& now, bool is_atomic) {
        const bool replaces = before(now);
        several_blocks = !replaces && (several_blocks || block != now.block);
        several_threads = !replaces;
        atomic = is_atomic && (replaces || atomic);
        block = now.block;
        thread = now.thread;
        barriers = now.barriers;
        warp_syncs = now.warp_syncs;
    }
};
static_assert(sizeof(Accesses) == 8, "one word");

struct Cell {
    Accesses writes, reads;
};

struct Page {
    std::uintptr_t number = 0;
    std::uint64_t serial = 0;  // of the launch, or of the block for shared memory, that the cells tell about
    bool fenced = false;
    Cell cells[kPage / kGranule];
};

struct Memory {
    std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages;
    Page* latest[64] = {};
    std::uint64_t launches = 0, blocks = 0, blocks_of_launch = 0;
    std::map<std::uintptr_t, std::uintptr_t> fences;  // begin -> end of what no kernel may touch

    alignas(kPage) unsigned char arena[kArena];
    bool in_variable[kArena];
    std::size_t used = 0;
    std::unordered_map<const void*, void*> variables;
};
Memory memory;

bool is_shared(std::uintptr_t address) {
    return address - reinterpret_cast<std::uintptr_t>(memory.arena) < kArena;
}

bool touches_fence(std::uintptr_t begin, std::uintptr_t end) {
    auto next = memory.fences.lower_bound(end);
    return next != memory.fences.begin() && (--next)->second > begin;
}

Page& page_of(std::uintptr_t address) {
    const std::uintptr_t number = address / kPage;
    Page*& latest = memory.latest[number % 64];
    if (latest == nullptr || latest->number != number) {
        std::unique_ptr<Page>& found = memory.pages[number];
        if (!found) found = std::make_unique<Page>();
        found->number = number;
        latest = found.get();
    }
    Page& page = *latest;
    const std::uint64_t serial = is_shared(address) ? memory.blocks : memory.launches;
    if (page.serial != serial) {
        std::memset(static_cast<void*>(page.cells), 0, sizeof page.cells);
        page.serial = serial;
        page.fenced = touches_fence(number * kPage, (number + 1) * kPage);
    }
    return page;
}

[[noreturn]] void report(const char* does, const char* what, std::size_t size, bool write) {
    std::ostringstream text;
    text << does << (write ? " (store of " : " (load of ") << size << " bytes)" << what;
    fail(text.str().c_str());
}

void check_shared(std::uintptr_t address, std::size_t size, bool write) {
    const std::uintptr_t begin = address - reinterpret_cast<std::uintptr_t>(memory.arena);
    for (std::size_t i = 0; i < size; ++i) {
        if (begin + i >= kArena || !memory.in_variable[begin + i]) {
            report("touches shared memory outside every variable", "", size, write);
        }
    }
}

[[noreturn]] void report_race(const Accesses& other, bool other_stores, std::uintptr_t address, std::size_t size,
                              bool write) {
    std::ostringstream text;
    text << (is_shared(address) ? " to shared memory" : " to global memory") << " against a "
         << (other_stores ? "store" : "load") << " of thread " << other.thread
         << (other.block == position.block ? " of the same block" : " of another block");
    report("races", text.str().c_str(), size, write);
}

// Notes the access in one cell; returns whether a store came before.
inline bool note(Cell& cell, std::uintptr_t address, std::size_t size, bool write, bool atomic) {
    const bool was_written = cell.writes.any();
    if (was_written && !cell.writes.before(position) && !(atomic && cell.writes.atomic)) {
        report_race(cell.writes, true, address, size, write);
    }
    if (!write) {
        if (!cell.reads.several_blocks) cell.reads.add(position, atomic);
        return was_written;
    }
    if (!cell.reads.before(position) && !(atomic && cell.reads.atomic)) {
        report_race(cell.reads, false, address, size, write);
    }
    cell.writes.add(position, atomic);
    return was_written;
}

void touch(std::uintptr_t address, std::size_t size, bool write, bool atomic) {
    const int owner = owner_of_stack(address);
    if (owner >= 0) {
        if (owner != position.thread) report("touches another thread's local memory", "", size, write);
        return;
    }
    const bool shared = is_shared(address);
    if (shared) check_shared(address, size, write);
    bool written = !shared || write;
    for (std::uintptr_t at = address; at < address + size;) {
        Page& page = page_of(at);
        const std::uintptr_t page_end = (at / kPage + 1) * kPage;
        const std::uintptr_t end = std::min(address + size, page_end);
        if (page.fenced && touches_fence(at, end)) report("touches memory outside its tensor", "", size, write);
        for (std::uintptr_t cell = at % kPage / kGranule; cell <= (end - 1) % kPage / kGranule; ++cell) {
            if (note(page.cells[cell], address, size, write, atomic)) written = true;
        }
        at = end;
    }
    if (!written) report("reads shared memory that no thread of the block has written", "", size, write);
}

}  // namespace

void memory_begin_launch() {
    ++memory.launches;
    memory.blocks_of_launch = 0;
}

void memory_begin_block(std::size_t dynamic_shared_size) {
    if (++memory.blocks_of_launch >> 22 != 0) throw std::runtime_error("more blocks than the emulation can count");
    ++memory.blocks;
    memory.variables.clear();
    std::memset(memory.in_variable, 0, memory.used);
    memory.used = 0;
    if (dynamic_shared_size > 0) shared(&memory, dynamic_shared_size, 16);
}

// Filled with ones, which is NaN in every type.
void* shared(const void* site, std::size_t size, std::size_t alignment) {
    void*& variable = memory.variables[site];
    if (variable == nullptr) {
        const std::size_t begin = (memory.used + alignment - 1) / alignment * alignment;
        if (begin + size + kGap > kArena) fail("has no shared memory left");
        std::memset(memory.in_variable + begin, 1, size);
        std::memset(memory.arena + begin, 0xff, size);
        memory.used = begin + size + kGap;
        variable = memory.arena + begin;
    }
    return variable;
}

void* dynamic_shared() {
    const auto found = memory.variables.find(&memory);
    if (found == memory.variables.end()) fail("uses dynamic shared memory of a launch that asked for none");
    return found->second;
}

void touch_atomically(const volatile void* address, std::size_t size) {
    if (!kernel_runs) return;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (at % size != 0) fail("does an atomic operation at a misaligned address");
    touch(at, size, true, true);
}

void threadfence() {}

}  // namespace cuda_emulation

using cuda_emulation::kernel_runs;
using cuda_emulation::touch;

#define TOUCH(name, size, write)                                                                      \
    extern "C" void name(void* address) {                                                             \
        if (kernel_runs) touch(reinterpret_cast<std::uintptr_t>(address), size, write, false);        \
    }
#define TOUCH_OF(size)                              \
    TOUCH(__tsan_read##size, size, false)           \
    TOUCH(__tsan_write##size, size, true)           \
    TOUCH(__tsan_unaligned_read##size, size, false) \
    TOUCH(__tsan_unaligned_write##size, size, true)
TOUCH_OF(1)
TOUCH_OF(2)
TOUCH_OF(4)
TOUCH_OF(8)
TOUCH_OF(16)
extern "C" {
void __tsan_read_range(void* address, std::size_t size) {
    if (kernel_runs) touch(reinterpret_cast<std::uintptr_t>(address), size, false, false);
}
void __tsan_write_range(void* address, std::size_t size) {
    if (kernel_runs) touch(reinterpret_cast<std::uintptr_t>(address), size, true, false);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// For the tests, through ctypes: no kernel may touch [begin, end) until it is taken back (size 0).
__attribute__((visibility("default"))) void cuda_emulation_fence(std::uintptr_t begin, std::size_t size) {
    if (size == 0) {
        cuda_emulation::memory.fences.erase(begin);
    } else {
        cuda_emulation::memory.fences[begin] = begin + size;
    }
}
}
