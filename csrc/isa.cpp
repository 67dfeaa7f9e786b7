#include "isa.h"

namespace arpo {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::portable: return "portable";
    }
    return "unknown";
}

bool isa_runs(Isa isa) {
#ifdef ARPO_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    switch (isa) {
        case Isa::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx2: return avx2;
        case Isa::portable: return true;
    }
    return false;
#else
    return isa == Isa::portable;
#endif
}

Isa best_isa() {
    if (isa_runs(Isa::avx512)) return Isa::avx512;
    if (isa_runs(Isa::avx2)) return Isa::avx2;
    return Isa::portable;
}

}  // namespace arpo
