// Not yet measured.
//
// Floor: reads the mask once and writes 4 bytes a token, so at 4.3 TB/s 2048 x 2048 tokens take 4.9 us with a mask of
// bytes and 11.7 us with one of int64.
//
// Rows: a block writes one piece of one row, 16 bytes a thread and step; the mask of four tokens is loaded as one or two
// vectors where rows and addresses allow it, else token by token. Packed: a thread finds the leaf of the first of its four
// tokens by bisection of the running sums and goes on from there.
#include <climits>

#include "cuda_utils.cuh"
#include "expand_advantages.h"

namespace arpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;                          // tokens a thread writes at a time
constexpr int kPiece = kThreads * kWide * 2;      // tokens of a row that a block writes
constexpr int64_t kBlocks = INT_MAX;

template <class Mask>
struct alignas(sizeof(Mask) * kWide > 16 ? 16 : sizeof(Mask) * kWide) Four {
    Mask values[kWide];
};

template <class Mask, bool kVectors>
__global__ void expand_rows_kernel(const float* leaf, const Mask* mask, int64_t mask_stride, int64_t rows,
                                   int64_t columns, int64_t pieces, float* out) {
    for (int64_t block = blockIdx.x; block < rows * pieces; block += gridDim.x) {
        const int64_t row = block / pieces;
        const int64_t begin = block % pieces * kPiece;
        const int64_t end = begin + kPiece < columns ? begin + kPiece : columns;
        const float advantage = leaf[row];
        const Mask* from = mask + row * mask_stride;
        float* to = out + row * columns;
        if (kVectors) {
            for (int64_t t = begin + threadIdx.x * kWide; t < end; t += kThreads * kWide) {
                const Four<Mask> four = *reinterpret_cast<const Four<Mask>*>(from + t);
                cuda::Pack<float> pack;
                for (int i = 0; i < kWide; ++i) pack.values[i] = masked(advantage, four.values[i]);
                cuda::store_once(reinterpret_cast<cuda::Pack<float>*>(to + t), pack);
            }
        } else {
            for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) to[t] = masked(advantage, from[t]);
        }
    }
}

__global__ void expand_packed_kernel(const float* leaf, const int64_t* end, int64_t leaves, int64_t total, float* out,
                                     bool aligned) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWide;
    if (first >= total) return;
    int64_t low = 0, high = leaves;  // the first leaf that ends after `first`, or `leaves`
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (end[middle] <= first) low = middle + 1;
        else high = middle;
    }
    cuda::Pack<float> pack;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
        while (low < leaves && end[low] <= first + i) ++low;
        pack.values[i] = low < leaves ? leaf[low] : 0.0f;
    }
    if (aligned && first + kWide <= total) {
        cuda::store_once(reinterpret_cast<cuda::Pack<float>*>(out + first), pack);
    } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
            if (first + i < total) out[first + i] = pack.values[i];
        }
    }
}

bool aligned(const void* address, size_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

template <class Mask>
void launch(const ExpandRows& args, cudaStream_t stream) {
    const Mask* mask = static_cast<const Mask*>(args.mask);
    const int64_t pieces = (args.columns + kPiece - 1) / kPiece;
    const int64_t wanted = args.rows * pieces;
    const unsigned blocks = static_cast<unsigned>(wanted < kBlocks ? wanted : kBlocks);
    const bool vectors = args.columns % kWide == 0 && args.mask_stride % kWide == 0 && aligned(args.out, 16) &&
                         aligned(mask, alignof(Four<Mask>));
    const auto kernel = vectors ? expand_rows_kernel<Mask, true> : expand_rows_kernel<Mask, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(args.leaf, mask, args.mask_stride, args.rows, args.columns, pieces,
                                            args.out);
}

}  // namespace

void expand_rows_cuda(const ExpandRows& args, int device, void* stream) {
    if (args.rows == 0 || args.columns == 0) return;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const cuda::DeviceGuard guard(device);
    switch (args.mask_type) {
        case MaskType::byte:
            launch<std::uint8_t>(args, on);
            break;
        case MaskType::int32:
            launch<std::int32_t>(args, on);
            break;
        case MaskType::int64:
            launch<std::int64_t>(args, on);
            break;
        case MaskType::float32:
            launch<float>(args, on);
            break;
    }
    cuda::check(cudaGetLastError(), "expand_advantages");
}

void expand_packed_cuda(const float* leaf, const int64_t* end, int64_t leaves, int64_t total, float* out, int device,
                        void* stream) {
    if (total == 0) return;
    const int64_t blocks = (total + kThreads * kWide - 1) / (kThreads * kWide);
    if (blocks > INT_MAX) throw std::invalid_argument("expand_advantages: got more than 2^41 tokens");
    const cuda::DeviceGuard guard(device);
    expand_packed_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        leaf, end, leaves, total, out, aligned(out, 16));
    cuda::check(cudaGetLastError(), "expand_advantages");
}

}  // namespace arpo
