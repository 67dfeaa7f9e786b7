// Every function of arpo_ext._C, grouped by op. Tensors arrive as addresses, sizes, strides and a dtype code, so that
// this module needs no torch. Arguments are checked here; kernels trust them. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "branch_points.h"
#include "branch_tokens.h"
#include "check.h"
#include "dtype.h"
#include "expand_advantages.h"
#include "group_advantages.h"
#include "huge_pages.h"
#include "isa.h"
#include "kept_memory.h"
#include "logits_stats.h"
#include "logprob_entropy.h"
#include "policy_loss.h"
#include "segment_advantages.h"

#ifdef ARPO_HAVE_CUDA
#include "device_cuda.h"
#endif

namespace py = pybind11;

namespace arpo {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// -1 stands for the best one.
Isa choose_isa(int code) {
    if (code < 0) {
        static const Isa best = best_isa();
        return best;
    }
    ARPO_CHECK(code <= static_cast<int>(Isa::avx512), "instruction set code must be -1 to 2, got ", code);
    const Isa isa = static_cast<Isa>(code);
    ARPO_CHECK(isa_runs(isa), "instruction set ", isa_name(isa), " does not run on this processor");
    return isa;
}

// Beyond this range temperature, or 1 / temperature^2 times an upstream gradient, leaves float32. NaN is out of range
// too. 1e30 in float32 is a little more than in double, and passes too, as 1e-15 does.
bool valid_temperature(double temperature) { return temperature >= 1e-15 && temperature <= 1e30f; }
constexpr const char* kTemperatureRange = "temperature must be positive, in 1e-15 to 1e30, got ";

py::dict build_info() {
    py::dict info;
    info["compiler"] = ARPO_COMPILER;
#ifdef ARPO_HAVE_CUDA
    info["cuda"] = ARPO_CUDA_VERSION;
    info["cuda_architectures"] = ARPO_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    return info;
}

// Name -> code of the instruction sets that run here.
py::dict instruction_sets() {
    py::dict found;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (isa_runs(isa)) found[isa_name(isa)] = static_cast<int>(isa);
    }
    return found;
}

// None if CUDA kernels can run here, else the reason.
py::object cuda_unusable() {
#ifdef ARPO_HAVE_CUDA
    const std::string reason = cuda::unusable_reason();
    return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
#else
    return py::str("built without CUDA (no nvcc at build time, or ARPO_CUDA=OFF)");
#endif
}

void bind_machine(py::module_& m) {
    m.def("build_info", &build_info);
    m.def("instruction_sets", &instruction_sets);
    m.def("cuda_unusable", &cuda_unusable);
    m.def("prefer_huge_pages", [](Address start, std::int64_t bytes) { prefer_huge_pages(at<void>(start), bytes); });
    py::class_<KeptMemory>(m, "KeptMemory", py::buffer_protocol())
        .def(py::init<std::int64_t>())
        .def_buffer([](const KeptMemory& memory) {
            const py::ssize_t bytes = memory.bytes();
            return py::buffer_info(static_cast<std::uint8_t*>(memory.start()), bytes);
        });
    m.def("release_kept_memory", &release_kept_memory);
    py::dict dtypes;
    dtypes["float32"] = static_cast<int>(Dtype::float32);
    dtypes["bfloat16"] = static_cast<int>(Dtype::bfloat16);
    dtypes["float16"] = static_cast<int>(Dtype::float16);
    m.attr("DTYPES") = dtypes;
}

// Arguments that forward and backward, CPU and CUDA share; strides are in elements (see LogitRows).
LogitInputs logit_inputs(Address logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t inner,
                         std::int64_t outer_stride, std::int64_t inner_stride, Address labels, Address mask,
                         Address temperatures, std::int64_t temperature_stride, double temperature,
                         std::int64_t ignore_index, std::int64_t vocab_start, std::int64_t vocab_total) {
    ARPO_CHECK(dtype >= 0 && dtype <= 2, "dtype code must be 0 to 2, got ", dtype);
    ARPO_CHECK(rows >= 0 && vocab >= 1, "logits must have at least one column, got ", rows, " x ", vocab);
    ARPO_CHECK(inner >= 1, "inner rows must be at least 1, got ", inner);
    ARPO_CHECK(temperatures != 0 || valid_temperature(temperature), kTemperatureRange, temperature);
    ARPO_CHECK(vocab_start >= 0 && vocab_start <= vocab_total - vocab, "a shard of ", vocab, " columns from column ",
               vocab_start, " does not fit a vocabulary of ", vocab_total);
    return {{rows, vocab, inner, outer_stride, inner_stride},
            static_cast<Dtype>(dtype),
            at<const void>(logits),
            at<const std::int64_t>(labels),
            at<const std::uint8_t>(mask),
            at<const float>(temperatures),
            temperature_stride,
            temperature,
            ignore_index,
            vocab_start,
            vocab_total};
}

