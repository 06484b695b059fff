// Matrix products on packed weights: the inner loops that linear, swiglu, moe and the vision tower share.
// Every output is one sum over k = 0..K-1 in that order, for one token or many, so a token's result does not depend on how many
// others it is computed with.
#pragma once

#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

// acc[b][t] += sum_k w[b * block_stride + k * k_stride + (0..15)] * x[t * x_stride + k]
template <int NB, int NT>
DELTAIC_INLINE void tile_f32(const float* w, int64_t block_stride, int64_t k_stride, const float* x, int64_t x_stride, int64_t K,
                             f32x16 (&acc)[NB][NT]) {
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
            if (NT == 1) prefetch(p + 2048);
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

template <int NB, int NT, class Emit>
DELTAIC_INLINE void multiply_tile(Format format, const uint8_t* w, int64_t block_stride, const float* x, int64_t x_stride, int64_t K,
                                  int64_t first_token, const Emit& emit) {
    f32x16 acc[NB][NT];
    for (int b = 0; b < NB; ++b)
        for (int t = 0; t < NT; ++t) acc[b][t] = zero();
    const float* xt = x + first_token * x_stride;
    if (format == Format::f32) {
        tile_f32<NB, NT>(reinterpret_cast<const float*>(w), block_stride / 4, 16, xt, x_stride, K, acc);
    } else {
        tile_bf16<NB, NT>(w, block_stride, xt, x_stride, K, acc);
    }
    for (int t = 0; t < NT; ++t) emit(first_token + t, acc[0][t], NB == 2 ? acc[NB - 1][t] : zero());
}

// Products of one block (NB = 1) or two neighbouring blocks (NB = 2) of 16 rows with tokens [begin, end):
// emit(token, sums of block 0, sums of block 1).
template <int NB, class Emit>
DELTAIC_INLINE void multiply_blocks(Format format, const uint8_t* w, int64_t K, const float* x, int64_t x_stride, int64_t begin,
                                    int64_t end, const Emit& emit) {
    const int64_t stride = block_bytes(format, K);
    int64_t t = begin;
    if constexpr (kTileTokens >= 12) {
        for (; t + 12 <= end; t += 12) multiply_tile<NB, 12>(format, w, stride, x, x_stride, K, t, emit);
        for (; t + 6 <= end; t += 6) multiply_tile<NB, 6>(format, w, stride, x, x_stride, K, t, emit);
    }
    if constexpr (kTileTokens >= 2) {
        for (; t + 2 <= end; t += 2) multiply_tile<NB, 2>(format, w, stride, x, x_stride, K, t, emit);
    }
    for (; t < end; ++t) multiply_tile<NB, 1>(format, w, stride, x, x_stride, K, t, emit);
}

// Tokens whose activations stay in the second-level cache while many row blocks pass over them.
DELTAIC_INLINE int64_t panel_tokens(int64_t K) { return max64(24, (int64_t{1} << 17) / max64(K, 1) / 12 * 12); }

// Multiplies blocks of one expert of a matrix with T tokens, over pairs of blocks [first_pair, last_pair) counted through all
// segments: emit(segment, pair within the segment, token, sums of the even block, sums of the odd block).
template <class Emit>
DELTAIC_INLINE void multiply_pairs(const Weight& w, int64_t expert, int64_t first_pair, int64_t last_pair, const float* x, int64_t T,
                                   const Emit& emit) {
    const int64_t K = w.columns, panel = panel_tokens(K);
    for (int64_t begin = 0; begin < T; begin += panel) {
        const int64_t end = min64(begin + panel, T);
        int64_t before = 0;
        for (int s = 0; s < w.segments; ++s) {
            const Segment& g = w.segment[s];
            const int64_t pairs = ceil_div(g.blocks, 2);
            for (int64_t p = max64(first_pair - before, 0); p < min64(last_pair - before, pairs); ++p) {
                const uint8_t* block = w.block(s, expert, 2 * p);
                const auto forward = [&](int64_t t, f32x16 even, f32x16 odd) { emit(s, p, t, even, odd); };
                if (2 * p + 1 < g.blocks) {
                    multiply_blocks<2>(g.format, block, K, x, K, begin, end, forward);
                } else {
                    multiply_blocks<1>(g.format, block, K, x, K, begin, end, forward);
                }
            }
            before += pairs;
        }
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

// Rows of `x` after the optional norm, in scratch memory; x itself where there is no norm.
const float* normalised(View x, View norm, float eps);

}  // namespace DELTAIC_ISA
}  // namespace deltaic
