// Forward: a block reads a row (or a piece of one, where rows are few) once, in 16-byte loads; each warp keeps a maximum
// of its own, so that most groups of elements need no rescale. Backward: one read, one write, in place if asked.
// Not yet measured on a GPU.
#include "cuda_utils.cuh"
#include "logprob_entropy.h"

namespace arpo {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;       // 16-byte loads in flight per thread
constexpr int kBlocksPerSm = 4;  // pieces are made until every multiprocessor has as many blocks
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// e^(d / temperature) for clamped d <= 0. The rounding of the product d * scale is put back to first order: without
// that the result is |d * scale| * 2^-24 off, 4e-6 for the entropy of a nearly certain row. NaN stays NaN.
struct Exp {
    float scale_high, scale_low, lowest;

    // Division in two floats, because double is slow on many devices.
    __device__ explicit Exp(double temperature) {
        const float log2e = 1.44269502f, log2e_rest = 1.92596299e-8f;
        const float high = static_cast<float>(temperature);
        const float rest = static_cast<float>(temperature - high);
        scale_high = log2e / high;
        scale_low = (fmaf(-scale_high, high, log2e) + log2e_rest - scale_high * rest) / high;
        lowest = -127.0f / scale_high;  // 2^-127 is flushed to 0, and d * 0 stays finite
    }
    __device__ float clamp(float d) const { return max_or_nan(d, lowest); }
    __device__ float operator()(float d) const {
        const float t = d * scale_high;
        const float rest = fmaf(d, scale_low, fmaf(d, scale_high, -t));
        const float e = fast_exp2(t);
        return fmaf(e, rest * 0.693147181f, e);
    }
};

// With z = (x - max) / temperature and one arg-max left out: s = sum of e^z, a = sum of (x - max) e^z.
struct RowSums {
    float max, s, a;
};
__device__ RowSums empty_sums() { return {-kInfinity, 0.0f, 0.0f}; }

// Sums relative to a larger maximum; `with_max` is 1 where the old arg-max has to become an ordinary element.
__device__ void lower(RowSums& sums, float maximum, float with_max, const Exp& exp) {
    if (sums.max > -kInfinity) {
        const float shift = exp.clamp(sums.max - maximum);
        const float factor = exp(shift);
        sums.a = factor * (sums.a + shift * (sums.s + with_max));
        sums.s = factor * (sums.s + with_max);
    }
    sums.max = maximum;
}

__device__ RowSums merge(RowSums x, RowSums y, const Exp& exp) {
    if (y.max > x.max) {
        const RowSums swap = x;
        x = y;
        y = swap;
    }
    if (y.max > -kInfinity) lower(y, x.max, 1.0f, exp);
    // Sums of a part without maximum are 0, or NaN if the part held one.
    x.s += y.s;
    x.a += y.a;
    return x;
}

__device__ void store(const RowSums& sums, float* three) {
    three[0] = sums.max;
    three[1] = sums.s;
    three[2] = sums.a;
}
__device__ RowSums load(const float* three) { return {three[0], three[1], three[2]}; }

__device__ double temperature_of(const LogprobEntropyInputs& in, std::int64_t row) {
    const double value = in.temperatures ? in.temperatures[row * in.temperature_stride] : in.temperature;
    return value >= 1e-30 && value <= 1e30f ? value : kNan;
}
__device__ bool skipped(const LogprobEntropyInputs& in, std::int64_t row) { return in.mask && !in.mask[row]; }
// The label, or -1 if there is none to use.
__device__ std::int64_t label_of(const LogprobEntropyInputs& in, std::int64_t row) {
    if (!in.labels) return -1;
    const std::int64_t label = in.labels[row];
    return label != in.ignore_index && label >= 0 && label < in.shape.vocab ? label : -1;
}

// Adds kCount elements of every lane. All lanes of the warp call together; elements that do not exist are -inf.
template <int kCount>
__device__ void add_group(const float (&x)[kCount], const Exp& exp, RowSums& sums) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    largest = warp_max(largest);
    const int lane = threadIdx.x % kWarp;
    float s = 0, a = 0;
    if (largest > sums.max) {  // the same for the whole warp, and rarer with every group
        lower(sums, largest, lane == 0 ? 1.0f : 0.0f, exp);
        int count = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float d = exp.clamp(x[i] - largest);
            const bool other = !(x[i] == largest);
            const float e = other ? exp(d) : 0.0f;
            count += !other;
            s += e;
            a = fmaf(d, e, a);
        }
        // One holder of the maximum leaves it out; no sum ever contains it, so nothing cancels.
        const unsigned holders = __ballot_sync(kAllLanes, count > 0);
        s += static_cast<float>(count - (lane == __ffs(holders) - 1));
    } else {
        const float base = sums.max > -kInfinity ? sums.max : 0.0f;  // -inf - -inf would be NaN
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float d = exp.clamp(x[i] - base);
            const float e = exp(d);
            s += e;
            a = fmaf(d, e, a);
        }
    }
    sums.s += s;
    sums.a += a;
}

