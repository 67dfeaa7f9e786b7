// Element types of the tensors a kernel reads or writes. The codes are the interface to Python.
#pragma once

#include <cstdint>

namespace arpo {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct BFloat16 {
    std::uint16_t bits;
};
struct Half {
    std::uint16_t bits;
};

}  // namespace arpo
