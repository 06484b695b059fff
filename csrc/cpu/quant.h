// Dot products on the int8, int4 and bfloat16 layouts (core/view.h). For the integer formats activations are quantised
// per token and run of 128 columns to int8; all sums inside a run are exact integers, so every instruction set, and
// every way to split the work, gives the same bits. For bfloat16 they are rounded to bfloat16, where there are
// instructions for that.
#pragma once

#include "core/pool.h"
#include "cpu/simd.h"
#if defined(DELTAIC_NEON)
#include "cpu/quant_neon.h"
#endif

namespace deltaic {
namespace DELTAIC_ISA {

// Which forms of its activations a product reads.
struct Forms {
    bool integers = false, halves = false;
    DELTAIC_INLINE Forms operator|(Forms other) const { return {integers || other.integers, halves || other.halves}; }
};

// Rows of activations: as plain floats, and in the forms that products read. Those are run-major, so that the tokens of
// a register tile lie at constant distances and many tokens stream in order while one run of weights stays in cache.
struct Activations {
    int64_t T = 0, K = 0;
    int64_t stride = 0;                   // tokens that the arrays below have room for
    const float* x = nullptr;             // [T][K]
    int64_t runs = 0;                     // ceil(K / 128)
    const int8_t* q = nullptr;            // [runs][stride][128], x ~ scale * q
    const float* scale = nullptr;         // [runs][stride]
    const int32_t* run_sum = nullptr;     // [runs][stride] sum of q
    const int16_t* group_bias = nullptr;  // [runs][stride][8] -8 * sum of q over a group of 16 columns

    const uint16_t* halves = nullptr;  // [ceil(K / 64)][stride][64] bfloat16 bits

