// Compiler vectors of four lanes, which every target has or imitates.
#pragma once

#include "cpu/simd/scalar.h"

namespace deltaic {
namespace DELTAIC_ISA {

constexpr int kWidth = 4;
constexpr int kParts = 16 / kWidth;
constexpr int kTileTokens = 1;
constexpr int kInt8KvBits = 24;  // int8 keys and values meet floats
typedef float vec __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(16)));
DELTAIC_INLINE vec v_set1(float a) { return vec{a, a, a, a}; }
DELTAIC_INLINE vec v_load(const float* p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
DELTAIC_INLINE void v_store(float* p, vec a) { memcpy(p, &a, sizeof a); }
DELTAIC_INLINE vec v_add(vec a, vec b) { return a + b; }
DELTAIC_INLINE vec v_sub(vec a, vec b) { return a - b; }
DELTAIC_INLINE vec v_mul(vec a, vec b) { return a * b; }
DELTAIC_INLINE vec v_div(vec a, vec b) { return a / b; }
DELTAIC_INLINE vec v_max(vec a, vec b) { return a > b ? a : b; }
DELTAIC_INLINE vec v_min(vec a, vec b) { return a < b ? a : b; }
DELTAIC_INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }
DELTAIC_INLINE vec v_less(vec a, vec b, vec yes, vec no) { return a < b ? yes : no; }
DELTAIC_INLINE uint32_t v_less_bits(vec a, vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a[i] < b[i]) << i;
    return bits;
}
DELTAIC_INLINE ivec i_set1(int32_t a) { return ivec{a, a, a, a}; }
DELTAIC_INLINE ivec i_load(const void* p) {
    ivec a;
    memcpy(&a, p, sizeof a);
    return a;
}
DELTAIC_INLINE ivec i_add(ivec a, ivec b) { return a + b; }
DELTAIC_INLINE ivec i_and(ivec a, ivec b) { return a & b; }
template <int n>
DELTAIC_INLINE ivec i_shl(ivec a) {
    return a << n;
}
template <int n>
DELTAIC_INLINE ivec i_shr(ivec a) {  // logical
    typedef uint32_t uvec __attribute__((vector_size(16)));
    return reinterpret_cast<ivec>(reinterpret_cast<uvec>(a) >> n);
}
DELTAIC_INLINE vec as_float(ivec a) { return reinterpret_cast<vec>(a); }
DELTAIC_INLINE ivec as_int(vec a) { return reinterpret_cast<ivec>(a); }
DELTAIC_INLINE vec i_to_float(ivec a) { return __builtin_convertvector(a, vec); }
DELTAIC_INLINE ivec v_round(vec a) {
    return ivec{static_cast<int32_t>(rintf(a[0])), static_cast<int32_t>(rintf(a[1])), static_cast<int32_t>(rintf(a[2])),
                static_cast<int32_t>(rintf(a[3]))};
}
DELTAIC_INLINE vec v_load_bf16(const uint16_t* p) {
    return vec{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
DELTAIC_INLINE void v_store_bf16(uint16_t* p, vec a) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(a[i]);
}
DELTAIC_INLINE vec v_load_f16(const uint16_t* p) {
    return vec{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
DELTAIC_INLINE ivec i_load_u8(const uint8_t* p) { return ivec{p[0], p[1], p[2], p[3]}; }
DELTAIC_INLINE void v_transpose(vec (&a)[kWidth]) {
    const vec b[4] = {a[0], a[1], a[2], a[3]};
    for (int i = 0; i < 4; ++i) a[i] = vec{b[0][i], b[1][i], b[2][i], b[3][i]};
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
    const vec four = (a[0] + a[2]) + (a[1] + a[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
DELTAIC_INLINE float v_reduce_max(const vec (&a)[kParts]) {
    const vec four = v_max(v_max(a[0], a[2]), v_max(a[1], a[3]));
    const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}
// Rounds 16 numbers to int8 (they must fit), stores them and returns their sum.
DELTAIC_INLINE int32_t v_store_int8(int8_t* p, const vec (&a)[kParts]) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<int8_t>(rintf(a[i / 4][i % 4]));
        sum += p[i];
    }
    return sum;
}

constexpr bool kBf16Dot = false;  // no products of bfloat16 pairs
DELTAIC_INLINE vec v_dot_bf16(vec acc, ivec, ivec) { return acc; }

}  // namespace DELTAIC_ISA
}  // namespace deltaic