// A label elsewhere has no logit here: a shard alone has no logprob, and element [-1] would be read.
void check_whole(const LogitInputs& in) {
    ARPO_CHECK(in.vocab_total == in.shape.vocab, "forward needs all columns, got ", in.shape.vocab, " of ",
               in.vocab_total);
}

// What only a device where memory can be read here allows: a label outside the vocabulary would be read out of bounds.
void check_rows_on_cpu(const LogitInputs& in) {
    for (std::int64_t row = 0; row < in.shape.rows; ++row) {
        if (in.mask && !in.mask[row]) continue;
        if (in.labels && in.labels[row] != in.ignore_index) {
            ARPO_CHECK(in.labels[row] >= 0 && in.labels[row] < in.vocab_total, "labels must be in 0 to ",
                       in.vocab_total - 1, " or equal ignore_index ", in.ignore_index, ", got ", in.labels[row],
                       " at row ", row);
        }
        if (in.temperatures) {
            const float temperature = in.temperatures[row * in.temperature_stride];
            ARPO_CHECK(valid_temperature(temperature), kTemperatureRange, temperature, " at row ", row);
        }
    }
}

void bind_logprob_entropy(py::module_& m) {
    py::class_<LogitInputs>(m, "LogitInputs").def(py::init(&logit_inputs));

    m.def("logprob_entropy_forward", [](int isa_code, int threads, const LogitInputs& in, Address logprob,
                                        Address entropy, Address stats) {
        const Isa isa = choose_isa(isa_code);
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        check_whole(in);
        check_rows_on_cpu(in);
        const LogprobEntropyForward args{in, at<float>(logprob), at<float>(entropy), at<float>(stats), threads};
        if (in.shape.rows == 0) return;
        py::gil_scoped_release release;
        ARPO_CALL(isa, logprob_entropy_forward, args);
    });

    m.def("logprob_entropy_shard", [](int isa_code, int threads, const LogitInputs& in, Address running) {
        const Isa isa = choose_isa(isa_code);
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        check_rows_on_cpu(in);
        const LogprobEntropyShard args{in, at<double>(running), threads};
        if (in.shape.rows == 0) return;
        py::gil_scoped_release release;
        ARPO_CALL(isa, logprob_entropy_shard, args);
    });

    // grad_logits may be the logits themselves; its rows have their own layout.
    m.def("logprob_entropy_backward", [](int isa_code, int threads, const LogitInputs& in, Address stats,
                                         Address grad_logprob, Address grad_entropy, Address grad_logits,
                                         std::int64_t grad_inner, std::int64_t grad_outer_stride,
                                         std::int64_t grad_inner_stride) {
        const Isa isa = choose_isa(isa_code);
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        check_rows_on_cpu(in);
        ARPO_CHECK(grad_inner >= 1, "inner rows must be at least 1, got ", grad_inner);
        const LogitRows grad_shape{in.shape.rows, in.shape.vocab, grad_inner, grad_outer_stride, grad_inner_stride};
        const LogprobEntropyBackward args{in,         at<const float>(stats), at<const float>(grad_logprob),
                                          at<const float>(grad_entropy), grad_shape,
                                          at<void>(grad_logits),         threads};
        if (in.shape.rows == 0) return;
        py::gil_scoped_release release;
        ARPO_CALL(isa, logprob_entropy_backward, args);
    });
#ifdef ARPO_HAVE_CUDA
    m.def("logprob_entropy_partials", [](const LogitInputs& in, int device) {
        return logprob_entropy_partials(in.shape, device);
    });
    m.def("logprob_entropy_forward_cuda",
          [](const LogitInputs& in, Address logprob, Address entropy, Address stats, Address partials,
             Address invalid_labels, int device, Address stream) {
              check_whole(in);
              const LogprobEntropyForward args{in, at<float>(logprob), at<float>(entropy), at<float>(stats), 0};
              const LogprobEntropyScratch scratch{at<float>(partials), at<unsigned long long>(invalid_labels)};
              py::gil_scoped_release release;
              logprob_entropy_forward_cuda(args, scratch, device, at<void>(stream));
          });
    m.def("logprob_entropy_shard_cuda", [](const LogitInputs& in, Address running, Address partials,
                                           Address invalid_labels, int device, Address stream) {
        const LogprobEntropyShard args{in, at<double>(running), 0};
        const LogprobEntropyScratch scratch{at<float>(partials), at<unsigned long long>(invalid_labels)};
        py::gil_scoped_release release;
        logprob_entropy_shard_cuda(args, scratch, device, at<void>(stream));
    });
    m.def("logprob_entropy_row_bytes", &logprob_entropy_row_bytes);
    m.def("logprob_entropy_backward_cuda",
          [](const LogitInputs& in, Address stats, Address grad_logprob, Address grad_entropy, Address grad_logits,
             std::int64_t grad_inner, std::int64_t grad_outer_stride, std::int64_t grad_inner_stride, Address rows,
             int device, Address stream) {
              ARPO_CHECK(grad_inner >= 1, "inner rows must be at least 1, got ", grad_inner);
              const LogitRows grad_shape{in.shape.rows, in.shape.vocab, grad_inner, grad_outer_stride,
                                         grad_inner_stride};
              const LogprobEntropyBackward args{in,         at<const float>(stats), at<const float>(grad_logprob),
                                                at<const float>(grad_entropy), grad_shape,
                                                at<void>(grad_logits),         0};
              py::gil_scoped_release release;
              logprob_entropy_backward_cuda(args, at<void>(rows), device, at<void>(stream));
          });
#endif
}