// Sums of x[0..size), valid in thread 0. All threads of the block call together.
template <class T>
__device__ RowSums sum_range(const T* x, std::int64_t size, const Exp& exp) {
    constexpr int kPack = Pack<T>::kSize;
    RowSums sums = empty_sums();
    std::int64_t head = (16 - reinterpret_cast<std::uintptr_t>(x) % 16) % 16 / sizeof(T);
    head = head < size ? head : size;
    const std::int64_t packs = (size - head) / kPack;
    const Pack<T>* body = reinterpret_cast<const Pack<T>*>(x + head);
    for (std::int64_t first = 0; first < packs; first += kThreads * kUnroll) {
        Pack<T> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const std::int64_t index = first + u * kThreads + threadIdx.x;
            if (index < packs) {
                loaded[u] = load_once(body + index);
            } else {
#pragma unroll
                for (int i = 0; i < kPack; ++i) loaded[u].values[i] = from_float<T>(-kInfinity);
            }
        }
        float values[kUnroll * kPack];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) values[u * kPack + i] = to_float(loaded[u].values[i]);
        }
        add_group(values, exp, sums);
    }
    if (threadIdx.x < kWarp) {
        // At most 2 * (kPack - 1) <= 14 elements lie outside the aligned packs: one per lane of the first warp.
        const std::int64_t tail = head + packs * kPack;
        const std::int64_t index = threadIdx.x < head ? threadIdx.x : tail + (threadIdx.x - head);
        const float outside[1] = {index < size ? to_float(x[index]) : -kInfinity};
        if (head > 0 || tail < size) add_group(outside, exp, sums);
    }
    sums.s = warp_sum(sums.s);
    sums.a = warp_sum(sums.a);
    __shared__ float of_warp[kWarps][3];
    if (threadIdx.x % kWarp == 0) store(sums, of_warp[threadIdx.x / kWarp]);
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kWarps; ++warp) sums = merge(sums, load(of_warp[warp]), exp);
    }
    return sums;
}

__device__ void write_row(const LogprobEntropyForward& args, std::int64_t row, float max, float log1p_s, float mean_z,
                          float logprob) {
    const std::int64_t rows = args.in.shape.rows;
    if (args.logprob) args.logprob[row] = logprob;
    args.entropy[row] = log1p_s - mean_z;
    if (args.stats) {
        args.stats[row] = max;
        args.stats[rows + row] = log1p_s;
        args.stats[2 * rows + row] = mean_z;
    }
}

template <class T>
__device__ void finish_row(const LogprobEntropyForward& args, unsigned long long* invalid_labels, std::int64_t row,
                           RowSums sums) {
    const LogprobEntropyInputs& in = args.in;
    const float temperature = static_cast<float>(temperature_of(in, row));
    if (!isfinite(sums.max) || isnan(temperature)) sums.s = sums.max = kNan;
    const float log1p_s = log1pf(sums.s);
    const float mean_z = sums.a / temperature / (1 + sums.s);
    const std::int64_t label = label_of(in, row);
    float logprob = 0;
    if (label >= 0) {
        const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
        logprob = (to_float(x[label]) - sums.max) / temperature - log1p_s;
    } else if (in.labels && in.labels[row] != in.ignore_index) {
        atomicAdd(invalid_labels, 1ull);
    }
    write_row(args, row, sums.max, log1p_s, mean_z, logprob);
}

// One block per row.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_rows(const LogprobEntropyForward args, unsigned long long* invalid_labels) {
    const std::int64_t row = blockIdx.x;
    if (skipped(args.in, row)) {
        if (threadIdx.x == 0) write_row(args, row, 0, 0, 0, 0);
        return;
    }
    const T* x = static_cast<const T*>(args.in.logits) + args.in.shape.offset(row);
    const RowSums sums = sum_range(x, args.in.shape.vocab, Exp(temperature_of(args.in, row)));
    if (threadIdx.x == 0) finish_row<T>(args, invalid_labels, row, sums);
}

