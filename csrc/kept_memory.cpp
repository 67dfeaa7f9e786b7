// malloc maps more than 32 MiB anew every time and gives it back at once, so that the gradient of [256, 151936] logits
// costs 38,000 page faults and the clearing of 148 MiB at every step: 33 to 65 ms, where computing it takes 8. Kept
// memory costs 4 ms for the offer to the system (MADV_FREE) and 3 for the first writing after it; in huge pages next to
// nothing. Pages that the system took meanwhile come back as fresh ones, zeroed. Smaller areas are not offered: malloc
// keeps as much, unless something else that is freed moves its limits, and the offer would cost half of filling them.
//
// Four areas: gradients of logits and of a head, advantages of a batch. An area serves sizes down to half its own, for
// the micro-batches of a step differ in length.
#include "kept_memory.h"

#include <mutex>
#include <new>
#include <vector>

#include "check.h"
#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace arpo {
namespace {

constexpr std::size_t kMostKept = 4;
constexpr std::int64_t kOfferedFrom = 32 << 20;

struct Area {
    void* start;
    std::int64_t capacity;
};

struct Kept {
    std::mutex mutex;
    std::vector<Area> areas;  // the one given back last at the end
};

// Never destroyed: owners may outlive static objects.
Kept& kept() {
    static Kept* const instance = new Kept;
    return *instance;
}

#ifdef __linux__

Area map(std::int64_t bytes) {
    const std::int64_t capacity = (bytes + 4095) / 4096 * 4096;
    void* const start = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    prefer_huge_pages(start, capacity);
    return {start, capacity};
}

void unmap(const Area& area) { munmap(area.start, area.capacity); }

// Whether the area may be kept: small, or the system may take its pages.
bool offer_to_system(const Area& area) {
    if (area.capacity < kOfferedFrom) return true;
#ifdef MADV_FREE
    return madvise(area.start, area.capacity, MADV_FREE) == 0;
#else
    return false;
#endif
}

#else

Area map(std::int64_t bytes) {
    void* const start = std::malloc(bytes);
    if (!start) throw std::bad_alloc();
    return {start, bytes};
}

void unmap(const Area& area) { std::free(area.start); }

bool offer_to_system(const Area& area) { return area.capacity < kOfferedFrom; }

#endif

// The smallest that is large enough and not more than twice as large; {nullptr, 0} if there is none.
Area take_kept(std::int64_t bytes) {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    auto best = all.areas.end();
    for (auto area = all.areas.begin(); area != all.areas.end(); ++area) {
        const bool fits = area->capacity >= bytes && area->capacity / 2 <= bytes;
        if (fits && (best == all.areas.end() || area->capacity < best->capacity)) best = area;
    }
    if (best == all.areas.end()) return {nullptr, 0};
    const Area found = *best;
    all.areas.erase(best);
    return found;
}

}  // namespace

KeptMemory::KeptMemory(std::int64_t bytes) : bytes_(bytes) {
    ARPO_CHECK(bytes > 0, "memory must have at least one byte, got ", bytes);
    Area area = take_kept(bytes);
    if (!area.start) area = map(bytes);
    start_ = area.start;
    capacity_ = area.capacity;
}

KeptMemory::~KeptMemory() {
    Area leaving{start_, capacity_};
    if (offer_to_system(leaving)) {
        Kept& all = kept();
        const std::lock_guard<std::mutex> lock(all.mutex);
        all.areas.push_back(leaving);
        if (all.areas.size() <= kMostKept) return;
        leaving = all.areas.front();
        all.areas.erase(all.areas.begin());
    }
    unmap(leaving);
}

void release_kept_memory() {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (const Area& area : all.areas) unmap(area);
    all.areas.clear();
}

}  // namespace arpo