LogitsStatsOutputs logits_stats_outputs(Address logprob, Address entropy, Address logsumexp, Address sum_p2,
                                        Address argmax, Address argmax_logprob) {
    return {at<float>(logprob), at<float>(entropy),       at<float>(logsumexp),
            at<float>(sum_p2),  at<std::int64_t>(argmax), at<float>(argmax_logprob)};
}

void bind_logits_stats(py::module_& m) {
    py::class_<LogitsStatsOutputs>(m, "LogitsStatsOutputs").def(py::init(&logits_stats_outputs));

    m.def("logits_stats", [](int isa_code, int threads, const LogitInputs& in, const LogitsStatsOutputs& out) {
        const Isa isa = choose_isa(isa_code);
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        check_whole(in);
        check_rows_on_cpu(in);
        const LogitsStats args{in, out, threads};
        if (in.shape.rows == 0) return;
        py::gil_scoped_release release;
        ARPO_CALL(isa, logits_stats, args);
    });
#ifdef ARPO_HAVE_CUDA
    m.def("logits_stats_partials",
          [](const LogitInputs& in, int device) { return logits_stats_partials(in.shape, device); });
    m.def("logits_stats_cuda", [](const LogitInputs& in, const LogitsStatsOutputs& out, Address partials,
                                  Address invalid_labels, int device, Address stream) {
        check_whole(in);
        ARPO_CHECK(in.shape.vocab <= 0x7fffffff, "logits_stats on a GPU takes up to 2^31 - 1 columns, got ",
                   in.shape.vocab);
        py::gil_scoped_release release;
        logits_stats_cuda(in, out, at<float>(partials), at<unsigned long long>(invalid_labels), device,
                          at<void>(stream));
    });
#endif
}

BranchPaths branch_paths(Address entropy_now, Address entropy_root, Address tree, Address room, Address key,
                         Address turn, Address streak, Address siblings, Address value, std::int64_t paths,
                         std::int64_t trees) {
    return {at<const float>(entropy_now),
            at<const float>(entropy_root),
            at<const std::int64_t>(tree),
            at<const std::int32_t>(room),
            at<const std::int64_t>(key),
            at<const std::int32_t>(turn),
            at<const std::int32_t>(streak),
            at<const std::int32_t>(siblings),
            at<const float>(value),
            paths,
            trees};
}

