#include "cuda_utils.cuh"
#include "device_cuda.h"

namespace arpo::cuda {

std::string unusable_reason() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(status);
    }
    return count > 0 ? "" : "no CUDA device";
}

}  // namespace arpo::cuda
