// Memory that was just allocated and is about to be written whole.
#pragma once

#include <cstdint>

namespace arpo {

// Asks for huge pages for [start, start + bytes). Call it before the memory is first touched, for memory that we
// allocated and nobody else has seen. Without effect where the system has no such request or refuses it.
void prefer_huge_pages(void* start, std::int64_t bytes);

}  // namespace arpo