BranchRule branch_rule(int policy, double base, double weight, double threshold, double penalty, std::int32_t width,
                       std::int64_t seed) {
    ARPO_CHECK(policy >= 0 && policy <= static_cast<int>(BranchPolicy::appo), "policy code must be 0 to 6, got ",
               policy);
    ARPO_CHECK(width >= 0, "width must be at least 0, got ", width);
    return {static_cast<BranchPolicy>(policy),
            static_cast<float>(base),
            static_cast<float>(weight),
            static_cast<float>(threshold),
            static_cast<float>(penalty),
            width,
            static_cast<std::uint64_t>(seed)};
}

// A policy must not meet a null pointer in what it reads.
void check_branch_inputs(const BranchRule& rule, const BranchPaths& paths) {
    ARPO_CHECK(paths.streak || rule.policy != BranchPolicy::aepo || paths.paths == 0, "aepo needs streak");
    ARPO_CHECK(paths.siblings || rule.policy != BranchPolicy::at2po || paths.paths == 0, "at2po needs siblings");
    ARPO_CHECK(paths.value || rule.policy != BranchPolicy::appo || paths.paths == 0, "appo needs value");
}

void bind_branch_points(py::module_& m) {
    py::class_<BranchPaths>(m, "BranchPaths").def(py::init(&branch_paths));
    py::class_<BranchRule>(m, "BranchRule").def(py::init(&branch_rule));

    m.def("branch_scores_cpu", [](const BranchRule& rule, const BranchPaths& paths, Address score, Address wish) {
        check_branch_inputs(rule, paths);
        py::gil_scoped_release release;
        branch_scores_cpu(rule, paths, at<float>(score), at<std::int32_t>(wish));
    });
    m.def("branch_points_cpu", [](const BranchRule& rule, const BranchPaths& paths, Address children) {
        check_branch_inputs(rule, paths);
        py::gil_scoped_release release;
        branch_points_cpu(rule, paths, at<std::int32_t>(children));
    });
#ifdef ARPO_HAVE_CUDA
    m.def("branch_scores_cuda", [](const BranchRule& rule, const BranchPaths& paths, Address score, Address wish,
                                   int device, Address stream) {
        check_branch_inputs(rule, paths);
        py::gil_scoped_release release;
        branch_scores_cuda(rule, paths, at<float>(score), at<std::int32_t>(wish), device, at<void>(stream));
    });
    m.def("branch_points_cuda",
          [](const BranchRule& rule, const BranchPaths& paths, Address children, int device, Address stream) {
              check_branch_inputs(rule, paths);
              py::gil_scoped_release release;
              branch_points_cuda(rule, paths, at<std::int32_t>(children), device, at<void>(stream));
          });
#endif
}

TokenRule token_rule(int scope, std::int64_t count, std::int64_t min_distance, bool fallback, double eps) {
    ARPO_CHECK(scope >= 0 && scope <= static_cast<int>(TokenScope::none), "scope code must be 0 to 2, got ", scope);
    ARPO_CHECK(count >= 0, "count must be at least 0, got ", count);
    ARPO_CHECK(min_distance >= 1, "min_distance must be at least 1, got ", min_distance);
    ARPO_CHECK(eps >= 0, "eps must be at least 0, got ", eps);
    return {static_cast<TokenScope>(scope), count, min_distance, fallback, eps};
}

TokenRows token_rows(Address entropy, Address value, Address mask, Address candidate, Address tree, Address key,
                     Address room, std::int64_t rows, std::int64_t tokens, std::int64_t trees) {
    return {at<const float>(entropy),
            at<const float>(value),
            at<const std::uint8_t>(mask),
            at<const std::uint8_t>(candidate),
            at<const std::int64_t>(tree),
            at<const std::int64_t>(key),
            at<const std::int32_t>(room),
            rows,
            tokens,
            trees};
}

TokenChoice token_choice(Address row, Address token, Address score) {
    return {at<std::int64_t>(row), at<std::int64_t>(token), at<float>(score)};
}

FutureValue future_value(Address log_ratio, Address mask, std::int64_t rows, std::int64_t tokens, double gamma,
                         double low, double high, Address value) {
    return {at<const float>(log_ratio), at<const std::uint8_t>(mask), rows,           tokens, gamma,
            static_cast<float>(low),    static_cast<float>(high),     at<float>(value)};
}