    // Tokens [first, first + count).
    DELTAIC_INLINE Activations rows(int64_t first, int64_t count) const {
        Activations a = *this;
        a.T = count;
        if (x) a.x += first * K;
        if (q) a.q += first * kWordBytes, a.scale += first, a.run_sum += first, a.group_bias += first * 8;
        if (halves) a.halves += first * (kWordBytes / 2);
        return a;
    }
    DELTAIC_INLINE const int8_t* quads(int64_t run) const { return q + run * stride * kWordBytes; }
};

// Scratch memory for T rows of K columns. Calling thread only.
DELTAIC_INLINE Activations scratch_activations(int64_t T, int64_t K, bool floats, Forms forms) {
    Activations a;
    a.T = T, a.K = K;
    a.stride = T > 16 ? T | 1 : T;  // a power of two would put all runs of a token into one set of the cache
    a.runs = ceil_div(K, kRun);
    if (floats) a.x = scratch_f32(T * K);
    if (forms.halves)
        a.halves = static_cast<uint16_t*>(scratch(static_cast<size_t>(ceil_div(K, 64) * a.stride * kWordBytes)));
    if (forms.integers) {
        a.q = static_cast<int8_t*>(scratch(static_cast<size_t>(a.runs * a.stride * kWordBytes)));
        a.scale = scratch_f32(a.stride * a.runs);
        a.run_sum = static_cast<int32_t*>(scratch(static_cast<size_t>(a.stride * a.runs) * 4));
        a.group_bias =
            static_cast<int16_t*>(scratch(static_cast<size_t>(a.stride * a.runs) * 16 + 2));  // read in words
    }
    return a;
}

// Copies row `from` of `source` to row `to` of `target`, in the forms that `target` has writable memory for.
DELTAIC_INLINE void copy_row(const Activations& source, int64_t from, const Activations& target, int64_t to) {
    if (target.x)
        memcpy(const_cast<float*>(target.x) + to * source.K, source.x + from * source.K,
               static_cast<size_t>(source.K) * 4);
    if (target.halves)
        for (int64_t chunk = 0; chunk < ceil_div(source.K, 64); ++chunk)
            memcpy(const_cast<uint16_t*>(target.halves) + (chunk * target.stride + to) * 64,
                   source.halves + (chunk * source.stride + from) * 64, kWordBytes);
    if (!target.q) return;
    for (int64_t run = 0; run < source.runs; ++run) {
        const int64_t i = run * source.stride + from, j = run * target.stride + to;
        memcpy(const_cast<int8_t*>(target.q) + j * kWordBytes, source.q + i * kWordBytes, kWordBytes);
        const_cast<float*>(target.scale)[j] = source.scale[i];
        const_cast<int32_t*>(target.run_sum)[j] = source.run_sum[i];
        memcpy(const_cast<int16_t*>(target.group_bias) + j * 8, source.group_bias + i * 8, 16);
    }
}

// --- activations as int8

// Rounds the 128 numbers of a run to int8 (they must fit) and stores them, and -8 times the sum of each group of 16
// columns. Returns the sum of all.
DELTAIC_INLINE int32_t store_run(int8_t* q, const f32x16 (&v)[8], int16_t* bias) {
#if defined(__AVX512VNNI__)
    // Packing interleaves: 32-bit lane j of 128-bit lane L holds numbers 4L.. of vector j. One permutation orders it.
    const ivec order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    ivec sums[2];  // 128-bit lane j: the sum of vector j, four times
    for (int half = 0; half < 2; ++half) {
        ivec n[4];
        for (int j = 0; j < 4; ++j) n[j] = v_round(v[half * 4 + j].part[0]);
        const ivec bytes = _mm512_permutexvar_epi32(
            order, _mm512_packs_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3])));
        _mm512_storeu_si512(q + half * 64, bytes);
        const ivec four = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
        const ivec eight = _mm512_add_epi32(four, _mm512_shuffle_epi32(four, _MM_PERM_CDAB));
        sums[half] = _mm512_add_epi32(eight, _mm512_shuffle_epi32(eight, _MM_PERM_BADC));
    }
    const ivec words = _mm512_packs_epi32(sums[0], sums[1]);  // of a 128-bit lane: four of vector j, four of 4 + j
    const ivec pick = _mm512_castsi128_si512(_mm_setr_epi16(0, 8, 16, 24, 4, 12, 20, 28));
    const __m128i groups = _mm512_castsi512_si128(_mm512_permutexvar_epi16(pick, words));
    const __m128i minus_eight = _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(groups, 3));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bias), minus_eight);
    __m128i sum = _mm_madd_epi16(groups, _mm_set1_epi16(1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
#else
    int32_t sum = 0;
    for (int64_t g = 0; g < 8; ++g) {
        const int32_t of_group = v_store_int8(q + g * kGroup, v[g].part);
        bias[g] = static_cast<int16_t>(-8 * of_group);
        sum += of_group;
    }
    return sum;
#endif
}

// --- the integer products, which differ between instruction sets
//
// run_int8: sum[b][t] = sum over the 128 columns of a run of (w - 128) * q. `w` is the run's 32 lines in block 0, the
// next block lies `stride` bytes further; token t's numbers lie at q + t * 128; run_sum[t] is the sum of its q.
// run_int4: the same of (nibble - 8) * s * q; `w` is the run's 16 lines, `scales` its 64 bytes, bias[t * 8 + g] is
// -8 times the sum of group g's q.
// With kAhead, what lies `far` bytes after each line, or at `ahead` (a whole run of int4), is asked for in the
// second-level cache.
//
// From few_tokens(format) on, where has_form(format), the lines of a run are first written in another form, which all
// tokens then meet: by form_run, into kFormBytes. AVX-512 turns int4 into lines of int8 for run_int8; NEON has tiles of
// its own, form_int8 and form_bf16.

#if !defined(DELTAIC_NEON)       // which has cpu/quant_neon.h
constexpr int kPanelTokens = 6;  // of a register tile
#if defined(__AVX512VNNI__)
DELTAIC_INLINE constexpr int64_t few_tokens(Format) { return 8; }
DELTAIC_INLINE constexpr bool has_form(Format format) { return format == Format::int4; }

// Sums that a lane's products are spread over, to be added in the end: enough chains for the latency of an instruction.
DELTAIC_INLINE constexpr int chains(int tiles) { return tiles >= 4 ? 1 : tiles >= 2 ? 2 : 4; }

template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int8(const uint8_t* w, int64_t stride, int64_t far, const int8_t* q, const int32_t* run_sum,
                             i32x16 (&sum)[NB][NT]) {
    constexpr int C = chains(NB * NT);
    ivec acc[NB][NT][C];
    DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int b = 0; b < NB; ++b)
        DELTAIC_UNROLL for (int c = 0; c < C; ++c) acc[b][t][c] = i_set1(c ? 0 : -128 * run_sum[t]);
    for (int line = 0; line < 32; line += C) DELTAIC_UNROLL for (int c = 0; c < C; ++c) {
            ivec wb[NB];
            DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
                const uint8_t* p = w + b * stride + (line + c) * 64;
                wb[b] = i_load(p);
                if (kAhead) prefetch_far(p + far);
            }
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                const ivec at = i_set1(load_i32(q + t * kWordBytes + (line + c) * 4));
                DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
                    acc[b][t][c] = _mm512_dpbusd_epi32(acc[b][t][c], wb[b], at);
                }
            }
        }
    DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        DELTAIC_UNROLL for (int c = 1; c < C; ++c) acc[b][t][0] = i_add(acc[b][t][0], acc[b][t][c]);
        sum[b][t].part[0] = acc[b][t][0];
    }
}

