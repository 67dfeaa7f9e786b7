// Not yet measured.
//
// Token ratios: one kernel reads each input once (16 bytes a token) and writes the gradient once (4 bytes), a second of
// one block adds up the blocks' sums: 42 MB and 10 us for 256 x 8192 tokens at 4.3 TB/s. Sums run in an order that
// depends on the shape alone, never through atomics on floats, so equal inputs give equal bits.
//
// Ratios over groups are found before that: the first and last token of each group (integer atomics, at run ends only),
// then one block per group adds up its tokens between them. Groups that stand together cost two reads of the inputs;
// interleaved ones read what lies between as well. Packed paths add a kernel with a thread per leaf, which walks to the
// root, and one with a block per segment, which walks up from every leaf: S * L * depth steps.
#include "policy_loss_groups.cuh"

namespace arpo {
namespace {

__global__ void __launch_bounds__(kThreads)
    tokens_kernel(PolicyLoss loss, PolicyLossOutputs out, Workspace workspace, bool aligned) {
    const Bounds rule = bounds_of(loss.rule);
    const double normalizer = value_of(loss.rule.normalizer);
    const Scales scales = {static_cast<float>(-1.0 / normalizer),
                           static_cast<float>(value_of(loss.rule.kl_coef) / normalizer)};
    const float entropy_scale = static_cast<float>(-value_of(loss.rule.entropy_coef) / normalizer);
    const bool grouped = loss.groups.level != PolicyLevel::token;
    float sums[kRows] = {};
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPack;
    int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
    for (; t < loss.count; t += stride) {
        Token tokens[kPack];
        float gradient[kPack], entropy_gradient[kPack];
        load_tokens(loss, t, aligned, tokens);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            gradient[i] = 0.0f;
            entropy_gradient[i] = 0.0f;
            if (tokens[i].weight == 0.0f) continue;
            entropy_gradient[i] = entropy_scale * tokens[i].weight;
            GroupRatio ratio = {kNan, kNan, kNan, kNan, kNan, kNan};
            if (grouped) {
                const int64_t group = group_at(loss.groups, t + i);
                if (group >= 0 && group < loss.groups.groups) ratio = workspace.ratios[group];
            }
            gradient[i] = add_token(loss, rule, tokens[i], grouped ? &ratio : nullptr, scales, sums);
        }
        if (out.gradient) store_pack(out.gradient, t, loss.count, aligned, gradient);
        if (out.entropy_gradient) store_pack(out.entropy_gradient, t, loss.count, aligned, entropy_gradient);
    }
    store_partials(sums, workspace.partials, workspace.columns, blockIdx.x);
}

// One block: the totals of all columns, and the loss.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(PolicyRule rule, PolicyLossOutputs out, Workspace workspace) {
    __shared__ double totals[kRows];
    const int lane = threadIdx.x % cuda::kWarp;
    for (int row = threadIdx.x / cuda::kWarp; row < kRows; row += kWarps) {
        const double* partials = workspace.partials + row * workspace.columns;
        double total = 0.0;
        for (int64_t i = lane; i < workspace.columns; i += cuda::kWarp) {
            total = is_max(row) ? larger(total, partials[i]) : total + partials[i];
        }
        total = warp_total(total, is_max(row));
        if (lane == 0) totals[row] = total;
    }
    __syncthreads();
    if (threadIdx.x < kPolicyLossSums) {
        const int row = threadIdx.x;
        out.sums[row] = row == kSumClipped ? totals[kSumClippedHigh] + totals[kSumClippedLow] : totals[row];
    }
    if (threadIdx.x == 0) {
        double loss = -totals[kObjective];
        if (rule.kl != PolicyKl::none) {
            loss += value_of(rule.kl_coef) * totals[kSumRefKlK1 + static_cast<int>(rule.kl) - 1];
        }
        loss -= value_of(rule.entropy_coef) * totals[kSumEntropy];
        if (workspace.misplaced && *workspace.misplaced != 0) loss = kNan;
        *out.loss = static_cast<float>(loss / value_of(rule.normalizer));
    }
}

// Whether every input and output allows 16-byte accesses.
bool all_aligned(const PolicyTokens& in, const PolicyLossOutputs& out) {
    std::uintptr_t bits = 0;
    for (const void* address : {static_cast<const void*>(in.logprob), static_cast<const void*>(in.old_logprob),
                                static_cast<const void*>(in.advantage), static_cast<const void*>(in.weight),
                                static_cast<const void*>(in.entropy), static_cast<const void*>(in.ref_logprob),
                                static_cast<const void*>(in.importance), static_cast<const void*>(out.gradient),
                                static_cast<const void*>(out.entropy_gradient)}) {
        bits |= reinterpret_cast<std::uintptr_t>(address);
    }
    return bits % 16 == 0;
}

}  // namespace

int64_t policy_loss_workspace(const PolicyLoss& loss) { return workspace_of(loss, nullptr).bytes; }

void policy_loss_cuda(const PolicyLoss& loss, const PolicyLossOutputs& out, void* memory, int device, void* stream) {
    const Workspace workspace = workspace_of(loss, memory);
    const PolicyGroups& shared = loss.groups;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const auto launched = [] { cuda::check(cudaGetLastError(), "policy_loss"); };
    const cuda::DeviceGuard guard(device);
    if (shared.level != PolicyLevel::token) {
        const unsigned blocks = shared.groups < kMaxGroupBlocks ? shared.groups : kMaxGroupBlocks;
        const unsigned run_blocks = blocks_of(loss.count, kMaxGroupBlocks);
        cuda::check(cudaMemsetAsync(workspace.bounds, 0, (2 * shared.groups + 1) * 8, on), "policy_loss");
        bounds_kernel<<<run_blocks, kThreads, 0, on>>>(loss, workspace);
        launched();
        if (blocks > 0) {
            groups_kernel<<<blocks, group_threads(loss.count, shared.groups), 0, on>>>(loss, workspace);
            launched();
        }
        if (shared.level == PolicyLevel::path) {
            const unsigned leaf_blocks = workspace.columns - workspace.token_blocks;
            leaves_kernel<<<leaf_blocks, kThreads, 0, on>>>(loss, workspace);
            launched();
        }
        if (shared.level == PolicyLevel::path && blocks > 0) {
            segments_kernel<<<blocks, kThreads, 0, on>>>(loss, workspace);
            launched();
        }
    }
    const unsigned blocks = workspace.token_blocks;
    tokens_kernel<<<blocks, kThreads, 0, on>>>(loss, out, workspace, all_aligned(loss.tokens, out));
    launched();
    finish_kernel<<<1, kThreads, 0, on>>>(loss.rule, out, workspace);
    launched();
}

}  // namespace arpo
