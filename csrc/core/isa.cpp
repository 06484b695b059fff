#include "core/isa.h"

namespace deltaic {

// Each is defined by cpu/table.cpp, compiled with that instruction set's flags.
namespace baseline {
extern const Ops kOps;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Ops kOps;
}
namespace avx512 {
extern const Ops kOps;
}
namespace avx512bf16 {
extern const Ops kOps;
}
#elif defined(__aarch64__)
namespace neon {
extern const Ops kOps;
}
#endif

const Isa* isa_list(int* count) {
#if defined(__x86_64__)
    // __builtin_cpu_supports asks the operating system (XCR0) as well as the CPU.
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    static const Isa list[] = {{"avx512bf16", has_bf16, true, &avx512bf16::kOps},
                               {"avx512", has_avx512, false, &avx512::kOps},
                               {"avx2", has_avx2, false, &avx2::kOps},
                               {"baseline", true, false, &baseline::kOps}};
#elif defined(__aarch64__)
    static const Isa list[] = {{"neon", true, false, &neon::kOps}, {"baseline", true, false, &baseline::kOps}};
#else
    static const Isa list[] = {{"baseline", true, false, &baseline::kOps}};
#endif
    *count = static_cast<int>(sizeof(list) / sizeof(list[0]));
    return list;
}

}  // namespace deltaic