void bind_branch_tokens(py::module_& m) {
    py::class_<TokenRule>(m, "TokenRule").def(py::init(&token_rule));
    py::class_<TokenRows>(m, "TokenRows").def(py::init(&token_rows));
    py::class_<TokenChoice>(m, "TokenChoice").def(py::init(&token_choice));
    py::class_<FutureValue>(m, "FutureValue").def(py::init(&future_value));

    m.def("branch_tokens_cpu",
          [](const TokenRule& rule, const TokenRows& rows, const TokenChoice& choice, int threads) {
              ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
              py::gil_scoped_release release;
              branch_tokens_cpu(rule, rows, choice, threads);
          });
    m.def("future_value_cpu", [](const FutureValue& args, int threads) {
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        py::gil_scoped_release release;
        future_value_cpu(args, threads);
    });
#ifdef ARPO_HAVE_CUDA
    m.def("branch_tokens_scratch_bytes", &branch_tokens_scratch_bytes);
    m.def("branch_tokens_cuda", [](const TokenRule& rule, const TokenRows& rows, const TokenChoice& choice,
                                   Address scratch, int device, Address stream) {
        py::gil_scoped_release release;
        branch_tokens_cuda(rule, rows, choice, at<void>(scratch), device, at<void>(stream));
    });
    m.def("future_value_cuda", [](const FutureValue& args, int device, Address stream) {
        py::gil_scoped_release release;
        future_value_cuda(args, device, at<void>(stream));
    });
#endif
}

GroupLeaves group_leaves(Address reward, Address tree, Address subgroup, Address length, std::int64_t leaves) {
    return {at<const float>(reward), at<const std::int64_t>(tree), at<const std::int64_t>(subgroup),
            at<const std::int64_t>(length), leaves};
}

Estimator estimator_of(int code, const GroupLeaves& in) {
    ARPO_CHECK(code >= 0 && code <= static_cast<int>(Estimator::at2po), "estimator code must be 0 to 10, got ", code);
    const Estimator estimator = static_cast<Estimator>(code);
    ARPO_CHECK(in.subgroup != nullptr || in.leaves == 0 || !uses_subgroups(estimator), "estimator code ", code,
               " needs subgroups");
    return estimator;
}

SegmentTree segment_tree(Address leaf, Address leaf_weight, Address entropy, Address subgroup, Address parent,
                         Address leaf_segment, std::int64_t leaves, std::int64_t segments) {
    return {at<const float>(leaf),
            at<const float>(leaf_weight),
            at<const float>(entropy),
            at<const std::int64_t>(subgroup),
            at<const std::int64_t>(parent),
            at<const std::int64_t>(leaf_segment),
            leaves,
            segments};
}

Credit credit_of(int code, const SegmentTree& tree) {
    ARPO_CHECK(code >= 0 && code <= static_cast<int>(Credit::prefix), "credit code must be 0 to 2, got ", code);
    const Credit credit = static_cast<Credit>(code);
    ARPO_CHECK(tree.entropy != nullptr || tree.segments == 0 || credit != Credit::turn, "turn credit needs entropies");
    ARPO_CHECK(tree.subgroup != nullptr || tree.leaves == 0 || credit != Credit::prefix,
               "prefix credit needs subgroups");
    return credit;
}

ExpandRows expand_rows_call(Address leaf, Address mask, int mask_type, std::int64_t mask_stride, std::int64_t rows,
                            std::int64_t columns, Address out, int threads) {
    ARPO_CHECK(mask_type >= 0 && mask_type <= static_cast<int>(MaskType::float32),
               "mask type code must be 0 to 3, got ", mask_type);
    ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
    return {at<const float>(leaf), at<const void>(mask), static_cast<MaskType>(mask_type), mask_stride, rows, columns,
            at<float>(out),        threads};
}

ExpandPacked expand_packed_call(Address leaf, Address length, std::int64_t leaves, std::int64_t total, Address out,
                                int threads) {
    const std::int64_t* lengths = at<const std::int64_t>(length);
    std::int64_t sum = 0;
    for (std::int64_t l = 0; l < leaves; ++l) {
        ARPO_CHECK(lengths[l] >= 0, "expand_advantages: got length ", lengths[l], " of leaf ", l,
                   "; expected at least 0");
        ARPO_CHECK(lengths[l] <= INT64_MAX - sum, "expand_advantages: got lengths that add up to more than 2^63 - 1");
        sum += lengths[l];
    }
    ARPO_CHECK(sum == total, "expand_advantages: got total ", total, "; expected ", sum, ", the sum of the lengths");
    ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
    return {at<const float>(leaf), lengths, leaves, total, at<float>(out), threads};
}

