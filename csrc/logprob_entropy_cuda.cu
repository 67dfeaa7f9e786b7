// Forward: one read (row_sums.cuh). Backward: one read, one write, in place if asked.
// Not yet measured on a GPU.
#include "logprob_entropy.h"
#include "row_sums.cuh"

namespace arpo {
namespace {

using namespace cuda;

struct FinishForward {
    float* logprob;
    float* entropy;
    float* stats;
    std::int64_t rows;
    unsigned long long* invalid_labels;

    __device__ void write(std::int64_t row, float max, float log1p_s, float mean_z, float value) const {
        if (logprob) logprob[row] = value;
        entropy[row] = log1p_s - mean_z;
        if (stats) {
            stats[row] = max;
            stats[rows + row] = log1p_s;
            stats[2 * rows + row] = mean_z;
        }
    }
    __device__ void skip(std::int64_t row) const { write(row, 0, 0, 0, 0); }

    template <class T>
    __device__ void operator()(const LogitInputs& in, std::int64_t row, const T* x, RowSums sums) const {
        const float temperature = static_cast<float>(temperature_of(in, row));
        if (!isfinite(sums.max) || isnan(temperature)) sums.s = sums.max = kNan;
        const float log1p_s = log1pf(sums.s);
        const float mean_z = sums.a / temperature / (1 + sums.s);
        const Label label = label_of(in, row);
        count_invalid(in, label, invalid_labels);
        const float value = label.valid ? (to_float(x[label.column]) - sums.max) / temperature - log1p_s : 0.0f;
        write(row, sums.max, log1p_s, mean_z, value);
    }
};

// Merges a row's sums of a shard into running[row][4], in double: few shards must not cost what few pieces do.
struct FinishShard {
    double* running;
    unsigned long long* invalid_labels;

    __device__ void skip(std::int64_t) const {}

    template <class T>
    __device__ void operator()(const LogitInputs& in, std::int64_t row, const T* x, const RowSums& sums) const {
        double* total = running + 4 * row;
        const Label label = label_of(in, row);
        count_invalid(in, label, invalid_labels);
        if (label.column >= 0) total[3] = to_float(x[label.column]);
        const double temperature = temperature_of(in, row);
        if (isnan(temperature) || isnan(sums.s) || sums.max == kInfinity) total[0] = kNan;
        if (isnan(total[0]) || sums.max == -kInfinity) return;
        const bool higher = sums.max > total[0];
        const double max = higher ? sums.max : total[0];
        double s = higher ? sums.s : total[1], a = higher ? sums.a : total[2];
        const double other_max = higher ? total[0] : sums.max;
        if (other_max > -kInfinity) {
            // The other side's arg-max becomes an ordinary element.
            const double other_s = (higher ? total[1] : sums.s) + 1, other_a = higher ? total[2] : sums.a;
            const double shift = other_max - max, factor = exp(shift / temperature);
            s += factor * other_s;
            a += factor * (other_a + shift * other_s);
        }
        total[0] = max;
        total[1] = s;
        total[2] = a;
    }
};

// gradient = e^z (constant + slope (x - max)), except at the label.
struct RowGradient {
    float max, constant, slope, at_label;
    std::int64_t label;  // its column; -1: not in these columns
};

template <class T>
__device__ RowGradient row_gradient(const LogprobEntropyBackward& args, std::int64_t row, const T* x,
                                    float temperature) {
    const LogitInputs& in = args.in;
    const std::int64_t rows = in.shape.rows;
    const float log1p_s = args.stats[rows + row], mean_z = args.stats[2 * rows + row];
    RowGradient g;
    g.max = args.stats[row];
    const Label label = label_of(in, row);
    g.label = label.column;
    const float up_logprob = label.valid && args.grad_logprob ? args.grad_logprob[row] : 0.0f;
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

template <class T>
void forward(const LogprobEntropyForward& args, const LogprobEntropyScratch& scratch, int device,
             cudaStream_t stream) {
    const FinishForward finish{args.logprob, args.entropy, args.stats, args.in.shape.rows, scratch.invalid_labels};
    launch_sums<T>(args.in, finish, scratch.partials, device, stream);
}

template <class T>
void add_shard(const LogprobEntropyShard& args, const LogprobEntropyScratch& scratch, int device,
               cudaStream_t stream) {
    launch_sums<T>(args.in, FinishShard{args.running, scratch.invalid_labels}, scratch.partials, device, stream);
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

void logprob_entropy_shard_cuda(const LogprobEntropyShard& args, const LogprobEntropyScratch& scratch, int device,
                                void* stream) {
    if (args.in.shape.rows == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (args.in.dtype) {
        case Dtype::float32: return add_shard<float>(args, scratch, device, on);
        case Dtype::bfloat16: return add_shard<__nv_bfloat16>(args, scratch, device, on);
        case Dtype::float16: return add_shard<__half>(args, scratch, device, on);
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
