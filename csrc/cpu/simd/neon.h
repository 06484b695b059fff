// Native registers of NEON: 4 lanes, 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 4;
constexpr int kTileTokens = 2;
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
DELTAIC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
DELTAIC_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // second level

}  // namespace DELTAIC_ISA
}  // namespace deltaic
