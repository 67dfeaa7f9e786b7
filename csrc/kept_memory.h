// Memory for large results that are allocated and dropped again at every step.
#pragma once

#include <cstdint>

namespace arpo {

// Writable memory of at least `bytes`, with what it last held, if anything. When the owner ends, up to four such
// areas are kept for the next owners, and the system may take the pages of large ones at any time.
class KeptMemory {
public:
    // std::bad_alloc if there is none.
    explicit KeptMemory(std::int64_t bytes);
    ~KeptMemory();
    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* start() const { return start_; }
    std::int64_t bytes() const { return bytes_; }

private:
    void* start_;
    std::int64_t bytes_;     // asked for
    std::int64_t capacity_;  // mapped
};

// Unmaps what is kept and not owned.
void release_kept_memory();

}  // namespace arpo
