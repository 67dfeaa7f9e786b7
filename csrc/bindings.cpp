// Every function of arpo_ext._C, grouped by op. Tensors arrive as addresses, sizes, strides and a dtype code, so that
// this module needs no torch. Arguments are checked here; kernels trust them. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "isa.h"

#ifdef ARPO_HAVE_CUDA
#include "device_cuda.h"
#endif

namespace py = pybind11;

namespace arpo {
namespace {

using Address = std::uintptr_t;

template <class T>
[[maybe_unused]] T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// -1 stands for the best one.
[[maybe_unused]] Isa choose_isa(int code) {
    if (code < 0) {
        static const Isa best = best_isa();
        return best;
    }
    ARPO_CHECK(code <= static_cast<int>(Isa::avx512), "instruction set code must be -1 to 2, got ", code);
    const Isa isa = static_cast<Isa>(code);
    ARPO_CHECK(isa_runs(isa), "instruction set ", isa_name(isa), " does not run on this processor");
    return isa;
}

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
    return py::str("built without CUDA (no nvcc at build time)");
#endif
}

void bind_machine(py::module_& m) {
    m.def("build_info", &build_info);
    m.def("instruction_sets", &instruction_sets);
    m.def("cuda_unusable", &cuda_unusable);
    py::dict dtypes;
    dtypes["float32"] = static_cast<int>(Dtype::float32);
    dtypes["bfloat16"] = static_cast<int>(Dtype::bfloat16);
    dtypes["float16"] = static_cast<int>(Dtype::float16);
    m.attr("DTYPES") = dtypes;
}

}  // namespace
}  // namespace arpo

PYBIND11_MODULE(_C, m) {
    arpo::bind_machine(m);
}