// 16 bytes of two 4-bit scales - 1 each: the scales of the even and the odd group, in both 16-bit halves of a lane.
DELTAIC_INLINE void unpack_scales(const uint8_t* scales, ivec* even, ivec* odd) {
    constexpr auto both = [](int i) { return static_cast<int>(0x80008000u + static_cast<uint32_t>(i) * 0x10001u); };
    const ivec halves = _mm512_setr_epi32(both(0), both(1), both(2), both(3), both(4), both(5), both(6), both(7),
                                          both(8), both(9), both(10), both(11), both(12), both(13), both(14), both(15));
    const ivec bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const ivec packed = _mm512_shuffle_epi8(bytes, halves), one = _mm512_set1_epi16(1);
    *even = _mm512_add_epi16(_mm512_and_si512(packed, _mm512_set1_epi16(15)), one);
    *odd = _mm512_add_epi16(_mm512_srli_epi16(packed, 4), one);
}

// A line holds two quads of nibbles. Two neighbouring nibbles, one in each byte of a 16-bit half, are multiplied by
// their scale at once: 15 * 16 fits a byte, so nothing is carried from one to the other.
DELTAIC_INLINE ivec low_quad(ivec line, ivec s) {
    return _mm512_mullo_epi16(_mm512_and_si512(line, _mm512_set1_epi8(15)), s);
}
DELTAIC_INLINE ivec high_quad(ivec line, ivec s) { return low_quad(_mm512_srli_epi16(line, 4), s); }

// Two groups at a time: their dot products fit 16 bits each (8 * 127 * 16 < 2^15, so what a group's bias has above them
// does no harm), and one instruction multiplies both by their scales. Zen 4 multiplies in two of its four pipes only:
// 36 times per token and run here; weights times their scales would take 36 and 32 for all tokens together.
//
// What matters most is that the processor's own prefetching follows: lines loaded in order, by a loop (each of its four
// loads then moves on by the same 256 bytes), and twice, as long as there is time for it.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int4(const uint8_t* w, const uint8_t* scales, int64_t stride, const uint8_t* ahead,
                             const int8_t* q, const int16_t* bias, i32x16 (&sum)[NB][NT]) {
    const ivec nibble = _mm512_set1_epi8(15), one = _mm512_set1_epi32(0x00010001);
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) sum[b][t].part[0] = i_set1(0);
    }
    DELTAIC_LOOP for (int pair = 0; pair < 4; ++pair) DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        if (kAhead)
            DELTAIC_UNROLL for (int i = 0; i < 5; ++i) prefetch_far(ahead + pair * (kInt4RunBytes / 4) + i * 64);
        const ivec packed = i_load_u8(scales + b * stride + pair * 16);
        ivec s = _mm512_or_si512(packed, _mm512_slli_epi32(packed, 12));
        keep(s);  // or GCC makes one instruction of three operands, which is slower than two
        s = i_add(i_and(s, _mm512_set1_epi32(0x000f000f)), one);
        ivec quads[2][4];
        DELTAIC_UNROLL for (int line = 0; line < 4; ++line) {
            const uint8_t* p = w + b * stride + (pair * 4 + line) * 64;
            ivec both = i_load(p);
            keep_in_order(both);
            ivec high = _mm512_srli_epi16(NT <= 2 ? i_load(p) : both, 4);
            if (NT <= 2) keep_in_order(high);
            quads[line / 2][line % 2 * 2] = i_and(both, nibble);
            quads[line / 2][line % 2 * 2 + 1] = i_and(high, nibble);
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
            const int8_t* at = q + t * kWordBytes + pair * 2 * kGroup;
            ivec dot[2];
            DELTAIC_UNROLL for (int g = 0; g < 2; ++g) dot[g] = i_set1(load_i32(bias + t * 8 + pair * 2 + g));
            DELTAIC_UNROLL for (int j = 0; j < 4; ++j) DELTAIC_UNROLL for (int g = 0; g < 2; ++g) {
                dot[g] = _mm512_dpbusd_epi32(dot[g], quads[g][j], i_set1(load_i32(at + g * kGroup + 4 * j)));
            }
            const ivec dots = _mm512_mask_mov_epi16(dot[0], 0xaaaaaaaau, _mm512_slli_epi32(dot[1], 16));
            sum[b][t].part[0] = _mm512_dpwssd_epi32(sum[b][t].part[0], dots, s);
        }
    }
}

