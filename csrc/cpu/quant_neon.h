// The products of cpu/quant.h for NEON. Few tokens meet the weights as they lie in memory; for more, the lines of a run
// are first turned into the form that the widest instruction there is multiplies: signed bytes (sdot), or tiles of two
// rows (smmla and bfmmla, which multiply two rows by two tokens).
#pragma once

#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kRowPairs = true;
#else
constexpr bool kRowPairs = false;
#endif

// Tokens up to which the sums of all rows fit the registers; of more, half the rows are worked on at a time.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kWholeTokens = 4, kPanelTokens = 6;
#else
constexpr int kWholeTokens = 2, kPanelTokens = 4;
#endif

DELTAIC_INLINE constexpr int64_t few_tokens(Format format) {
    return kRowPairs ? 3 : format == Format::int4 ? 2 : 2 * kWholeTokens;
}
DELTAIC_INLINE constexpr bool has_form(Format format) { return format != Format::bf16 || kRowPairs; }

// Sums of four rows. Without dot products, those of two pairs of a row stand side by side until the end.
struct RowSums {
#if defined(__ARM_FEATURE_DOTPROD)
    ivec all;
    RowSums() = default;
    DELTAIC_INLINE explicit RowSums(ivec start) : all(start) {}
    DELTAIC_INLINE ivec total() const { return all; }
#else
    ivec low, high;  // of two rows each
    RowSums() = default;
    DELTAIC_INLINE explicit RowSums(ivec start) : low(vtrn1q_s32(start, i_set1(0))), high(low) {}  // all lanes alike
    DELTAIC_INLINE ivec total() const { return vpaddq_s32(low, high); }
#endif

    // Adds the products of two quads of each row with quads `quad` and quad + 1 of `a`. Two products of a pair must fit
    // 16 bits.
    template <int quad>
    DELTAIC_INLINE void add(int8x16_t first, int8x16_t second, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
        all = vdotq_laneq_s32(vdotq_laneq_s32(all, first, a, quad), second, a, quad + 1);
#else
        const int32x4_t words = vreinterpretq_s32_s8(a);
        const int8x16_t a0 = vreinterpretq_s8_s32(vdupq_laneq_s32(words, quad));
        const int8x16_t a1 = vreinterpretq_s8_s32(vdupq_laneq_s32(words, quad + 1));
        low = vpadalq_s16(
            low, vmlal_s8(vmull_s8(vget_low_s8(first), vget_low_s8(a0)), vget_low_s8(second), vget_low_s8(a1)));
        high = vpadalq_s16(high, vmlal_high_s8(vmull_high_s8(first, a0), second, a1));
#endif
    }

    // The same with quads as an int8 block stores them, numbers + 128. Where bytes of different signs can be multiplied
    // they are taken as they are; stored_start() then takes the rest off again.
    template <int quad>
    DELTAIC_INLINE void add_stored(uint8x16_t first, uint8x16_t second, int8x16_t a) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        all = vusdotq_laneq_s32(vusdotq_laneq_s32(all, first, a, quad), second, a, quad + 1);
#else
        const uint8x16_t flip = vdupq_n_u8(0x80);
        add<quad>(vreinterpretq_s8_u8(veorq_u8(first, flip)), vreinterpretq_s8_u8(veorq_u8(second, flip)), a);
#endif
    }
};
DELTAIC_INLINE int32_t stored_start([[maybe_unused]] int32_t run_sum) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return -128 * run_sum;
#else
    return 0;
#endif
}

