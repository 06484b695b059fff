// Native registers of AVX2, with or without AVX-VNNI: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 8;
constexpr int kParts = 16 / kWidth;
constexpr int kTileTokens = 2;
constexpr int kInt8KvBits = 24;  // int8 keys and values meet floats
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
DELTAIC_INLINE uint32_t v_less_bits(vec a, vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
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
// Lane i of a[0] becomes all lanes of a[i] folded by f, halves first: two halves of two registers at a time.
template <class F>
DELTAIC_INLINE void v_fold(vec (&a)[kWidth], const F& f) {
    for (int i = 0; i < 4; ++i)  // a[i] | a[i + 4], four lanes each
        a[i] = f(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    for (int i = 0; i < 4; i += 2) {
        const __m256d x = _mm256_castps_pd(a[i]), y = _mm256_castps_pd(a[i + 1]);
        a[i] = f(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    a[0] = f(_mm256_shuffle_ps(a[0], a[2], 0x88), _mm256_shuffle_ps(a[0], a[2], 0xdd));
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
    return fold(_mm256_add_ps(a[0], a[1]),
                [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_add_ps(x, y); });
}
DELTAIC_INLINE float v_reduce_max(const vec (&a)[kParts]) {
    return fold(_mm256_max_ps(a[0], a[1]),
                [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_max_ps(x, y); });
}
// Rounds 16 numbers to int8 (they must fit), stores them and returns their sum.
DELTAIC_INLINE int32_t v_store_int8(int8_t* p, const vec (&a)[kParts]) {
    const __m256i words = _mm256_packs_epi32(v_round(a[0]), v_round(a[1]));  // 0-3 8-11 4-7 12-15
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    // sums of eight unsigned bytes, after all were raised by 128
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

constexpr bool kBf16Dot = false;  // no products of bfloat16 pairs
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec, ivec) { return acc; }

#if defined(__AVXVNNI__)
// acc + four products of unsigned and signed bytes, or two of 16-bit numbers, in each lane. A processor of AVX-512
// has the same instructions in another encoding, which its tests run.
#if defined(DELTAIC_EVEX_VNNI)
DELTAIC_INLINE ivec dot_bytes(ivec acc, ivec w, ivec x) {
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
    return acc;
}
DELTAIC_INLINE ivec dot_words(ivec acc, ivec a, ivec b) {
    asm("%{evex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
}
#else
DELTAIC_INLINE ivec dot_bytes(ivec acc, ivec w, ivec x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
DELTAIC_INLINE ivec dot_words(ivec acc, ivec a, ivec b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
#endif
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