void bind_expand_advantages(py::module_& m) {
    py::class_<ExpandRows>(m, "ExpandRows").def(py::init(&expand_rows_call));

    m.def("expand_rows", [](int isa_code, const ExpandRows& args) {
        const Isa isa = choose_isa(isa_code);
        py::gil_scoped_release release;
        ARPO_CALL(isa, expand_rows, args);
    });
    m.def("expand_packed", [](int isa_code, Address leaf, Address length, std::int64_t leaves, std::int64_t total,
                              Address out, int threads) {
        const Isa isa = choose_isa(isa_code);
        const ExpandPacked args = expand_packed_call(leaf, length, leaves, total, out, threads);
        py::gil_scoped_release release;
        ARPO_CALL(isa, expand_packed, args);
    });
#ifdef ARPO_HAVE_CUDA
    m.def("expand_rows_cuda", [](const ExpandRows& args, int device, Address stream) {
        py::gil_scoped_release release;
        expand_rows_cuda(args, device, at<void>(stream));
    });
    m.def("expand_packed_cuda", [](Address leaf, Address end, std::int64_t leaves, std::int64_t total, Address out,
                                   int device, Address stream) {
        py::gil_scoped_release release;
        expand_packed_cuda(at<const float>(leaf), at<const std::int64_t>(end), leaves, total, at<float>(out), device,
                           at<void>(stream));
    });
#endif
}

void bind_group_advantages(py::module_& m) {
    py::class_<GroupLeaves>(m, "GroupLeaves").def(py::init(&group_leaves));
    py::class_<SegmentTree>(m, "SegmentTree").def(py::init(&segment_tree));

    m.def("group_advantages_cpu",
          [](int estimator, double eps, const GroupLeaves& in, Address leaf, int threads) {
              const Estimator chosen = estimator_of(estimator, in);
              ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
              py::gil_scoped_release release;
              group_advantages_cpu(chosen, eps, in, at<float>(leaf), threads);
          });
    m.def("segment_advantages_cpu", [](int credit, const SegmentTree& tree, Address segment, Address pair) {
        const Credit chosen = credit_of(credit, tree);
        py::gil_scoped_release release;
        segment_advantages_cpu(chosen, tree, at<float>(segment), at<float>(pair));
    });
#ifdef ARPO_HAVE_CUDA
    m.def("group_advantages_cuda", [](int estimator, double eps, const GroupLeaves& in, Address leaf,
                                      Address deviation, int device, Address stream) {
        const Estimator chosen = estimator_of(estimator, in);
        py::gil_scoped_release release;
        group_advantages_cuda(chosen, eps, in, at<float>(leaf), at<double>(deviation), device, at<void>(stream));
    });
    m.def("segment_advantages_workspace", &segment_advantages_workspace);
    m.def("segment_advantages_cuda", [](int credit, const SegmentTree& tree, Address segment, Address pair,
                                        Address sums, int device, Address stream) {
        const Credit chosen = credit_of(credit, tree);
        py::gil_scoped_release release;
        segment_advantages_cuda(chosen, tree, at<float>(segment), at<float>(pair), at<void>(sums), device,
                                at<void>(stream));
    });
#endif
}

