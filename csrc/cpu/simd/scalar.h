// Numbers one at a time: sizes, and the 16-bit floating point formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/view.h"

namespace deltaic {
namespace DELTAIC_ISA {

DELTAIC_INLINE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DELTAIC_INLINE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DELTAIC_INLINE int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

DELTAIC_INLINE int32_t load_i32(const void* p) {
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

DELTAIC_INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DELTAIC_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DELTAIC_INLINE float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
// Round to nearest even; a NaN stays a (quiet) NaN.
DELTAIC_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// IEEE half precision, both ways; the packed formats keep their scales in it. Round to nearest even, overflow to
// infinity.
DELTAIC_INLINE float f16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0)
        return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 5.9604644775390625e-8f));  // * 2^-24
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DELTAIC_INLINE uint16_t float_to_f16(float value) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves value * 2^24, rounded, in the low bits
        return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