// One block per piece of a row; partials[row][piece] = {max, s, a}.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_pieces(const LogprobEntropyForward args, float* partials, int pieces, std::int64_t length) {
    const std::int64_t row = blockIdx.x / pieces;
    if (skipped(args.in, row)) return;
    const std::int64_t begin = (blockIdx.x % pieces) * length;
    const std::int64_t rest = args.in.shape.vocab - begin;
    const T* x = static_cast<const T*>(args.in.logits) + args.in.shape.offset(row) + begin;
    const RowSums sums = sum_range(x, rest < length ? rest : length, Exp(temperature_of(args.in, row)));
    if (threadIdx.x == 0) store(sums, partials + 3 * static_cast<std::int64_t>(blockIdx.x));
}

// One warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_pieces(const LogprobEntropyForward args, unsigned long long* invalid_labels, const float* partials,
                 int pieces) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (row >= args.in.shape.rows) return;
    if (skipped(args.in, row)) {
        if (lane == 0) write_row(args, row, 0, 0, 0, 0);
        return;
    }
    const Exp exp(temperature_of(args.in, row));
    RowSums sums = empty_sums();
    for (int piece = lane; piece < pieces; piece += kWarp) {
        sums = merge(sums, load(partials + 3 * (row * pieces + piece)), exp);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const RowSums other{__shfl_down_sync(kAllLanes, sums.max, offset), __shfl_down_sync(kAllLanes, sums.s, offset),
                            __shfl_down_sync(kAllLanes, sums.a, offset)};
        if (lane < offset) sums = merge(sums, other, exp);
    }
    if (lane == 0) finish_row<T>(args, invalid_labels, row, sums);
}

// gradient = e^z (constant + slope (x - max)), except at the label.
struct RowGradient {
    float max, constant, slope, at_label;
    std::int64_t label;
};

template <class T>
__device__ RowGradient row_gradient(const LogprobEntropyBackward& args, std::int64_t row, const T* x,
                                    float temperature) {
    const LogprobEntropyInputs& in = args.in;
    const std::int64_t rows = in.shape.rows;
    const float log1p_s = args.stats[rows + row], mean_z = args.stats[2 * rows + row];
    RowGradient g;
    g.max = args.stats[row];
    g.label = label_of(in, row);
    const float up_logprob = g.label >= 0 && args.grad_logprob ? args.grad_logprob[row] : 0.0f;
    const float up_entropy = args.grad_entropy ? args.grad_entropy[row] : 0.0f;
    const float scale = expf(-log1p_s) / temperature;
    g.constant = scale * (up_entropy * mean_z - up_logprob);
    g.slope = -scale * up_entropy / temperature;
    g.at_label = 0;
    if (g.label >= 0) {
        const float z = (to_float(x[g.label]) - g.max) / temperature;
        const float p = expf(z - log1p_s);
        const float of_entropy = p > 0 ? up_entropy * p * (z - mean_z) : p;
        g.at_label = (-up_logprob * expm1f(z - log1p_s) - of_entropy) / temperature;
    }
    return g;
}

// One block per piece of a row; x and gradient may be the same memory.
template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_pieces(const LogprobEntropyBackward args, int pieces, std::int64_t length) {
    constexpr int kPack = Pack<T>::kSize;
    const std::int64_t row = blockIdx.x / pieces;
    const std::int64_t begin = (blockIdx.x % pieces) * length;
    const std::int64_t vocab = args.in.shape.vocab;
    const std::int64_t end = begin + length < vocab ? begin + length : vocab;
    const T* x = static_cast<const T*>(args.in.logits) + args.in.shape.offset(row);
    T* gradient = static_cast<T*>(args.grad_logits) + args.grad_shape.offset(row);
    const bool masked = skipped(args.in, row);
    const double temperature = temperature_of(args.in, row);
    // Every thread works the row's scalars out for itself, before any thread of this block overwrites the label's logit.
    RowGradient g{};
    if (!masked) g = row_gradient(args, row, x, static_cast<float>(temperature));
    const Exp exp(temperature);
    const auto value = [&](float logit) {
        if (masked) return 0.0f;
        const float d = exp.clamp(logit - g.max);
        return exp(d) * fmaf(g.slope, d, g.constant);
    };
    const auto single = [&](std::int64_t i) {
        gradient[i] = from_float<T>(!masked && i == g.label ? g.at_label : value(to_float(x[i])));
    };
    __syncthreads();

    const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(x + begin);
    const std::uintptr_t to = reinterpret_cast<std::uintptr_t>(gradient + begin);
    if (from % 16 != to % 16) {
        for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) single(i);
        return;
    }
    std::int64_t body = begin + static_cast<std::int64_t>((16 - from % 16) % 16 / sizeof(T));
    body = body < end ? body : end;
    const std::int64_t packs = (end - body) / kPack;
    for (std::int64_t index = threadIdx.x; index < packs; index += kThreads) {
        const std::int64_t first = body + index * kPack;
        Pack<T> pack = masked ? Pack<T>{} : load_once(reinterpret_cast<const Pack<T>*>(x + first));
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            const float result = value(to_float(pack.values[i]));
            pack.values[i] = from_float<T>(!masked && first + i == g.label ? g.at_label : result);
        }
        store_once(reinterpret_cast<Pack<T>*>(gradient + first), pack);
    }
    for (std::int64_t i = begin + threadIdx.x; i < body; i += kThreads) single(i);
    for (std::int64_t i = body + packs * kPack + threadIdx.x; i < end; i += kThreads) single(i);
}