template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int8(const uint8_t* w, int64_t stride, int64_t far, const int8_t* q, const int32_t* run_sum,
                             i32x16 (&sum)[NB][NT]) {
    constexpr int Parts = NT > kWholeTokens ? kParts / 2 : kParts;
    constexpr int C = NT == 1 ? 2 : 1;  // chains of additions, against their latency
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i0 = 0; i0 < kParts; i0 += Parts) {
        RowSums acc[C][NT][Parts];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
            acc[C - 1][t][i] = RowSums(i_set1(0));
            acc[0][t][i] = RowSums(i_set1(stored_start(run_sum[t])));
        }
        for (int quads = 0; quads < 8; ++quads) {
            const uint8_t* p = w + b * stride + quads * 256 + i0 * 16;
            int8x16_t a[NT];
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) a[t] = vld1q_s8(q + t * kWordBytes + quads * 16);
            DELTAIC_UNROLL for (int line = 0; line < 4; ++line) {
                if (kAhead && i0 == 0) prefetch_far(p + line * 64 + far);
            }
            DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
                const uint8x16_t first = vld1q_u8(p + 16 * i), second = vld1q_u8(p + 64 + 16 * i);
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[0][t][i].template add_stored<0>(first, second, a[t]);
            }
            DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
                const uint8x16_t first = vld1q_u8(p + 128 + 16 * i), second = vld1q_u8(p + 192 + 16 * i);
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[C - 1][t][i].template add_stored<2>(first, second,
                                                                                                    a[t]);
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
            ivec total = acc[0][t][i].total();
            if (C > 1) total = i_add(total, acc[C - 1][t][i].total());
            sum[b][t].part[i0 + i] = total;
        }
    }
}

template <bool kAhead, int NB, int NT>
DELTAIC_INLINE void run_int4(const uint8_t* w, const uint8_t* scales, int64_t stride, const uint8_t* ahead,
                             const int8_t* q, const int16_t* bias, i32x16 (&sum)[NB][NT]) {
    for (int64_t i = 0; kAhead && i < kInt4RunBytes; i += 64) prefetch_far(ahead + i);
    const uint8x16_t nibble = vdupq_n_u8(15), one = vdupq_n_u8(1);
    const uint32_t bytes[4] = {0xffffff00u, 0xffffff01u, 0xffffff02u, 0xffffff03u};
    uint8x16_t widen[kParts];  // rows 4 i .. 4 i + 3 of 16 bytes to lanes of 32 bits
    DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
        widen[i] = vreinterpretq_u8_u32(vaddq_u32(vld1q_u32(bytes), vdupq_n_u32(static_cast<uint32_t>(4 * i))));
    }
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        ivec acc[NT][kParts];
        int32_t starts[NT][8];  // what the groups begin with
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
            DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) acc[t][i] = i_set1(0);
            const int16x8_t all = vld1q_s16(bias + t * 8);
            vst1q_s32(starts[t], vmovl_s16(vget_low_s16(all))), vst1q_s32(starts[t] + 4, vmovl_high_s16(all));
        }
        const auto group = [&](int g, uint8x16_t s, const ivec(&start)[NT]) __attribute__((always_inline)) {
            const uint8_t* p = w + b * stride + g * 128;
            RowSums dot[NT][kParts];
            int8x16_t a[NT];
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                a[t] = vld1q_s8(q + t * kWordBytes + g * kGroup);
                DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) dot[t][i] = RowSums(start[t]);
            }
            DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
                const uint8x16_t line0 = vld1q_u8(p + 16 * i), line1 = vld1q_u8(p + 64 + 16 * i);
                const int8x16_t quads[4] = {
                    vreinterpretq_s8_u8(vandq_u8(line0, nibble)), vreinterpretq_s8_u8(vshrq_n_u8(line0, 4)),
                    vreinterpretq_s8_u8(vandq_u8(line1, nibble)), vreinterpretq_s8_u8(vshrq_n_u8(line1, 4))};
                const ivec by = vreinterpretq_s32_u8(vqtbl1q_u8(s, widen[i]));
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                    dot[t][i].template add<0>(quads[0], quads[1], a[t]);
                    dot[t][i].template add<2>(quads[2], quads[3], a[t]);
                    acc[t][i] = vmlaq_s32(acc[t][i], dot[t][i].total(), by);
                }
            }
        };
        for (int pair = 0; pair < 4; ++pair) {
            const uint8x16_t packed = vld1q_u8(scales + b * stride + pair * 16);
            ivec even[NT], odd[NT];
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                const int32x2_t both = vld1_s32(starts[t] + 2 * pair);
                even[t] = vdupq_lane_s32(both, 0), odd[t] = vdupq_lane_s32(both, 1);
            }
            group(2 * pair, vaddq_u8(vandq_u8(packed, nibble), one), even);
            group(2 * pair + 1, vaddq_u8(vshrq_n_u8(packed, 4), one), odd);
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) sum[b][t].part[i] =
            acc[t][i];
    }
}