// One run of an int4 block as the 32 lines of an int8 block: the same integers, s multiplied in.
DELTAIC_INLINE void form_run(Format, const uint8_t* w, const uint8_t* scales, int64_t, uint8_t* out) {
    for (int pair = 0; pair < 4; ++pair) {
        ivec s[2];
        unpack_scales(scales + pair * 16, &s[0], &s[1]);
        DELTAIC_UNROLL for (int line = 0; line < 4; ++line) {
            const ivec both = i_load(w + (pair * 4 + line) * 64), by = s[line / 2];
            // (nibble - 8) s + 128 = nibble s - (8 s - 128), in bytes
            const ivec offset = _mm512_xor_si512(_mm512_mullo_epi16(by, _mm512_set1_epi16(0x0808)),
                                                 _mm512_set1_epi8(static_cast<char>(0x80)));
            uint8_t* quads = out + (pair * 4 + line) * 128;
            _mm512_storeu_si512(quads, _mm512_sub_epi8(low_quad(both, by), offset));
            _mm512_storeu_si512(quads + 64, _mm512_sub_epi8(high_quad(both, by), offset));
        }
    }
}
#elif defined(__AVXVNNI__)
DELTAIC_INLINE constexpr int64_t few_tokens(Format format) { return format == Format::int4 ? 4 : 8; }
DELTAIC_INLINE constexpr bool has_form(Format format) { return format == Format::int4; }

// Half a block (8 rows) at a time where the tokens fill the 16 registers; a few tokens spread a lane's products over
// several sums, to be added in the end: enough chains for the latency of an instruction.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int8(const uint8_t* w, int64_t stride, int64_t far, const int8_t* q, const int32_t* run_sum,
                             i32x16 (&sum)[NB][NT]) {
    constexpr int kTogether = NT <= 6 ? kParts : 1, C = NT == 1 ? 4 : NT == 2 ? 2 : 1;
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i0 = 0; i0 < kParts; i0 += kTogether) {
        ivec acc[NT][kTogether][C];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i)
            DELTAIC_UNROLL for (int c = 0; c < C; ++c) acc[t][i][c] = i_set1(c ? 0 : -128 * run_sum[t]);
        for (int line = 0; line < 32; line += C) DELTAIC_UNROLL for (int c = 0; c < C; ++c) {
                const uint8_t* p = w + b * stride + (line + c) * 64;
                if (kAhead && i0 == 0) prefetch_far(p + far);
                ivec wi[kTogether];
                DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) wi[i] = i_load(p + 32 * (i0 + i));
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                    const ivec at = i_set1(load_i32(q + t * kWordBytes + (line + c) * 4));
                    DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) acc[t][i][c] =
                        dot_bytes(acc[t][i][c], wi[i], at);
                }
            }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) {
            DELTAIC_UNROLL for (int c = 1; c < C; ++c) acc[t][i][0] = i_add(acc[t][i][0], acc[t][i][c]);
            sum[b][t].part[i0 + i] = acc[t][i][0];
        }
    }
}

