// Which number do k of many reach?
#pragma once

#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

// A value that at least k of the n numbers reach, and at most `most` >= k unless they are equal; -inf if n < k.
inline float threshold(const float* x, int64_t n, int64_t k, int64_t most) {
    constexpr float kInfinity = __builtin_inff();
    if (k > n) return -kInfinity;
    // Bisects over the bit patterns, which are ordered like the numbers once negative ones are turned round.
    const auto number = [](uint32_t key) { return bits_to_float(key >> 31 ? key ^ 0x80000000u : ~key); };
    uint32_t low = ~float_to_bits(-kInfinity),
             high = float_to_bits(kInfinity) | 0x80000000u;  // low is reached by k, high not
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const float value = number(middle);
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += x[i] >= value;
        if (count < k) {
            high = middle;
        } else {
            low = middle;
            if (count <= most) break;
        }
    }
    return number(low);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
