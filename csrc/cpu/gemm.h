// Matrix products on packed weights: the inner loops that linear, swiglu, moe and the vision tower share.
// Every output is one sum over k = 0..K-1 in that order, for one token or many, so a token's result does not depend on
// how many others it is computed with.
#pragma once

#include "cpu/quant.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

// acc[b][t] += sum_k w[b * block_stride + k * k_stride + (0..15)] * x[t * x_stride + k]
template <int NB, int NT>
DELTAIC_INLINE void tile_f32(const float* w, int64_t block_stride, int64_t k_stride, const float* x, int64_t x_stride,
                             int64_t K, f32x16 (&acc)[NB][NT]) {
    for (int64_t k = 0; k < K; ++k) {
        f32x16 wk[NB];
        for (int b = 0; b < NB; ++b) wk[b] = load(w + b * block_stride + k * k_stride);
        for (int t = 0; t < NT; ++t) {
            const f32x16 xk = set1(x[t * x_stride + k]);
            for (int b = 0; b < NB; ++b) acc[b][t] = fma(wk[b], xk, acc[b][t]);
        }
    }
}

// The same for bfloat16 pairs: w [K/2][16][2], block_stride in bytes.
template <int NB, int NT>
DELTAIC_INLINE void tile_bf16(const uint8_t* w, int64_t block_stride, const float* x, int64_t x_stride, int64_t K,
                              f32x16 (&acc)[NB][NT]) {
    for (int64_t k = 0; k + 1 < K; k += 2) {
        f32x16 first[NB], second[NB];
        for (int b = 0; b < NB; ++b) {
            const uint8_t* p = w + b * block_stride + k * 32;
            if (NT == 1) prefetch_far(p + NB * block_stride);  // the same place in the next blocks
            first[b] = load_pair_first(p);
            second[b] = load_pair_second(p);
        }
        for (int t = 0; t < NT; ++t) {
            const f32x16 x0 = set1(x[t * x_stride + k]), x1 = set1(x[t * x_stride + k + 1]);
            for (int b = 0; b < NB; ++b) acc[b][t] = fma(second[b], x1, fma(first[b], x0, acc[b][t]));
        }
    }
    if (K & 1) {
        for (int b = 0; b < NB; ++b) {
            const f32x16 last = load_pair_first(w + b * block_stride + (K - 1) * 32);
            for (int t = 0; t < NT; ++t) acc[b][t] = fma(last, set1(x[t * x_stride + K - 1]), acc[b][t]);
        }
    }
}

// Products of `blocks` (1 or 2) neighbouring blocks of 16 rows, `stride` bytes apart, with every row of `a`: out
// [T][32], the 16 sums of the first block and then those of the second. Compiled once: the callers differ only in what
// they do with the sums.
void multiply_blocks(Format format, int blocks, const uint8_t* w, int64_t stride, const Activations& a, float* out);

// From this many tokens on it pays to expand int4 blocks to int8 once per panel.
constexpr int64_t kExpandTokens = 8;

// How the blocks of a segment are read: as they lie in memory, or expanded into scratch memory first.
DELTAIC_INLINE Format working_format(const Weight& w, Format stored, int64_t T) {
    if (stored != Format::int8 && stored != Format::int4) return stored;
    if (w.float_activations) return Format::f32;
    return stored == Format::int4 && T >= kExpandTokens && kBias != 0 ? Format::int8 : stored;
}

// Scratch bytes that one thread needs to expand a pair of blocks.
DELTAIC_INLINE int64_t expand_bytes(const Weight& w, int64_t T) {
    int64_t bytes = 0;
    for (int s = 0; s < w.segments; ++s) {
        const Format format = working_format(w, w.segment[s].format, T);
        if (format != w.segment[s].format) bytes = max64(bytes, 2 * block_bytes(format, w.columns));
    }
    return bytes;
}

// One block of format `stored` as one of format `working`.
void expand_block(Format stored, Format working, const uint8_t* w, int64_t K, uint8_t* out);