// --- forms of a run

// Words of four bytes from two neighbouring lines, rows 4 i .. 4 i + 3. Row pairs: [line / 2][8][2 rows][8 bytes].
DELTAIC_INLINE void store_form(uint8_t* form, int64_t line, int i, uint8x16_t first, uint8x16_t second) {
    if (kRowPairs) {
        const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
        vst1q_u8(form + line * 64 + i * 32, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
        vst1q_u8(form + line * 64 + i * 32 + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    } else {
        vst1q_u8(form + line * 64 + i * 16, first);
        vst1q_u8(form + line * 64 + 64 + i * 16, second);
    }
}

// One run in the other form. `lines`: 32, or fewer at the end of a block of bf16, where an odd last line stays out.
DELTAIC_INLINE void form_run(Format format, const uint8_t* w, const uint8_t* scales, int64_t lines, uint8_t* form) {
    if (format != Format::int4) {
        const uint8x16_t flip = vdupq_n_u8(format == Format::int8 ? 0x80 : 0);
        for (int64_t line = 0; line + 1 < lines; line += 2) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
                const uint8_t* p = w + line * 64 + i * 16;
                store_form(form, line, i, veorq_u8(vld1q_u8(p), flip), veorq_u8(vld1q_u8(p + 64), flip));
            }
        return;
    }
    const uint8x16_t nibble = vdupq_n_u8(15), one = vdupq_n_u8(1);
    for (int g = 0; g < 8; ++g) {
        const uint8x16_t packed = vld1q_u8(scales + g / 2 * 16);
        const uint8x16_t s = vaddq_u8(g % 2 ? vshrq_n_u8(packed, 4) : vandq_u8(packed, nibble), one);
        const uint16x8_t twice[2] = {vreinterpretq_u16_u8(vzip1q_u8(s, s)), vreinterpretq_u16_u8(vzip2q_u8(s, s))};
        DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {  // (nibble - 8) s = nibble s - 8 s, in bytes
            const uint16x8_t half = twice[i / 2];
            const uint8x16_t by = vreinterpretq_u8_u16(i % 2 ? vzip2q_u16(half, half) : vzip1q_u16(half, half));
            const uint8x16_t offset = vshlq_n_u8(by, 3);
            DELTAIC_UNROLL for (int line = 0; line < 2; ++line) {
                const uint8x16_t both = vld1q_u8(w + g * 128 + line * 64 + i * 16);
                store_form(form, g * 4 + line * 2, i, vsubq_u8(vmulq_u8(vandq_u8(both, nibble), by), offset),
                           vsubq_u8(vmulq_u8(vshrq_n_u8(both, 4), by), offset));
            }
        }
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// A sum register of theirs holds two rows of two tokens: [2 rows][2 tokens].
constexpr int kRowPairCount = kBlockRows / 2;

// Eight bytes of tokens 2 p and 2 p + 1, or of the last one twice.
template <int NT>
DELTAIC_INLINE int8x16_t token_pair(const int8_t* p, int pair) {
    const int8_t* first = p + 2 * pair * kWordBytes;
    return vcombine_s8(vld1_s8(first), vld1_s8(2 * pair + 1 < NT ? first + kWordBytes : first));
}

// run_int8 from the form.
template <int NB, int NT>
DELTAIC_INLINE void form_int8(const uint8_t* form, int64_t stride, const int8_t* q, i32x16 (&sum)[NB][NT]) {
    constexpr int P = (NT + 1) / 2;
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        ivec acc[kRowPairCount][P];
        DELTAIC_UNROLL for (int r = 0; r < kRowPairCount; ++r) DELTAIC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] =
            i_set1(0);
        for (int64_t k = 0; k < kRun; k += 8) {
            int8x16_t a[P];
            DELTAIC_UNROLL for (int p = 0; p < P; ++p) a[p] = token_pair<NT>(q + k, p);
            DELTAIC_UNROLL for (int r = 0; r < kRowPairCount; ++r) {
                const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(form + b * stride + k * 16 + r * 16));
                DELTAIC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = vmmlaq_s32(acc[r][p], w, a[p]);
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
            const ivec low = acc[2 * i][t / 2], high = acc[2 * i + 1][t / 2];
            sum[b][t].part[i] = t % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high);
        }
    }
}

