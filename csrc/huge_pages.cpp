// A gradient of [256, 151936] logits is 148 MiB, and malloc maps so much anew every time: in pages of 4 KiB its first
// writing takes 38,000 page faults, several times as long as computing it. In pages of 2 MiB there are 75.
//
// Where malloc hands out memory it kept instead, its pages are already there and the request changes nothing now; the
// kernel may join them later. Only pages that lie inside the range whole are asked for, so neighbours on the heap keep
// theirs, and no memory is taken beyond the range.
#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace arpo {

void prefer_huge_pages(void* start, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = 2 << 20;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t end = (address + bytes) / kHuge * kHuge;
    // Below two of them the request costs more than it saves. The result does not matter: small pages work too.
    if (end >= begin + 2 * kHuge) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

}  // namespace arpo
