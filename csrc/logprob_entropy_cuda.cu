// Forward: one read (row_sums.cuh). Backward: one read, one write, in place if asked; the floor is a copy, 1.16 ms for
// [8192, 151936] bfloat16 at 4.3 TB/s. Not yet measured.
#include "logprob_entropy.h"
#include "row_kernels.cuh"

namespace arpo {
namespace {

using namespace cuda;

struct FinishForward {
    static constexpr bool kStats = false;
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
    __device__ void operator()(const LogitInputs& in, std::int64_t row, const T* x, RowSums<false> sums) const {
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
    static constexpr bool kStats = false;
    double* running;
    unsigned long long* invalid_labels;

    __device__ void skip(std::int64_t) const {}

    template <class T>
    __device__ void operator()(const LogitInputs& in, std::int64_t row, const T* x, const RowSums<false>& sums) const {
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
struct alignas(16) RowGradient {
    float max, constant, slope, at_label;
    float scale_high, scale_low, lowest;  // of Exp
    bool masked;
    std::int64_t label;  // its column; -1: not in these columns
};

// One thread per row. A launch of its own, because in place a block could overwrite the label's logit before another
// one of the same row has read it; and because a block of the second kernel lives too short to work this out once more.
template <class T>
__global__ void __launch_bounds__(kThreads) row_gradients(const LogprobEntropyBackward args, RowGradient* found) {
    const LogitInputs& in = args.in;
    const std::int64_t rows = in.shape.rows;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    RowGradient g{};
    g.label = -1;
    g.masked = skipped(in, row);
    if (!g.masked) {
        const double exact_temperature = temperature_of(in, row);
        const float temperature = static_cast<float>(exact_temperature);
        const Exp exp(exact_temperature);
        g.scale_high = exp.scale_high;
        g.scale_low = exp.scale_low;
        g.lowest = exp.lowest;
        g.max = args.stats[row];
        const float log1p_s = args.stats[rows + row], mean_z = args.stats[2 * rows + row];
        const Label label = label_of(in, row);
        g.label = label.column;
        const float up_logprob = label.valid && args.grad_logprob ? args.grad_logprob[row] : 0.0f;
        const float up_entropy = args.grad_entropy ? args.grad_entropy[row] : 0.0f;
        const float scale = expf(-log1p_s) / temperature;
        g.constant = scale * (up_entropy * mean_z - up_logprob);
        g.slope = -scale * up_entropy / temperature;
        if (g.label >= 0) {
            const T* x = static_cast<const T*>(in.logits) + in.shape.offset(row);
            const float z = (to_float(x[g.label]) - g.max) / temperature;
            const float p = expf(z - log1p_s);
            const float of_entropy = p > 0 ? up_entropy * p * (z - mean_z) : p;
            g.at_label = (-up_logprob * expm1f(z - log1p_s) - of_entropy) / temperature;
        }
    }
    found[row] = g;
}

// One block per piece of a row; x and gradient may be the same memory.
template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_pieces(const LogprobEntropyBackward args, const RowGradient* rows, int pieces, std::int64_t length) {
    constexpr int kPack = Pack<T>::kSize;
    const std::int64_t row = blockIdx.x / pieces;
    const std::int64_t begin = (blockIdx.x % pieces) * length;
    const std::int64_t vocab = args.in.shape.vocab;
    const std::int64_t end = begin + length < vocab ? begin + length : vocab;
    const T* x = static_cast<const T*>(args.in.logits) + args.in.shape.offset(row);
    T* gradient = static_cast<T*>(args.grad_logits) + args.grad_shape.offset(row);
    const RowGradient g = rows[row];
    const Exp exp(g.scale_high, g.scale_low, g.lowest);
    const auto value = [&](T logit) {
        const float d = exp.clamp(to_float(logit) - g.max);
        return from_float<T>(exp(d) * fmaf(g.slope, d, g.constant));
    };
    const T zero = from_float<T>(0.0f), at_label = from_float<T>(g.at_label);
    const auto single = [&](std::int64_t i) { gradient[i] = g.masked ? zero : i == g.label ? at_label : value(x[i]); };

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
        Pack<T> pack;
        if (g.masked) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) pack.values[i] = zero;
        } else {
            pack = load_once(reinterpret_cast<const Pack<T>*>(x + first));
#pragma unroll
            for (int i = 0; i < kPack; ++i) pack.values[i] = value(pack.values[i]);
        }
        store_once(reinterpret_cast<Pack<T>*>(gradient + first), pack);
        // By the thread that wrote the pack, so after it.
        if (g.label >= first && g.label < first + kPack) gradient[g.label] = at_label;
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
void backward(const LogprobEntropyBackward& args, RowGradient* found, cudaStream_t stream) {
    const LogitRows& shape = args.in.shape;
    const std::int64_t length = 4 * kThreads * Pack<T>::kSize;
    const std::int64_t pieces = ceil_div(shape.vocab, length);
    row_gradients<T><<<grid(ceil_div(shape.rows, kThreads)), kThreads, 0, stream>>>(args, found);
    check(cudaGetLastError(), "row_gradients launch");
    const unsigned blocks = grid(shape.rows * pieces);
    backward_pieces<T><<<blocks, kThreads, 0, stream>>>(args, found, static_cast<int>(pieces), length);
    check(cudaGetLastError(), "backward_pieces launch");
}

}  // namespace

std::int64_t logprob_entropy_partials(const LogitRows& shape, int device) {
    return partial_floats<false>(shape, device);
}

std::int64_t logprob_entropy_row_bytes() { return sizeof(RowGradient); }

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

void logprob_entropy_backward_cuda(const LogprobEntropyBackward& args, void* rows, int device, void* stream) {
    if (args.in.shape.rows == 0) return;
    const DeviceGuard guard(device);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    RowGradient* const found = static_cast<RowGradient*>(rows);
    switch (args.in.dtype) {
        case Dtype::float32: return backward<float>(args, found, on);
        case Dtype::bfloat16: return backward<__nv_bfloat16>(args, found, on);
        case Dtype::float16: return backward<__half>(args, found, on);
    }
}

}  // namespace arpo
