#include "cuda_utils.cuh"
#include "device_cuda.h"

#include <sstream>

namespace arpo::cuda {
namespace {

// Whether code built for `architectures` ("80-real,90-real,120-virtual"; no suffix is both) runs on a device of this
// compute capability: machine code within its major version, PTX on everything newer.
bool runs_on(const std::string& architectures, int capability) {
    std::istringstream list(architectures);
    for (std::string item; std::getline(list, item, ',');) {
        const int built_for = std::stoi(item);
        const bool real = item.find("-virtual") == std::string::npos, ptx = item.find("-real") == std::string::npos;
        if (capability >= built_for && (ptx || (real && capability / 10 == built_for / 10))) return true;
    }
    return false;
}

}  // namespace

std::string unusable_reason() {
    int driver = 0;
    // The runtime says "driver version is insufficient" where there is none at all.
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no NVIDIA driver is installed";
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(status);
    }
    if (count == 0) return "no CUDA device";
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "cudaDeviceGetAttribute");
    if (runs_on(ARPO_CUDA_ARCHITECTURES, 10 * major + minor)) return "";
    return "built for CUDA architectures " ARPO_CUDA_ARCHITECTURES ", and device 0 is " +
           std::to_string(10 * major + minor) + " (set -DARPO_CUDA_ARCHITECTURES)";
}

}  // namespace arpo::cuda
