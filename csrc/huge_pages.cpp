// A gradient of [256, 151936] logits is 148 MiB, and malloc maps so much anew every time: in pages of 4 KiB its first
// writing takes 38,000 page faults, several times as long as computing it. In pages of 2 MiB there are 75.
//
// Not in a virtual machine that reports its free memory to the host (the balloon device's page reporting). Blocks that
// large have been given back when they are asked for again a few seconds later, and the host brings them in one 4 KiB
// page after the other: 148 MiB took 0.9 to 1.0 s that way, beside 0.13 s in small pages, which come from blocks too
// small to be reported.
//
// Where malloc hands out memory it kept instead, its pages are already there and the request changes nothing now; the
// kernel may join them later. Only pages that lie inside the range whole are asked for, so neighbours on the heap keep
// theirs, and no memory is taken beyond the range.
#include "huge_pages.h"

#ifdef __linux__
#include <dirent.h>
#include <sys/mman.h>

#include <cstdio>
#endif

namespace arpo {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

// VIRTIO_BALLOON_F_REPORTING; sysfs writes a device's features as digits, bit 0 first.
constexpr int kReportingBit = 5;

bool reports_free_pages(const char* device) {
    char path[512];
    std::snprintf(path, sizeof path, "/sys/bus/virtio/drivers/virtio_balloon/%s/features", device);
    std::FILE* file = std::fopen(path, "r");
    if (!file) return false;
    char bits[kReportingBit + 1] = {};
    const bool complete = std::fread(bits, 1, sizeof bits, file) == sizeof bits;
    std::fclose(file);
    return complete && bits[kReportingBit] == '1';
}

bool machine_reports_free_pages() {
    DIR* devices = opendir("/sys/bus/virtio/drivers/virtio_balloon");
    if (!devices) return false;
    bool found = false;
    while (const dirent* entry = readdir(devices)) found = found || reports_free_pages(entry->d_name);
    closedir(devices);
    return found;
}

}  // namespace
#endif

void prefer_huge_pages(void* start, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = 2 << 20;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t end = (address + bytes) / kHuge * kHuge;
    static const bool reporting = machine_reports_free_pages();
    // Below two of them the request costs more than it saves. The result does not matter: small pages work too.
    if (!reporting && end >= begin + 2 * kHuge) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

}  // namespace arpo
