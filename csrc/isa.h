// Instruction sets of the CPU kernels. csrc/<op>_cpu.cpp is compiled once per set, each time into its own namespace.
#pragma once

namespace arpo {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);
// Built in and supported by this processor and operating system.
bool isa_runs(Isa isa);
Isa best_isa();

}  // namespace arpo

// ARPO_CPU_KERNEL(f, Args) declares `void f(const Args&)` for every instruction set, inside namespace arpo;
// ARPO_CALL(isa, f, args) calls the one for `isa`.
#ifdef ARPO_X86
#define ARPO_CPU_KERNEL(function, Args) \
    namespace portable {                \
    void function(const Args&);         \
    }                                   \
    namespace avx2 {                    \
    void function(const Args&);         \
    }                                   \
    namespace avx512 {                  \
    void function(const Args&);         \
    }
#define ARPO_CALL(isa, function, args)                                              \
    ((isa) == ::arpo::Isa::avx512 ? ::arpo::avx512::function(args)                  \
     : (isa) == ::arpo::Isa::avx2 ? ::arpo::avx2::function(args)                    \
                                  : ::arpo::portable::function(args))
#else
#define ARPO_CPU_KERNEL(function, Args) \
    namespace portable {                \
    void function(const Args&);         \
    }
#define ARPO_CALL(isa, function, args) ((void)(isa), ::arpo::portable::function(args))
#endif
