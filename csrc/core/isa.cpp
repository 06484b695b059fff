#include "core/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstdio>
#endif

namespace deltaic {

// Each is defined by cpu/table.cpp, compiled with that instruction set's flags.
namespace baseline {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace avx2
namespace avxvnni {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace avxvnni
namespace avx512 {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace avx512
namespace avx512bf16 {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace avx512bf16
#elif defined(__aarch64__)
namespace neon {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace neon
namespace neon_dot {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace neon_dot
namespace neon_i8mm {
extern const Ops kOps;
extern const Numerics kNumerics;
}  // namespace neon_i8mm
#endif

#if defined(__x86_64__)
namespace {

// Compilers of different ages know the feature by different names, or not at all.
bool cpu_has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

}  // namespace
#elif defined(__aarch64__) && defined(__APPLE__)
namespace {

bool has_feature(const char* name) {
    char path[64];
    snprintf(path, sizeof path, "hw.optional.arm.%s", name);
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(path, &value, &size, nullptr, 0) == 0 && value == 1;
}

}  // namespace
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
#if defined(DELTAIC_EVEX_VNNI)
    const bool has_avx_vnni = has_avx512;
#else
    const bool has_avx_vnni = has_avx2 && cpu_has_avx_vnni();
#endif
    static const Isa list[] = {{"avx512bf16", has_bf16, &avx512bf16::kNumerics, &avx512bf16::kOps},
                               {"avx512", has_avx512, &avx512::kNumerics, &avx512::kOps},
                               {"avxvnni", has_avx_vnni, &avxvnni::kNumerics, &avxvnni::kOps},
                               {"avx2", has_avx2, &avx2::kNumerics, &avx2::kOps},
                               {"baseline", true, &baseline::kNumerics, &baseline::kOps}};
#elif defined(__aarch64__)
#if defined(__linux__)
    const bool has_dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    const unsigned long matrices = 1ul << 13 | 1ul << 14;  // HWCAP2_I8MM, HWCAP2_BF16: older headers lack the names
    const bool has_i8mm = has_dot && (getauxval(AT_HWCAP2) & matrices) == matrices;
#elif defined(__APPLE__)
    const bool has_dot = has_feature("FEAT_DotProd");
    const bool has_i8mm = has_dot && has_feature("FEAT_I8MM") && has_feature("FEAT_BF16");
#else
    const bool has_dot = false, has_i8mm = false;
#endif
    static const Isa list[] = {{"neon_i8mm", has_i8mm, &neon_i8mm::kNumerics, &neon_i8mm::kOps},
                               {"neon_dot", has_dot, &neon_dot::kNumerics, &neon_dot::kOps},
                               {"neon", true, &neon::kNumerics, &neon::kOps},
                               {"baseline", true, &baseline::kNumerics, &baseline::kOps}};
#else
    static const Isa list[] = {{"baseline", true, &baseline::kNumerics, &baseline::kOps}};
#endif
    *count = static_cast<int>(sizeof(list) / sizeof(list[0]));
    return list;
}

}  // namespace deltaic
