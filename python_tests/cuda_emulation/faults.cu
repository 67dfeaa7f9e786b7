// Kernels with one fault each, and one without: what the emulation must find. Named by the fault.
#include <cstdint>
#include <exception>
#include <string>

#include "cuda_utils.cuh"

namespace arpo {
namespace {

constexpr int kThreads = 64;

__global__ void none(float* data) {
    __shared__ float parts[2], all[1];
    extern __shared__ unsigned char copies[];
    float* copy = reinterpret_cast<float*>(copies);
    copy[threadIdx.x] = blockIdx.x == 0 ? data[threadIdx.x] : 0.0f;
    __syncwarp();
    const float sum = cuda::warp_sum(copy[threadIdx.x ^ 1]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 5) all[0] = parts[0] + parts[1];
    const int last = __syncthreads_or(threadIdx.x == 63);
    if (blockIdx.x == 0) data[threadIdx.x] = all[0] + static_cast<float>(last);
    atomicAdd(data + kThreads, 1.0f);
}

__global__ void missing_barrier(float* data) {
    __shared__ float part;
    if (threadIdx.x == 40) part = data[40];
    data[threadIdx.x] = part;
}

__global__ void missing_second_barrier(float* data) {
    __shared__ float part;
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) part = data[kThreads + i];
        __syncthreads();
        data[threadIdx.x] += part;
    }
}

__global__ void missing_warp_barrier(float* data) {
    __shared__ float copy[kThreads];
    copy[threadIdx.x] = data[threadIdx.x];
    data[threadIdx.x] = copy[threadIdx.x ^ 1];
}

__global__ void two_blocks_write(float* data) { data[threadIdx.x] = 1.0f; }

__global__ void store_beside_atomic(float* data) {
    if (threadIdx.x == 3) data[0] = 0.0f;
    atomicAdd(data, 1.0f);
}

__global__ void unwritten_shared(float* data) {
    __shared__ float copy[kThreads];
    if (threadIdx.x != 7) copy[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = copy[threadIdx.x];
}

__global__ void past_shared(float* data) {
    __shared__ float copy[kThreads];
    copy[threadIdx.x + 1] = data[threadIdx.x];
}

__global__ void past_tensor(float* data) { data[128 - threadIdx.x] = 0.0f; }

__global__ void another_stack(float* data) {
    __shared__ const float* theirs;
    float mine[2] = {data[0], data[1]};
    if (threadIdx.x == 0) theirs = mine;
    __syncthreads();
    data[threadIdx.x] = theirs[threadIdx.x % 2];
}

__global__ void misaligned(float* data) {
    data[0] = cuda::load_once(reinterpret_cast<const cuda::Pack<float>*>(data + threadIdx.x)).values[0];
}

__global__ void barrier_in_branch(float* data) {
    if (threadIdx.x < 32) __syncthreads();
    data[threadIdx.x] = 0.0f;
}

__global__ void barrier_and_shuffle(float* data) {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
    }
}

__global__ void shuffle_of_some(float* data) {
    if (threadIdx.x >= 50) return;
    data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

__global__ void lane_outside_mask(float* data) { data[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 0); }

__global__ void different_collectives(float* data) {
    if (threadIdx.x % 2 == 0) {
        __syncwarp();
    } else {
        data[threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffffu, 1));
    }
}

__global__ void too_many_threads(float*) {}

struct Fault {
    const char* name;
    void (*launch)(float* data);
};

#define FAULT(kernel) {#kernel, [](float* data) { kernel<<<2, kThreads>>>(data); }}
const Fault kFaults[] = {
    {"none", [](float* data) { none<<<2, kThreads, kThreads * sizeof(float), nullptr>>>(data); }},
    FAULT(missing_barrier),
    FAULT(missing_second_barrier),
    FAULT(missing_warp_barrier),
    FAULT(two_blocks_write),
    FAULT(store_beside_atomic),
    FAULT(unwritten_shared),
    FAULT(past_shared),
    FAULT(past_tensor),
    FAULT(another_stack),
    FAULT(misaligned),
    FAULT(barrier_in_branch),
    FAULT(barrier_and_shuffle),
    FAULT(shuffle_of_some),
    FAULT(lane_outside_mask),
    FAULT(different_collectives),
    {"too_many_threads", [](float* data) { too_many_threads<<<1, 1025>>>(data); }},
};

}  // namespace
}  // namespace arpo

// What the emulation says of the kernel; empty: nothing. data: 128 floats.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulation_fault(const char* name, float* data) {
    static std::string said;
    said = "no such kernel";
    for (const arpo::Fault& fault : arpo::kFaults) {
        if (std::string(fault.name) != name) continue;
        try {
            fault.launch(data);
            arpo::cuda::check(cudaGetLastError(), "launch");
            said = "";
        } catch (const std::exception& error) {
            said = error.what();
        }
    }
    return said.c_str();
}