// Two groups at a time: their dot products fit 16 bits each (8 * 127 * 16 < 2^15, so what a group's bias has above them
// does no harm), and one instruction multiplies both by their scales.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int4(const uint8_t* w, const uint8_t* scales, int64_t stride, const uint8_t* ahead,
                             const int8_t* q, const int16_t* bias, i32x16 (&sum)[NB][NT]) {
    for (int64_t i = 0; kAhead && i < kInt4RunBytes; i += 64) prefetch_far(ahead + i);
    const ivec nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
        ivec acc[NT];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[t] = i_set1(0);
        for (int pair = 0; pair < 4; ++pair) {
            const ivec packed = i_load_u8(scales + b * stride + pair * 16 + 8 * i);
            const ivec s = _mm256_add_epi16(
                i_and(_mm256_or_si256(packed, _mm256_slli_epi32(packed, 12)), _mm256_set1_epi32(0x000f000f)), one);
            ivec dot[NT][2];
            DELTAIC_UNROLL for (int g = 0; g < 2; ++g) {
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) dot[t][g] = i_set1(load_i32(bias + t * 8 + pair * 2 + g));
                DELTAIC_UNROLL for (int line = 0; line < 2; ++line) {
                    const ivec both = i_load(w + b * stride + (pair * 4 + g * 2 + line) * 64 + 32 * i);
                    const ivec quads[2] = {i_and(both, nibble), i_and(_mm256_srli_epi16(both, 4), nibble)};
                    DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int j = 0; j < 2; ++j) {
                        const int8_t* at = q + t * kWordBytes + (pair * 2 + g) * kGroup + 8 * line + 4 * j;
                        dot[t][g] = dot_bytes(dot[t][g], quads[j], i_set1(load_i32(at)));
                    }
                }
            }
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[t] =
                dot_words(acc[t], _mm256_blend_epi16(dot[t][0], _mm256_slli_epi32(dot[t][1], 16), 0xaa), s);
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) sum[b][t].part[i] = acc[t];
    }
}

// One run of an int4 block as the 32 lines of an int8 block: the same integers, s multiplied in. Two neighbouring
// nibbles, one in each byte of a 16-bit half, are multiplied by their scale at once: 15 * 16 fits a byte.
DELTAIC_INLINE void form_run(Format, const uint8_t* w, const uint8_t* scales, int64_t, uint8_t* out) {
    const ivec nibble = _mm256_set1_epi8(15), low = _mm256_set1_epi16(15), one = _mm256_set1_epi16(1);
    for (int pair = 0; pair < 4; ++pair) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
            ivec packed = i_load_u8(scales + pair * 16 + 8 * i);
            packed = _mm256_or_si256(packed, _mm256_slli_epi32(packed, 16));
            const ivec s[2] = {_mm256_add_epi16(i_and(packed, low), one),
                               _mm256_add_epi16(_mm256_srli_epi16(packed, 4), one)};
            DELTAIC_UNROLL for (int line = 0; line < 4; ++line) {
                const ivec both = i_load(w + (pair * 4 + line) * 64 + 32 * i), by = s[line / 2];
                // (nibble - 8) s + 128 = nibble s - (8 s - 128), in bytes
                const ivec offset = _mm256_xor_si256(_mm256_mullo_epi16(by, _mm256_set1_epi16(0x0808)),
                                                     _mm256_set1_epi8(static_cast<char>(0x80)));
                const ivec quads[2] = {i_and(both, nibble), i_and(_mm256_srli_epi16(both, 4), nibble)};
                DELTAIC_UNROLL for (int j = 0; j < 2; ++j)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (pair * 4 + line) * 128 + 64 * j + 32 * i),
                                        _mm256_sub_epi8(_mm256_mullo_epi16(quads[j], by), offset));
            }
        }
}
#else
DELTAIC_INLINE constexpr int64_t few_tokens(Format) { return 8; }
DELTAIC_INLINE constexpr bool has_form(Format) { return false; }
DELTAIC_INLINE void form_run(Format, const uint8_t*, const uint8_t*, int64_t, uint8_t*) {}

#if defined(__AVX2__)
// vpmaddubsw saturates, so the sign moves from the weight to the activation: |w| <= 127, |q| <= 127, two products fit
// 16 bits. Half a block (8 rows) at a time where the tokens fill the 16 registers.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int8(const uint8_t* w, int64_t stride, int64_t far, const int8_t* q, const int32_t*,
                             i32x16 (&sum)[NB][NT]) {
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(static_cast<char>(0x80));
    constexpr int kTogether = NT == 1 ? kParts : 1;
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i0 = 0; i0 < kParts; i0 += kTogether) {
        ivec acc[NT][kTogether];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) acc[t][i] =
            i_set1(0);
        for (int line = 0; line < 32; ++line) {
            const uint8_t* p = w + b * stride + line * 64;
            if (kAhead && i0 == 0) prefetch_far(p + far);
            DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) {
                const __m256i wi = _mm256_xor_si256(i_load(p + 32 * (i0 + i)), flip), size = _mm256_abs_epi8(wi);
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                    const __m256i at = _mm256_sign_epi8(i_set1(load_i32(q + t * kWordBytes + line * 4)), wi);
                    acc[t][i] = i_add(acc[t][i], _mm256_madd_epi16(_mm256_maddubs_epi16(size, at), ones));
                }
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kTogether; ++i) sum[b][t]
            .part[i0 + i] = acc[t][i];
    }
}

