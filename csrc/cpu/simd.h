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
// Before a short loop that must stay one.
#define DELTAIC_LOOP _Pragma("GCC unroll 1")

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#elif defined(__aarch64__) && !defined(DELTAIC_PORTABLE)
#define DELTAIC_NEON
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/portable.h"
#endif

namespace deltaic {
namespace DELTAIC_ISA {

struct f32x16 {
    vec part[kParts];
};

// Keeps what was loaded in its register. For a few rows GCC takes it from memory again for every multiplication, which
// is an instruction less; but a processor that multiplies one vector of 64 bytes per cycle also loads no more than one.
template <class Vector>
DELTAIC_INLINE void keep(Vector& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// The same for several in a row, which are loaded in the order of these calls.
template <class Vector>
DELTAIC_INLINE void keep_in_order(Vector& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v));
#else
    (void)v;
#endif
}

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

DELTAIC_INLINE void store_rounded(int32_t* p, f32x16 a) {
    for (int i = 0; i < kParts; ++i) v_store(reinterpret_cast<float*>(p) + i * kWidth, as_float(v_round(a.part[i])));
}
// Bit i is set where a[i] < b[i].
DELTAIC_INLINE uint32_t less_bits(f32x16 a, f32x16 b) {
    uint32_t bits = 0;
    for (int i = 0; i < kParts; ++i) bits |= v_less_bits(a.part[i], b.part[i]) << (i * kWidth);
    return bits;
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

// Calls a line that will be written into the first-level cache, as this processor's own.
DELTAIC_INLINE void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }

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

// Lane i of the result is all lanes of a[i] folded by f (of two registers), in one fixed order for every instruction
// set: halves first.
template <class F>
DELTAIC_INLINE f32x16 fold_each(const f32x16 (&a)[16], const F& f) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
        vec t[kWidth];
        for (int j = 0; j < kWidth; ++j) {
            t[j] = a[i * kWidth + j].part[0];
            for (int k = 1; k < kParts; ++k) t[j] = f(t[j], a[i * kWidth + j].part[k]);
        }
        v_fold(t, f);
        r.part[i] = t[0];
    }
    return r;
}
// Lane i of the result is the sum, or the largest, of all lanes of a[i].
DELTAIC_INLINE f32x16 reduce_add(const f32x16 (&a)[16]) {
    return fold_each(a, [](vec x, vec y) __attribute__((always_inline)) { return v_add(x, y); });
}
DELTAIC_INLINE f32x16 reduce_max(const f32x16 (&a)[16]) {
    return fold_each(a, [](vec x, vec y) __attribute__((always_inline)) { return v_max(x, y); });
}

// Sum and maximum of all lanes, in one fixed order for every instruction set: halves are added (compared) lane by lane.
DELTAIC_INLINE float reduce_add(f32x16 a) { return v_reduce_add(a.part); }
DELTAIC_INLINE float reduce_max(f32x16 a) { return v_reduce_max(a.part); }

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
DELTAIC_INLINE f32x16 to_float(i32x16 a) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_to_float(a.part[i]);
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

// 32 bfloat16 numbers, two neighbours a lane: operands of products of pairs, where the instruction set has them.
struct bf16x32 {
    ivec part[kParts];
};
DELTAIC_INLINE bf16x32 load_pairs(const void* p) {
    bf16x32 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_load(static_cast<const char*>(p) + i * kWidth * 4);
    return r;
}
DELTAIC_INLINE void store_pairs(void* p, bf16x32 a) {
    for (int i = 0; i < kParts; ++i) v_store(static_cast<float*>(p) + i * kWidth, as_float(a.part[i]));
}
DELTAIC_INLINE bf16x32 set_pair(const uint16_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    bf16x32 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_set1(pair);
    return r;
}
DELTAIC_INLINE bf16x32 no_pairs() {
    bf16x32 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_set1(0);
    return r;
}
#if defined(DELTAIC_BF16_PAIRS)
// The first n numbers only (n may be above 32); the others read as zero.
DELTAIC_INLINE bf16x32 load_pairs_n(const uint16_t* p, int64_t n) {
    if (n >= 32) return load_pairs(p);
    bf16x32 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = i_load_n(p + i * kWidth * 2, n - i * kWidth * 2);
    return r;
}
DELTAIC_INLINE bf16x32 to_pairs(f32x16 low, f32x16 high) {  // numbers 0..15 and 16..31
    vec all[2 * kParts];
    for (int i = 0; i < kParts; ++i) all[i] = low.part[i], all[kParts + i] = high.part[i];
    bf16x32 r;
    for (int i = 0; i < kParts; ++i) r.part[i] = v_to_pairs(all[2 * i], all[2 * i + 1]);
    return r;
}
DELTAIC_INLINE void store_half(uint16_t* p, f32x16 a) {  // 16 numbers; subnormal ones may become zero
    for (int i = 0; i < kParts; ++i) v_store_half(p + i * kWidth, a.part[i]);
}
// acc + the two products of each lane. Subnormal numbers count as zero.
DELTAIC_INLINE f32x16 dot_pairs(bf16x32 a, bf16x32 b, f32x16 acc) {
    for (int i = 0; i < kParts; ++i) acc.part[i] = v_dot_bf16(acc.part[i], a.part[i], b.part[i]);
    return acc;
}
// Numbers 0..15 and 16..31 of two registers, a number of `a` beside the number of `b`.
DELTAIC_INLINE void interleave(bf16x32 a, bf16x32 b, bf16x32& low, bf16x32& high) {
    ivec all[2 * kParts];
    for (int i = 0; i < kParts; ++i) i_interleave(a.part[i], b.part[i], &all[2 * i], &all[2 * i + 1]);
    for (int i = 0; i < kParts; ++i) low.part[i] = all[i], high.part[i] = all[kParts + i];
}
// The same in the order that costs least: number i goes to lane zip_place(i), counted through low and high.
DELTAIC_INLINE void zip(bf16x32 a, bf16x32 b, bf16x32& low, bf16x32& high) {
    ivec all[2 * kParts];
    for (int i = 0; i < kParts; ++i) i_zip(a.part[i], b.part[i], &all[2 * i], &all[2 * i + 1]);
    for (int i = 0; i < kParts; ++i) low.part[i] = all[i], high.part[i] = all[kParts + i];
}
DELTAIC_INLINE int64_t zip_place(int64_t i) { return i / kZipRun % 2 * 16 + i / (2 * kZipRun) * kZipRun + i % kZipRun; }
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