// chunk_bf16 from the form, for an even number of lines. bfmmla adds two pairs one after the other, as bfdot would.
template <int NB, int NT>
DELTAIC_INLINE void form_bf16(const uint8_t* form, int64_t stride, int64_t lines, const uint16_t* numbers,
                              f32x16 (&sum)[NB][NT]) {
    constexpr int P = (NT + 1) / 2;
    const int8_t* q = reinterpret_cast<const int8_t*>(numbers);
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
        vec acc[kRowPairCount][P];
        DELTAIC_UNROLL for (int p = 0; p < P; ++p) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
            const vec even = sum[b][2 * p].part[i],
                      odd = 2 * p + 1 < NT ? sum[b][2 * p + 1 < NT ? 2 * p + 1 : 0].part[i] : even;
            acc[2 * i][p] = vzip1q_f32(even, odd), acc[2 * i + 1][p] = vzip2q_f32(even, odd);
        }
        for (int64_t line = 0; line < lines; line += 2) {
            bfloat16x8_t a[P];
            DELTAIC_UNROLL for (int p = 0; p < P; ++p) a[p] = vreinterpretq_bf16_s8(token_pair<NT>(q + line * 4, p));
            DELTAIC_UNROLL for (int r = 0; r < kRowPairCount; ++r) {
                const bfloat16x8_t w = vreinterpretq_bf16_u8(vld1q_u8(form + b * stride + line * 64 + r * 16));
                DELTAIC_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = vbfmmlaq_f32(acc[r][p], w, a[p]);
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) {
            const vec low = acc[2 * i][t / 2], high = acc[2 * i + 1][t / 2];
            sum[b][t].part[i] = t % 2 ? vuzp2q_f32(low, high) : vuzp1q_f32(low, high);
        }
    }
}
#else
// run_int8 from the form.
template <int NB, int NT>
DELTAIC_INLINE void form_int8(const uint8_t* form, int64_t stride, const int8_t* q, i32x16 (&sum)[NB][NT]) {
    constexpr int Parts = NT > kWholeTokens ? kParts / 2 : kParts;
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int i0 = 0; i0 < kParts; i0 += Parts) {
        RowSums acc[NT][Parts];
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) acc[t][i] =
            RowSums(i_set1(0));
        for (int quads = 0; quads < 8; ++quads) {
            const int8_t* p = reinterpret_cast<const int8_t*>(form) + b * stride + quads * 256 + i0 * 16;
            int8x16_t a[NT];
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) a[t] = vld1q_s8(q + t * kWordBytes + quads * 16);
            DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
                const int8x16_t first = vld1q_s8(p + 16 * i), second = vld1q_s8(p + 64 + 16 * i);
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[t][i].template add<0>(first, second, a[t]);
            }
            DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) {
                const int8x16_t first = vld1q_s8(p + 128 + 16 * i), second = vld1q_s8(p + 192 + 16 * i);
                DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[t][i].template add<2>(first, second, a[t]);
            }
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int i = 0; i < Parts; ++i) sum[b][t]
            .part[i0 + i] = acc[t][i].total();
    }
}
template <int NB, int NT>
DELTAIC_INLINE void form_bf16(const uint8_t*, int64_t, int64_t, const uint16_t*, f32x16 (&)[NB][NT]) {}
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