// Nibbles are below 16: the four quads of a group (15 * 127 * 2 * 4 = 15240) are added in 16 bits, and what widens the
// pairs to 32 bits multiplies them by s.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int4(const uint8_t* w, const uint8_t* scales, int64_t stride, const uint8_t* ahead,
                             const int8_t* q, const int16_t* bias, i32x16 (&sum)[NB][NT]) {
    for (int64_t i = 0; kAhead && i < kInt4RunBytes; i += 64) prefetch_far(ahead + i);
    const __m256i low = _mm256_set1_epi8(15), nibble = _mm256_set1_epi16(15), one = _mm256_set1_epi16(1);
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
        ivec acc[NT];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[t] = i_set1(0);
        for (int pair = 0; pair < 4; ++pair) {
            __m256i s = i_load_u8(scales + b * stride + pair * 16 + 8 * i);
            s = _mm256_or_si256(s, _mm256_slli_epi32(s, 16));
            const __m256i by[2] = {_mm256_add_epi16(_mm256_and_si256(s, nibble), one),
                                   _mm256_add_epi16(_mm256_srli_epi16(s, 4), one)};
            const __m256i both = _mm256_blend_epi16(by[0], by[1], 0xaa);
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                acc[t] = i_add(acc[t], _mm256_madd_epi16(both, i_set1(load_i32(bias + t * 8 + pair * 2))));
            }
            DELTAIC_UNROLL for (int half = 0; half < 2; ++half) {
                const int g = 2 * pair + half;
                const uint8_t* p = w + b * stride + g * 128;
                const __m256i line0 = i_load(p + 32 * i), line1 = i_load(p + 64 + 32 * i);
                const __m256i quads[4] = {
                    _mm256_and_si256(line0, low), _mm256_and_si256(_mm256_srli_epi16(line0, 4), low),
                    _mm256_and_si256(line1, low), _mm256_and_si256(_mm256_srli_epi16(line1, 4), low)};
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                    const int8_t* at = q + t * kWordBytes + g * kGroup;
                    __m256i dot = _mm256_maddubs_epi16(quads[0], i_set1(load_i32(at)));
                    DELTAIC_UNROLL for (int j = 1; j < 4; ++j) {
                        dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(quads[j], i_set1(load_i32(at + 4 * j))));
                    }
                    acc[t] = i_add(acc[t], _mm256_madd_epi16(dot, by[half]));
                }
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) sum[b][t].part[i] = acc[t];
    }
}
#else
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int8(const uint8_t* w, int64_t stride, int64_t, const int8_t* q, const int32_t*,
                             i32x16 (&sum)[NB][NT]) {
    for (int b = 0; b < NB; ++b)
        for (int t = 0; t < NT; ++t)
            for (int lane = 0; lane < 16; ++lane) {
                int32_t dot = 0;
                for (int k = 0; k < kRun; ++k)
                    dot += (w[b * stride + k / 4 * 64 + 4 * lane + k % 4] - 128) * q[t * kWordBytes + k];
                sum[b][t].part[lane / kWidth][lane % kWidth] = dot;
            }
}
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int4(const uint8_t* w, const uint8_t* scales, int64_t stride, const uint8_t* ahead,
                             const int8_t* q, const int16_t* bias, i32x16 (&sum)[NB][NT]) {
    for (int64_t i = 0; kAhead && i < kInt4RunBytes; i += 64) prefetch_far(ahead + i);
    for (int b = 0; b < NB; ++b)
        for (int t = 0; t < NT; ++t)
            for (int lane = 0; lane < 16; ++lane) {
                int32_t total = 0;
                for (int g = 0; g < 8; ++g) {
                    const int32_t packed = scales[b * stride + g / 2 * 16 + lane];
                    int32_t dot = bias[t * 8 + g];
                    for (int line = 0; line < 2; ++line)
                        for (int j = 0; j < 4; ++j) {
                            const int32_t byte = w[b * stride + g * 128 + 64 * line + 4 * lane + j];
                            const int8_t* at = q + t * kWordBytes + g * kGroup + 8 * line + j;
                            dot += (byte & 15) * at[0] + (byte >> 4) * at[4];
                        }
                    total += ((g % 2 ? packed >> 4 : packed & 15) + 1) * dot;
                }
                sum[b][t].part[lane / kWidth][lane % kWidth] = total;
            }
}
#endif
#endif