// Addresses in the order of PolicyTokens, then group, parent, leaf_segment, leaf_weight and, on the kernel's device, the
// numbers normalizer, kl_coef and entropy_coef, and the five of the clip together; 0 where there is none. `numbers` holds
// those given as such, then clip_low, clip_high, dual_clip, tau_positive and tau_negative.
PolicyLoss policy_loss_call(const std::array<Address, 15>& addresses, const std::array<double, 8>& numbers,
                            std::int64_t count, bool pairs, int level_code, bool wide, std::int64_t groups,
                            bool mean_gradient, std::int64_t leaves, int clip, int kl) {
    ARPO_CHECK(level_code >= 0 && level_code <= static_cast<int>(PolicyLevel::path), "level code must be 0 to 2, got ",
               level_code);
    ARPO_CHECK(clip >= 0 && clip <= static_cast<int>(PolicyClip::sapo), "clip code must be 0 to 3, got ", clip);
    ARPO_CHECK(kl >= 0 && kl <= static_cast<int>(PolicyKl::k3), "kl code must be 0 to 3, got ", kl);
    const auto column = [&](int i) { return at<const float>(addresses[i]); };
    const auto number = [&](int i) { return PolicyNumber{at<const double>(addresses[11 + i]), numbers[i]}; };
    const PolicyLevel level = static_cast<PolicyLevel>(level_code);
    const PolicyTokens tokens{column(0), column(1), column(2), column(3), column(4), column(5), column(6)};
    const PolicyGroups shared{level,
                              at<const void>(addresses[7]),
                              wide,
                              groups,
                              mean_gradient,
                              at<const std::int64_t>(addresses[8]),
                              at<const std::int64_t>(addresses[9]),
                              column(10),
                              level == PolicyLevel::path ? column(2) : nullptr,
                              leaves};
    return {tokens,
            count,
            pairs,
            shared,
            {static_cast<PolicyClip>(clip), numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
             at<const double>(addresses[14]), static_cast<PolicyKl>(kl), number(0), number(1), number(2)}};
}

// What only a device where memory can be read here allows.
void check_paths_on_cpu(const PolicyGroups& tree) {
    for (std::int64_t s = 0; tree.level == PolicyLevel::path && s < tree.groups; ++s) {
        ARPO_CHECK(tree.parent[s] >= -1 && tree.parent[s] < s, "policy_loss: got parent ", tree.parent[s],
                   " of segment ", s, "; expected -1 to ", s - 1);
    }
    for (std::int64_t l = 0; l < tree.leaves; ++l) {
        ARPO_CHECK(tree.leaf_segment[l] >= 0 && tree.leaf_segment[l] < tree.groups, "policy_loss: got leaf_segment ",
                   tree.leaf_segment[l], " at ", l, "; expected 0 to ", tree.groups - 1);
    }
}

void bind_policy_loss(py::module_& m) {
    py::class_<PolicyLoss>(m, "PolicyLoss").def(py::init(&policy_loss_call));

    // Gradients 0: not wanted.
    m.def("policy_loss_cpu", [](int isa_code, int threads, const PolicyLoss& loss, Address value, Address sums,
                                Address gradient, Address entropy_gradient) {
        const Isa isa = choose_isa(isa_code);
        ARPO_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
        check_paths_on_cpu(loss.groups);
        const PolicyLossOutputs out{at<float>(value), at<double>(sums), at<float>(gradient),
                                    at<float>(entropy_gradient)};
        for (float* gradients : {out.gradient, out.entropy_gradient}) {
            if (gradients) prefer_huge_pages(gradients, loss.count * static_cast<std::int64_t>(sizeof(float)));
        }
        std::int64_t misplaced = -1;
        const PolicyLossOnCpu args{loss, out, threads, &misplaced};
        {
            py::gil_scoped_release release;
            ARPO_CALL(isa, policy_loss_forward, args);
        }
        ARPO_CHECK(misplaced < 0, "policy_loss: got a segment or row out of range at token ", misplaced,
                   "; expected 0 to ", loss.groups.groups - 1);
    });
#ifdef ARPO_HAVE_CUDA
    m.def("policy_loss_workspace", &policy_loss_workspace);
    m.def("policy_loss_cuda", [](const PolicyLoss& loss, Address value, Address sums, Address gradient,
                                 Address entropy_gradient, Address workspace, int device, Address stream) {
        const PolicyLossOutputs out{at<float>(value), at<double>(sums), at<float>(gradient),
                                    at<float>(entropy_gradient)};
        py::gil_scoped_release release;
        policy_loss_cuda(loss, out, at<void>(workspace), device, at<void>(stream));
    });
#endif
}

}  // namespace
}  // namespace arpo

PYBIND11_MODULE(_C, m) {
    arpo::bind_machine(m);
    arpo::bind_logprob_entropy(m);
    arpo::bind_logits_stats(m);
    arpo::bind_branch_points(m);
    arpo::bind_branch_tokens(m);
    arpo::bind_group_advantages(m);
    arpo::bind_expand_advantages(m);
    arpo::bind_policy_loss(m);
}
