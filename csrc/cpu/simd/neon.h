// Native registers of NEON: 4 lanes, 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 4;
constexpr int kParts = 16 / kWidth;
constexpr int kTileTokens = 2;
constexpr int kInt8KvBits = 24;  // int8 keys and values meet floats
using vec = float32x4_t;
using ivec = int32x4_t;
DELTAIC_INLINE vec v_set1(float a) { return vdupq_n_f32(a); }
DELTAIC_INLINE vec v_load(const float* p) { return vld1q_f32(p); }
DELTAIC_INLINE void v_store(float* p, vec a) { vst1q_f32(p, a); }
DELTAIC_INLINE vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
DELTAIC_INLINE vec v_sub(vec a, vec b) { return vsubq_f32(a, b); }
DELTAIC_INLINE vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
DELTAIC_INLINE vec v_div(vec a, vec b) { return vdivq_f32(a, b); }
DELTAIC_INLINE vec v_max(vec a, vec b) { return vmaxq_f32(a, b); }
DELTAIC_INLINE vec v_min(vec a, vec b) { return vminq_f32(a, b); }
DELTAIC_INLINE vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
DELTAIC_INLINE vec v_less(vec a, vec b, vec yes, vec no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
DELTAIC_INLINE uint32_t v_less_bits(vec a, vec b) {
    const uint32_t bits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcltq_f32(a, b), vld1q_u32(bits)));
}
DELTAIC_INLINE ivec i_set1(int32_t a) { return vdupq_n_s32(a); }
DELTAIC_INLINE ivec i_load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
DELTAIC_INLINE ivec i_add(ivec a, ivec b) { return vaddq_s32(a, b); }
DELTAIC_INLINE ivec i_and(ivec a, ivec b) { return vandq_s32(a, b); }
template <int n>
DELTAIC_INLINE ivec i_shl(ivec a) {
    return vshlq_n_s32(a, n);
}
template <int n>
DELTAIC_INLINE ivec i_shr(ivec a) {  // logical
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n));
}
DELTAIC_INLINE vec as_float(ivec a) { return vreinterpretq_f32_s32(a); }
DELTAIC_INLINE ivec as_int(vec a) { return vreinterpretq_s32_f32(a); }
DELTAIC_INLINE ivec v_round(vec a) { return vcvtnq_s32_f32(a); }
DELTAIC_INLINE vec i_to_float(ivec a) { return vcvtq_f32_s32(a); }
DELTAIC_INLINE vec v_load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
DELTAIC_INLINE void v_store_bf16(uint16_t* p, vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    rounded = vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
    vst1_u16(p, vshrn_n_u32(rounded, 16));
}
DELTAIC_INLINE vec v_load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
DELTAIC_INLINE ivec i_load_u8(const uint8_t* p) {
    uint32_t bytes;
    memcpy(&bytes, p, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
}
DELTAIC_INLINE void v_transpose(vec (&a)[kWidth]) {
    const vec t0 = vtrn1q_f32(a[0], a[1]), t1 = vtrn2q_f32(a[0], a[1]);
    const vec t2 = vtrn1q_f32(a[2], a[3]), t3 = vtrn2q_f32(a[2], a[3]);
    a[0] = vcombine_f32(vget_low_f32(t0), vget_low_f32(t2));
    a[1] = vcombine_f32(vget_low_f32(t1), vget_low_f32(t3));
    a[2] = vcombine_f32(vget_high_f32(t0), vget_high_f32(t2));
    a[3] = vcombine_f32(vget_high_f32(t1), vget_high_f32(t3));
}
// Lane i of a[0] becomes all lanes of a[i] folded by f, halves first.
template <class F>
DELTAIC_INLINE void v_fold(vec (&a)[kWidth], const F& f) {
    v_transpose(a);
    a[0] = f(f(a[0], a[2]), f(a[1], a[3]));
}
DELTAIC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
DELTAIC_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // second level
DELTAIC_INLINE void call_line(const void* p) { prefetch_far(p); }  // a line that is read soon, of many in a row
// Sum and maximum of all lanes: halves are added (compared) lane by lane.
DELTAIC_INLINE float v_reduce_add(const vec (&a)[kParts]) {
    const vec four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(vpadd_f32(two, two), 0);
}
DELTAIC_INLINE float v_reduce_max(const vec (&a)[kParts]) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[2]), vmaxq_f32(a[1], a[3])));
}
// Rounds 16 numbers to int8 (they must fit), stores them and returns their sum.
DELTAIC_INLINE int32_t v_store_int8(int8_t* p, const vec (&a)[kParts]) {
    const int16x8_t low = vcombine_s16(vmovn_s32(v_round(a[0])), vmovn_s32(v_round(a[1])));
    const int16x8_t high = vcombine_s16(vmovn_s32(v_round(a[2])), vmovn_s32(v_round(a[3])));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    return vaddvq_s16(vaddq_s16(low, high));
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DELTAIC_BF16_PAIRS  // products of bfloat16 pairs, two neighbours a lane
constexpr bool kBf16Dot = true;
// acc + the sum of the two products of each lane, each of the three rounded to odd; subnormal numbers count as zero.
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec a, ivec b) {
    return vbfdotq_f32(acc, vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b));
}
DELTAIC_INLINE ivec v_to_pairs(vec low, vec high) {
    return vreinterpretq_s32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
DELTAIC_INLINE void v_store_half(uint16_t* p, vec a) { vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32(a))); }
// The first n of 8 numbers; the others read as zero.
DELTAIC_INLINE ivec i_load_n(const uint16_t* p, int64_t n) {
    if (n >= 8) return i_load(p);
    uint16_t some[8] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return i_load(some);
}
// Numbers of `a`, each beside the number of `b`: the first half, the second half.
DELTAIC_INLINE void i_interleave(ivec a, ivec b, ivec* low, ivec* high) {
    const uint16x8_t x = vreinterpretq_u16_s32(a), y = vreinterpretq_u16_s32(b);
    *low = vreinterpretq_s32_u16(vzip1q_u16(x, y));
    *high = vreinterpretq_s32_u16(vzip2q_u16(x, y));
}
// The same in the order that costs least: kZipRun numbers of `a` by turns to low and to high.
constexpr int64_t kZipRun = 16;
DELTAIC_INLINE void i_zip(ivec a, ivec b, ivec* low, ivec* high) { i_interleave(a, b, low, high); }
#else
constexpr bool kBf16Dot = false;
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec, ivec) { return acc; }
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
