// Native registers of AVX2: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 8;
constexpr int kTileTokens = 2;
using vec = __m256;
using ivec = __m256i;
DELTAIC_INLINE vec v_set1(float a) { return _mm256_set1_ps(a); }
DELTAIC_INLINE vec v_load(const float* p) { return _mm256_loadu_ps(p); }
DELTAIC_INLINE void v_store(float* p, vec a) { _mm256_storeu_ps(p, a); }
DELTAIC_INLINE vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
DELTAIC_INLINE vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
DELTAIC_INLINE vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
DELTAIC_INLINE vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
DELTAIC_INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
DELTAIC_INLINE vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
DELTAIC_INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
DELTAIC_INLINE vec v_less(vec a, vec b, vec yes, vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
DELTAIC_INLINE ivec i_set1(int32_t a) { return _mm256_set1_epi32(a); }
DELTAIC_INLINE ivec i_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DELTAIC_INLINE ivec i_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
DELTAIC_INLINE ivec i_and(ivec a, ivec b) { return _mm256_and_si256(a, b); }
template <int n>
DELTAIC_INLINE ivec i_shl(ivec a) {
    return _mm256_slli_epi32(a, n);
}
template <int n>
DELTAIC_INLINE ivec i_shr(ivec a) {  // logical
    return _mm256_srli_epi32(a, n);
}
DELTAIC_INLINE vec as_float(ivec a) { return _mm256_castsi256_ps(a); }
DELTAIC_INLINE ivec as_int(vec a) { return _mm256_castps_si256(a); }
DELTAIC_INLINE ivec v_round(vec a) { return _mm256_cvtps_epi32(a); }
DELTAIC_INLINE vec i_to_float(ivec a) { return _mm256_cvtepi32_ps(a); }
DELTAIC_INLINE vec v_load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
DELTAIC_INLINE void v_store_bf16(uint16_t* p, vec a) {
    const __m256i bits = as_int(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = as_int(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
DELTAIC_INLINE vec v_load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DELTAIC_INLINE ivec i_load_u8(const uint8_t* p) {
    int64_t bytes;
    memcpy(&bytes, p, 8);
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
}
DELTAIC_INLINE void v_transpose(vec (&a)[kWidth]) {
    vec t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m256d x = _mm256_castps_pd(t[i + j]), y = _mm256_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
            u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
        }
    }
    for (int j = 0; j < 4; ++j) {
        a[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
        a[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
}
DELTAIC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
DELTAIC_INLINE void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // second level

}  // namespace DELTAIC_ISA
}  // namespace deltaic
