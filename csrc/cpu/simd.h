// One logical vector of 16 floats for every instruction set. Each header of cpu/simd defines a native register `vec`
// (float) and `ivec` (the same bits as int32) of kWidth lanes and about twenty functions on it; f32x16 and i32x16 are
// built from them once. Kernels are written against f32x16 only, so that all instruction sets run the same loops in the
// same order.
#pragma once

#ifndef DELTAIC_ISA
#error "compile the files of csrc/cpu once per instruction set, with -DDELTAIC_ISA=<name>"
#endif

// Before a loop over register tiles: its arrays become registers only where the loop is gone.
#define DELTAIC_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#elif defined(__aarch64__) && !defined(DELTAIC_PORTABLE)
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/portable.h"
#endif

namespace deltaic {
namespace DELTAIC_ISA {

// acc + the two products of bfloat16 pairs in each lane, where there is such an instruction.
#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec a, ivec b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr bool kBf16Dot = false;
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec, ivec) { return acc; }
#endif

constexpr int kParts = 16 / kWidth;

struct f32x16 {
    vec part[kParts];
};

#define DELTAIC_PARTS(expression)                              \
    f32x16 r;                                                  \
    for (int i = 0; i < kParts; ++i) r.part[i] = (expression); \
    return r

DELTAIC_INLINE f32x16 set1(float a) { DELTAIC_PARTS(v_set1(a)); }
DELTAIC_INLINE f32x16 load(const float* p) { DELTAIC_PARTS(v_load(p + i * kWidth)); }
DELTAIC_INLINE f32x16 add(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_add(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 sub(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_sub(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 mul(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_mul(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 div(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_div(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 max(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_max(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 min(f32x16 a, f32x16 b) { DELTAIC_PARTS(v_min(a.part[i], b.part[i])); }
DELTAIC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { DELTAIC_PARTS(v_fma(a.part[i], b.part[i], c.part[i])); }
// Lane by lane: a < b ? yes : no.
DELTAIC_INLINE f32x16 if_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
    DELTAIC_PARTS(v_less(a.part[i], b.part[i], yes.part[i], no.part[i]));
}
DELTAIC_INLINE f32x16 load_bf16(const uint16_t* p) { DELTAIC_PARTS(v_load_bf16(p + i * kWidth)); }
// 16 lanes of two bfloat16 numbers each: the first (even columns) and the second (odd columns) of every lane as float.
DELTAIC_INLINE f32x16 load_pair_first(const void* p) {
    DELTAIC_PARTS(as_float(i_shl<16>(i_load(static_cast<const char*>(p) + i * kWidth * 4))));
}
DELTAIC_INLINE f32x16 load_pair_second(const void* p) {
    DELTAIC_PARTS(as_float(
        i_and(i_load(static_cast<const char*>(p) + i * kWidth * 4), i_set1(static_cast<int32_t>(0xffff0000u)))));
}
DELTAIC_INLINE f32x16 load_f16(const uint16_t* p) { DELTAIC_PARTS(v_load_f16(p + i * kWidth)); }
DELTAIC_INLINE f32x16 zero() { return set1(0.0f); }
DELTAIC_INLINE void store(float* p, f32x16 a) {
    for (int i = 0; i < kParts; ++i) v_store(p + i * kWidth, a.part[i]);
}
DELTAIC_INLINE void store_bf16(uint16_t* p, f32x16 a) {
    for (int i = 0; i < kParts; ++i) v_store_bf16(p + i * kWidth, a.part[i]);
}

// To the nearest integer, ties to even; |a| must be below 2^31.
DELTAIC_INLINE f32x16 round(f32x16 a) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_to_float(v_round(a.part[i]));
    return r;
}

// The first n lanes only; the others read as zero and are not written.
DELTAIC_INLINE f32x16 load_n(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    float lanes[16] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
DELTAIC_INLINE void store_n(float* p, f32x16 a, int64_t n) {
    if (n >= 16) return store(p, a);
    float lanes[16];
    store(lanes, a);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

DELTAIC_INLINE f32x16 load_bf16_n(const uint16_t* p, int64_t n) {
    if (n >= 16) return load_bf16(p);
    float lanes[16] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = bf16_to_float(p[i]);
    return load(lanes);
}
DELTAIC_INLINE void store_bf16_n(uint16_t* p, f32x16 a, int64_t n) {
    if (n >= 16) return store_bf16(p, a);
    float lanes[16];
    store(lanes, a);
    for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(lanes[i]);
}

// Transposes a 16 x 16 matrix, one row per f32x16.
DELTAIC_INLINE void transpose(f32x16 (&a)[16]) {
    vec tile[kParts][kParts][kWidth];
    for (int i = 0; i < kParts; ++i)
        for (int j = 0; j < kParts; ++j) {
            for (int r = 0; r < kWidth; ++r) tile[i][j][r] = a[i * kWidth + r].part[j];
            v_transpose(tile[i][j]);
        }
    for (int i = 0; i < kParts; ++i)
        for (int j = 0; j < kParts; ++j)
            for (int r = 0; r < kWidth; ++r) a[j * kWidth + r].part[i] = tile[i][j][r];
}

// Lane i of the result is the sum of all lanes of a[i]. Every lane adds in the same order.
DELTAIC_INLINE f32x16 reduce_add(const f32x16 (&a)[16]) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
        vec t[kWidth];
        for (int j = 0; j < kWidth; ++j) {
            t[j] = a[i * kWidth + j].part[0];
            for (int k = 1; k < kParts; ++k) t[j] = v_add(t[j], a[i * kWidth + j].part[k]);
        }
        v_transpose(t);
        for (int step = kWidth / 2; step > 0; step /= 2)
            for (int j = 0; j < step; ++j) t[j] = v_add(t[j], t[j + step]);
        r.part[i] = t[0];
    }
    return r;
}

// Sum and maximum of all lanes, in one fixed order for every instruction set: halves are added (compared) lane by lane.
#if defined(__AVX2__)
template <class F>
DELTAIC_INLINE float fold(f32x16 a, const F& f) {
#if defined(__AVX512F__)
    const __m256 h = f(_mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#else
    const __m256 h = f(a.part[0], a.part[1]);
#endif
    const __m256 four = f(h, _mm256_permute2f128_ps(h, h, 1)), two = f(four, _mm256_permute_ps(four, 0x4e));
    return _mm256_cvtss_f32(f(two, _mm256_permute_ps(two, 0xb1)));
}
DELTAIC_INLINE float reduce_add(f32x16 a) {
    return fold(a, [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_add_ps(x, y); });
}
DELTAIC_INLINE float reduce_max(f32x16 a) {
    return fold(a, [](__m256 x, __m256 y) __attribute__((always_inline)) { return _mm256_max_ps(x, y); });
}
#else
DELTAIC_INLINE float reduce_add(f32x16 a) {
    float t[16];
    store(t, a);
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) t[i] += t[i + step];
    return t[0];
}
DELTAIC_INLINE float reduce_max(f32x16 a) {
    float t[16];
    store(t, a);
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
    return t[0];
}
#endif

// e^x: x = n ln2 + r, |r| <= ln2/2, Taylor to r^7 (relative error below 2e-7). Clamped to the range of normal floats.
DELTAIC_INLINE f32x16 exp(f32x16 x) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
        const vec a = v_max(v_set1(-87.0f), v_min(v_set1(88.0f), x.part[i]));  // this operand order keeps a NaN
        const ivec n = v_round(v_mul(a, v_set1(1.44269504088896341f)));
        const vec nf = i_to_float(n);
        const vec t = v_fma(nf, v_set1(2.12194440e-4f), v_fma(nf, v_set1(-0.693359375f), a));
        vec p = v_set1(1.0f / 5040);
        p = v_fma(p, t, v_set1(1.0f / 720));
        p = v_fma(p, t, v_set1(1.0f / 120));
        p = v_fma(p, t, v_set1(1.0f / 24));
        p = v_fma(p, t, v_set1(1.0f / 6));
        p = v_fma(p, t, v_set1(0.5f));
        p = v_fma(p, t, v_set1(1.0f));
        p = v_fma(p, t, v_set1(1.0f));
        r.part[i] = as_float(i_add(as_int(p), i_shl<23>(n)));
    }
    return r;
}
DELTAIC_INLINE f32x16 sigmoid(f32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }
DELTAIC_INLINE f32x16 silu(f32x16 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

#undef DELTAIC_PARTS

// 16 lanes of int32.
struct i32x16 {
    ivec part[kParts];
};
DELTAIC_INLINE i32x16 set1(int32_t a) {
    i32x16 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_set1(a);
    return r;
}
DELTAIC_INLINE i32x16 load_u8(const uint8_t* p) {
    i32x16 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_load_u8(p + i * kWidth);
    return r;
}
// Rounds to int8 (values must fit), stores 16 bytes and returns their sum.
DELTAIC_INLINE int32_t store_int8(int8_t* p, f32x16 a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(v_round(a.part[0]));
#else
    const __m256i words = _mm256_packs_epi32(v_round(a.part[0]), v_round(a.part[1]));  // 0-3 8-11 4-7 12-15
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
#endif
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    // sums of eight unsigned bytes, after all were raised by 128
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
#else
    int32_t lanes[16], sum = 0;
    for (int i = 0; i < kParts; ++i) {
        const ivec rounded = v_round(a.part[i]);
        memcpy(lanes + i * kWidth, &rounded, sizeof rounded);
    }
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<int8_t>(lanes[i]);
        sum += lanes[i];
    }
    return sum;
#endif
}
DELTAIC_INLINE f32x16 to_float(i32x16 a) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_to_float(a.part[i]);
    return r;
}

// Lane i of the result is the largest lane of a[i].
DELTAIC_INLINE f32x16 reduce_max(const f32x16 (&a)[16]) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
        vec t[kWidth];
        for (int j = 0; j < kWidth; ++j) {
            t[j] = a[i * kWidth + j].part[0];
            for (int k = 1; k < kParts; ++k) t[j] = v_max(t[j], a[i * kWidth + j].part[k]);
        }
        v_transpose(t);
        for (int step = kWidth / 2; step > 0; step /= 2)
            for (int j = 0; j < step; ++j) t[j] = v_max(t[j], t[j + step]);
        r.part[i] = t[0];
    }
    return r;
}

// 2^x: x = n + r, |r| <= 1/2, Taylor to r^6 (relative error below 2e-7). x is at most 126; below -126 the result is
// 2^-126 or zero.
DELTAIC_INLINE f32x16 exp2(f32x16 x) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
        const vec n = _mm512_roundscale_ps(x.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const vec t = v_sub(x.part[i], n);
#else
        const vec a = v_max(v_set1(-126.0f), x.part[i]);  // this operand order keeps a NaN
        const ivec n = v_round(a);
        const vec t = v_sub(a, i_to_float(n));
#endif
        vec p = v_set1(1.5403530e-4f);
        p = v_fma(p, t, v_set1(1.3333558e-3f));
        p = v_fma(p, t, v_set1(9.6181291e-3f));
        p = v_fma(p, t, v_set1(5.5504109e-2f));
        p = v_fma(p, t, v_set1(2.4022651e-1f));
        p = v_fma(p, t, v_set1(6.9314718e-1f));
        p = v_fma(p, t, v_set1(1.0f));
#if defined(__AVX512F__)
        r.part[i] = _mm512_scalef_ps(p, n);
#else
        r.part[i] = as_float(i_add(as_int(p), i_shl<23>(n)));
#endif
    }
    return r;
}

// Products of bfloat16 pairs, where the instruction set has them: a register of 32 numbers, two neighbours a lane.
#if defined(__AVX512BF16__)
struct bf16x32 {
    __m512i bits;
};
DELTAIC_INLINE bf16x32 load_pairs(const void* p) { return {_mm512_loadu_si512(p)}; }
// The first n numbers only (n may be above 32); the others read as zero.
DELTAIC_INLINE bf16x32 load_pairs_n(const uint16_t* p, int64_t n) {
    return {n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p)};
}
DELTAIC_INLINE void store_pairs(void* p, bf16x32 a) { _mm512_storeu_si512(p, a.bits); }
DELTAIC_INLINE bf16x32 set_pair(const uint16_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return {_mm512_set1_epi32(pair)};
}
DELTAIC_INLINE bf16x32 to_pairs(f32x16 low, f32x16 high) {  // numbers 0..15 and 16..31
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.part[0], low.part[0]))};
}
DELTAIC_INLINE bf16x32 no_pairs() { return {_mm512_setzero_si512()}; }
DELTAIC_INLINE void store_half(uint16_t* p, f32x16 a) {  // 16 numbers; subnormal ones become zero
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.part[0])));
}
// acc + the two products of each lane. Both are exact in float; subnormal numbers count as zero.
DELTAIC_INLINE f32x16 dot_pairs(bf16x32 a, bf16x32 b, f32x16 acc) {
    return {{_mm512_dpbf16_ps(acc.part[0], reinterpret_cast<__m512bh>(a.bits), reinterpret_cast<__m512bh>(b.bits))}};
}
// Numbers 0..15 and 16..31 of two registers, a number of `a` beside the number of `b`.
DELTAIC_INLINE void interleave(bf16x32 a, bf16x32 b, bf16x32& low, bf16x32& high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    low.bits = _mm512_permutex2var_epi16(a.bits, first, b.bits);
    high.bits = _mm512_permutex2var_epi16(a.bits, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b.bits);
}
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