// Tokens whose activations stay in the second-level cache while many row blocks pass over them.
DELTAIC_INLINE int64_t panel_tokens(Format format, int64_t K) {
    const int64_t bytes = (format == Format::int8 || format == Format::int4 ? 1 : 4) * max64(K, 1);
    return max64(24, (int64_t{1} << 19) / bytes / 12 * 12);
}

constexpr int64_t kSumTokens = 48;  // rows of sums that wait in the first-level cache for the caller

// Multiplies blocks of one expert of a matrix with all rows of `a`, over pairs of blocks [first_pair, last_pair)
// counted through all segments: emit(segment, pair within the segment, token, sums of the even block, sums of the odd
// block). `expanded` has expand_bytes(w, a.T) bytes that belong to this thread.
template <class Emit>
DELTAIC_INLINE void multiply_pairs(const Weight& w, int64_t expert, int64_t first_pair, int64_t last_pair,
                                   const Activations& a, uint8_t* expanded, const Emit& emit) {
    int64_t before = 0;
    for (int s = 0; s < w.segments; ++s) {
        const Segment& g = w.segment[s];
        const int64_t pairs = ceil_div(g.blocks, 2);
        const Format format = working_format(w, g.format, a.T);
        const int64_t stride = block_bytes(format, a.K), panel = panel_tokens(format, a.K);
        for (int64_t begin = 0; begin < a.T; begin += panel) {
            const int64_t end = min64(begin + panel, a.T);
            for (int64_t p = max64(first_pair - before, 0); p < min64(last_pair - before, pairs); ++p) {
                const uint8_t* block = w.block(s, expert, 2 * p);
                const bool both = 2 * p + 1 < g.blocks;
                if (format != g.format) {
                    for (int b = 0; b <= (both ? 1 : 0); ++b)
                        expand_block(g.format, format, w.block(s, expert, 2 * p + b), a.K, expanded + b * stride);
                    block = expanded;
                }
                alignas(64) float sums[kSumTokens * 32];
                for (int64_t t = begin; t < end; t += kSumTokens) {
                    const int64_t count = min64(kSumTokens, end - t);
                    multiply_blocks(format, both ? 2 : 1, block, stride, a.rows(t, count), sums);
                    for (int64_t i = 0; i < count; ++i)
                        emit(s, p, t + i, load(sums + i * 32), load(sums + i * 32 + 16));
                }
            }
        }
        before += pairs;
    }
}

DELTAIC_INLINE int64_t count_pairs(const Weight& w) {
    int64_t pairs = 0;
    for (int s = 0; s < w.segments; ++s) pairs += ceil_div(w.segment[s].blocks, 2);
    return pairs;
}

// Pairs that a thread takes at a time: about 256 KiB of weights, but at least four portions for each thread.
DELTAIC_INLINE int64_t pair_grain(const Weight& w, int64_t pairs, int threads) {
    const int64_t bytes = 2 * block_bytes(w.segment[0].format, w.columns);
    return max64(1, min64((int64_t{1} << 18) / max64(bytes, 1), pairs / (4 * threads)));
}

// y[t] = (1 + weight) * x[t] / sqrt(mean(x[t]^2) + eps), one row
DELTAIC_INLINE void rms_norm_row(const float* x, const float* weight, int64_t D, float eps, float* y) {
    f32x16 squares = zero();
    for (int64_t i = 0; i < D; i += 16) {
        const f32x16 v = load_n(x + i, D - i);
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(reduce_add(squares) / static_cast<float>(D) + eps);
    for (int64_t i = 0; i < D; i += 16) {
        const f32x16 w = add(set1(1.0f), load_n(weight + i, D - i));
        store_n(y + i, mul(mul(load_n(x + i, D - i), set1(scale)), w), D - i);
    }
}

DELTAIC_INLINE bool wants_integers(const Weight& w) {
    for (int s = 0; s < w.segments; ++s)
        if (!w.float_activations && (w.segment[s].format == Format::int8 || w.segment[s].format == Format::int4))
            return true;
    return false;
}

// Rows of x [T, K] after the optional norm, and their int8 form if a product wants it. In scratch memory (or x itself).
Activations prepare(const float* x, int64_t T, int64_t K, View norm, float eps, bool integers);

}  // namespace DELTAIC_ISA
}  // namespace deltaic
