// What the CUDA runtime says about this machine. No CUDA header here: bindings.cpp is compiled by the host compiler.
#pragma once

#include <string>

namespace arpo::cuda {

// Empty if device 0 can run what was built, else the reason. Makes no CUDA context.
std::string unusable_reason();

}  // namespace arpo::cuda