int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Pieces of the forward pass: as many as fill the device, none shorter than 8192 elements.
int forward_piece_count(const LogitRows& shape, int device) {
    const std::int64_t wanted = ceil_div(static_cast<std::int64_t>(kBlocksPerSm) * multiprocessors(device), shape.rows);
    const std::int64_t most = shape.vocab / 8192;
    const std::int64_t pieces = wanted < most ? wanted : most;
    return pieces < 1 ? 1 : static_cast<int>(pieces);
}

unsigned grid(std::int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::invalid_argument("too many rows for one launch, got " + std::to_string(blocks));
    return static_cast<unsigned>(blocks);
}

template <class T>
void forward(const LogprobEntropyForward& args, const LogprobEntropyScratch& scratch, int device,
             cudaStream_t stream) {
    const LogitRows& shape = args.in.shape;
    const int pieces = forward_piece_count(shape, device);
    if (pieces == 1) {
        forward_rows<T><<<grid(shape.rows), kThreads, 0, stream>>>(args, scratch.invalid_labels);
    } else {
        // Whole 16 bytes, so that the pieces of an aligned row are aligned. Rounding up leaves no piece empty: there are
        // far fewer than 8192 / 8 pieces.
        const std::int64_t length = ceil_div(ceil_div(shape.vocab, pieces), 8) * 8;
        forward_pieces<T><<<grid(shape.rows * pieces), kThreads, 0, stream>>>(args, scratch.partials, pieces, length);
        check(cudaGetLastError(), "logprob_entropy forward launch");
        merge_pieces<T><<<grid(ceil_div(shape.rows, kWarps)), kThreads, 0, stream>>>(args, scratch.invalid_labels,
                                                                                    scratch.partials, pieces);
    }
    check(cudaGetLastError(), "logprob_entropy forward launch");
}

template <class T>
void backward(const LogprobEntropyBackward& args, cudaStream_t stream) {
    // In place, another block could overwrite the label's logit before this one reads it: one block per row then.
    const LogitRows& shape = args.in.shape;
    const bool in_place = args.grad_logits == args.in.logits;
    const std::int64_t length = in_place ? shape.vocab : 4 * kThreads * Pack<T>::kSize;
    const std::int64_t pieces = ceil_div(shape.vocab, length);
    backward_pieces<T><<<grid(shape.rows * pieces), kThreads, 0, stream>>>(args, static_cast<int>(pieces), length);
    check(cudaGetLastError(), "logprob_entropy backward launch");
}

}  // namespace

std::int64_t logprob_entropy_partials(const LogitRows& shape, int device) {
    if (shape.rows == 0) return 0;
    const std::int64_t pieces = forward_piece_count(shape, device);
    return pieces == 1 ? 0 : 3 * shape.rows * pieces;
}

void logprob_entropy_forward_cuda(const LogprobEntropyForward& args, const LogprobEntropyScratch& scratch, int device,
                                  void* stream) {
    if (args.in.shape.rows == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (args.in.dtype) {
        case Dtype::float32: return forward<float>(args, scratch, device, on);
        case Dtype::bfloat16: return forward<__nv_bfloat16>(args, scratch, device, on);
        case Dtype::float16: return forward<__half>(args, scratch, device, on);
    }
}

void logprob_entropy_backward_cuda(const LogprobEntropyBackward& args, int device, void* stream) {
    if (args.in.shape.rows == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (args.in.dtype) {
        case Dtype::float32: return backward<float>(args, on);
        case Dtype::bfloat16: return backward<__nv_bfloat16>(args, on);
        case Dtype::float16: return backward<__half>(args, on);
    }
}

}  // namespace arpo
