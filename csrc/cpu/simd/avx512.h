// Native registers of AVX-512: 16 lanes, 32 registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 16;
constexpr int kParts = 16 / kWidth;
// Register tile of matrix products: blocks of 16 rows x tokens; accumulators + operands fill 32 registers.
constexpr int kTileTokens = 12;
#define DELTAIC_BYTE_PAIRS       // sums of four products of bytes
constexpr int kInt8KvBits = 16;  // int8 keys and values meet numbers of two bytes
using vec = __m512;
using ivec = __m512i;
DELTAIC_INLINE vec v_set1(float a) { return _mm512_set1_ps(a); }
DELTAIC_INLINE vec v_load(const float* p) { return _mm512_loadu_ps(p); }
DELTAIC_INLINE void v_store(float* p, vec a) { _mm512_storeu_ps(p, a); }
DELTAIC_INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
DELTAIC_INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
DELTAIC_INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
DELTAIC_INLINE vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
DELTAIC_INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
DELTAIC_INLINE vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
DELTAIC_INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
DELTAIC_INLINE vec v_less(vec a, vec b, vec yes, vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
DELTAIC_INLINE uint32_t v_less_bits(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
DELTAIC_INLINE ivec i_set1(int32_t a) { return _mm512_set1_epi32(a); }
DELTAIC_INLINE ivec i_load(const void* p) { return _mm512_loadu_si512(p); }
DELTAIC_INLINE ivec i_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
DELTAIC_INLINE ivec i_and(ivec a, ivec b) { return _mm512_and_si512(a, b); }
template <int n>
DELTAIC_INLINE ivec i_shl(ivec a) {
    return _mm512_slli_epi32(a, n);
}
template <int n>
DELTAIC_INLINE ivec i_shr(ivec a) {  // logical
    return _mm512_srli_epi32(a, n);
}
DELTAIC_INLINE vec as_float(ivec a) { return _mm512_castsi512_ps(a); }
DELTAIC_INLINE ivec as_int(vec a) { return _mm512_castps_si512(a); }
DELTAIC_INLINE ivec v_round(vec a) { return _mm512_cvtps_epi32(a); }  // nearest even
DELTAIC_INLINE vec i_to_float(ivec a) { return _mm512_cvtepi32_ps(a); }
DELTAIC_INLINE vec v_load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
DELTAIC_INLINE void v_store_bf16(uint16_t* p, vec a) {
    const __m512i bits = as_int(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
DELTAIC_INLINE vec v_load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DELTAIC_INLINE ivec i_load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Transposes a kWidth x kWidth matrix held in kWidth registers.
DELTAIC_INLINE void v_transpose(vec (&a)[kWidth]) {
    vec t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // 128-bit lane L of u[i + j]: column 4L + j of rows i..i+3
        for (int j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(t[i + j]), y = _mm512_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const vec even0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
                  even1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        const vec odd0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd),
                  odd1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        a[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
        a[8 + j] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
        a[4 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        a[12 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
}
// Lane i of a[0] becomes all lanes of a[i] folded by f, halves first: two halves of two registers at a time.
template <class F>
DELTAIC_INLINE void v_fold(vec (&a)[kWidth], const F& f) {
    for (int i = 0; i < 4; ++i)  // a[i] | a[i + 4] | a[i + 8] | a[i + 12], four lanes each
    {
        vec pair[2];
        for (int j = 0; j < 2; ++j) {
            const vec x = a[i + 8 * j], y = a[i + 8 * j + 4];
            pair[j] = f(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        }
        a[i] = f(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88), _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
    }
    for (int i = 0; i < 4; i += 2) {
        const __m512d x = _mm512_castps_pd(a[i]), y = _mm512_castps_pd(a[i + 1]);
        a[i] = f(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    a[0] = f(_mm512_shuffle_ps(a[0], a[2], 0x88), _mm512_shuffle_ps(a[0], a[2], 0xdd));
}
DELTAIC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
DELTAIC_INLINE void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}  // second level
// A line that is read soon, of many in a row: a load that nobody waits for. Prefetches hold one of the few places for
// lines that the first level misses; loads in order also set off what fetches lines into the second level by itself.
DELTAIC_INLINE void call_line(const void* p) {
    const vec line = v_load(static_cast<const float*>(p));
    asm volatile("" : : "v"(line));
}
// Sum and maximum of all lanes: halves are added (compared) lane by lane.
template <class F>
DELTAIC_INLINE float fold(__m256 h, const F& f) {
    const __m256 four = f(h, _mm256_permute2f128_ps(h, h, 1)), two = f(four, _mm256_permute_ps(four, 0x4e));
    return _mm256_cvtss_f32(f(two, _mm256_permute_ps(two, 0xb1)));
}
DELTAIC_INLINE float v_reduce_add(const vec (&a)[kParts]) {
    return fold(_mm256_add_ps(_mm512_castps512_ps256(a[0]), _mm512_extractf32x8_ps(a[0], 1)),
                [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_add_ps(x, y); });
}
DELTAIC_INLINE float v_reduce_max(const vec (&a)[kParts]) {
    return fold(_mm256_max_ps(_mm512_castps512_ps256(a[0]), _mm512_extractf32x8_ps(a[0], 1)),
                [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_max_ps(x, y); });
}
#if defined(__AVX512BF16__)
#define DELTAIC_BF16_PAIRS  // products of bfloat16 pairs, two neighbours a lane
constexpr bool kBf16Dot = true;
// acc + the two products of each lane. Both are exact in float; subnormal numbers count as zero.
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec a, ivec b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
DELTAIC_INLINE ivec v_to_pairs(vec low, vec high) { return reinterpret_cast<ivec>(_mm512_cvtne2ps_pbh(high, low)); }
DELTAIC_INLINE void v_store_half(uint16_t* p, vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
}
// The first n of 32 numbers; the others read as zero.
DELTAIC_INLINE ivec i_load_n(const uint16_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p);
}
// Numbers of `a`, each beside the number of `b`: the first half, the second half.
DELTAIC_INLINE void i_interleave(ivec a, ivec b, ivec* low, ivec* high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(a, first, b);
    *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}
// The same in the order that costs least: kZipRun numbers of `a` by turns to low and to high.
constexpr int64_t kZipRun = 4;
DELTAIC_INLINE void i_zip(ivec a, ivec b, ivec* low, ivec* high) {
    *low = _mm512_unpacklo_epi16(a, b);
    *high = _mm512_unpackhi_epi16(a, b);
}
#else
constexpr bool kBf16Dot = false;
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec, ivec) { return acc; }
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
