// Marks a function that is compiled for both the CPU and the GPU.
#pragma once

#ifdef __CUDACC__
#define ARPO_HOST_DEVICE __host__ __device__
#else
#define ARPO_HOST_DEVICE
#endif