template <int NB, int NT>
DELTAIC_INLINE void form_int8(const uint8_t*, int64_t, const int8_t*, i32x16 (&)[NB][NT]) {}
template <int NB, int NT>
DELTAIC_INLINE void form_bf16(const uint8_t*, int64_t, int64_t, const uint16_t*, f32x16 (&)[NB][NT]) {}
#endif

// acc[b][t] += `lines` lines of bfloat16 pairs times the numbers of token t at a + t * 64.
template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void chunk_bf16(const uint8_t* w, int64_t stride, int64_t far, int64_t lines, const uint16_t* a,
                               f32x16 (&acc)[NB][NT]) {
    for (int64_t line = 0; line < lines; ++line) {
        ivec wb[NB][kParts];
        DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
            const uint8_t* p = w + b * stride + line * 64;
            if (kAhead) prefetch_far(p + far);
            DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
                ivec line_part = i_load(p + i * kWidth * 4);  // kept by itself: of an array, on the stack
                if (NT == 2 || NT == 3) keep(line_part);
                wb[b][i] = line_part;
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
            const ivec at = i_set1(load_i32(a + t * (kWordBytes / 2) + line * 2));
            DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
                acc[b][t].part[i] = v_dot_bf16(acc[b][t].part[i], wb[b][i], at);
            }
        }
    }
}

// --- what every instruction set adds up from them

constexpr int64_t kSumStride = 64;  // floats between the sums of one token and the next

// Adds d * scale * (integer sum) of one run to acc [b][t]: the same operations for every tile size, run after run, so
// that a token's sum does not depend on who shares its tile.
DELTAIC_INLINE f32x16 add_run(f32x16 acc, i32x16 sum, float scale, f32x16 d) {
    return fma(mul(to_float(sum), set1(scale)), d, acc);
}

template <int NB>
DELTAIC_INLINE void load_halves(const uint8_t* halves, int64_t stride, f32x16 (&d)[NB]) {
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) d[b] = load_f16(reinterpret_cast<const uint16_t*>(halves + b * stride));
}

// Column `j` of the four in a line of an int8 block, of all rows, without d.
DELTAIC_INLINE f32x16 load_int8(const uint8_t* line, int64_t j) {
    f32x16 r;
    for (int i = 0; i < kParts; ++i) {
        const ivec four = i_load(line + i * kWidth * 4);
        const ivec top = j == 0 ? i_shl<24>(four) : j == 1 ? i_shl<16>(four) : j == 2 ? i_shl<8>(four) : four;
        // value + 128 in the top byte: with the top bit turned it is the value, signed
        const ivec sign = i_set1(static_cast<int32_t>(0x80000000u)), byte = i_set1(static_cast<int32_t>(0xff000000u));
        r.part[i] = v_mul(i_to_float(i_and(i_add(top, sign), byte)), v_set1(0x1p-24f));
    }
    return r;
}

// Column k of row `lane` of an int8 or int4 block, as a number.
DELTAIC_INLINE float element_int8(const uint8_t* w, const BlockLayout& at, int64_t k, int64_t lane) {
    const uint16_t* d = reinterpret_cast<const uint16_t*>(w);
    return f16_to_float(d[k / kRun * 16 + lane]) *
           static_cast<float>(w[at.lines + k / 4 * 64 + lane * 4 + k % 4] - 128);
}
DELTAIC_INLINE float element_int4(const uint8_t* w, const BlockLayout& at, int64_t k, int64_t lane) {
    const int64_t run = k / kRun, g = k % kRun / kGroup, quad = k % kGroup / 4;
    const int byte = w[at.lines + run * 1024 + g * 128 + quad / 2 * 64 + lane * 4 + k % 4],
              scales = w[at.scales + run * 64 + g / 2 * 16 + lane];
    const int value = (quad % 2 ? byte >> 4 : byte & 15) - 8, s = (g % 2 ? scales >> 4 : scales & 15) + 1;
    const uint16_t* d = reinterpret_cast<const uint16_t*>(w);
    return f16_to_float(d[run * 16 + lane]) * static_cast<float>(s * value);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
