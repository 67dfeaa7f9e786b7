// Argument checks of the host side. Not for the files compiled per instruction set: the inline code below would be
// emitted with their instructions, and the linker may keep that copy for everybody (SIGILL on an older processor).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace arpo {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

}  // namespace arpo

// ARPO_CHECK(n >= 0, "rows must be at least 0, got ", n): std::invalid_argument, a ValueError in Python.
#define ARPO_CHECK(condition, ...) \
    do {                           \
        if (!(condition)) ::arpo::fail(__VA_ARGS__); \
    } while (0)
