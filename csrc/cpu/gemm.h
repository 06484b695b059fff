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
        DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
            f32x16 line = load(w + b * block_stride + k * k_stride);  // kept by itself: of an array, on the stack
            if (NT == 2 || NT == 3) DELTAIC_UNROLL for (int i = 0; i < kParts; ++i) keep(line.part[i]);
            wk[b] = line;
        }
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
            const f32x16 xk = set1(x[t * x_stride + k]);
            DELTAIC_UNROLL for (int b = 0; b < NB; ++b) acc[b][t] = fma(wk[b], xk, acc[b][t]);
        }
    }
}

// The same for bfloat16 pairs: w [K/2][16][2], block_stride in bytes.
template <int NB, int NT>
DELTAIC_INLINE void tile_bf16(const uint8_t* w, int64_t block_stride, const float* x, int64_t x_stride, int64_t K,
                              f32x16 (&acc)[NB][NT]) {
    for (int64_t k = 0; k + 1 < K; k += 2) {
        DELTAIC_UNROLL for (int half = 0; half < 2; ++half) {
            f32x16 wk[NB];
            DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
                const uint8_t* p = w + b * block_stride + k * 32;
                if (NT <= 8 && half == 0) prefetch_far(p + 1024);
                wk[b] = half ? load_pair_second(p) : load_pair_first(p);
            }
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                const f32x16 xk = set1(x[t * x_stride + k + half]);
                DELTAIC_UNROLL for (int b = 0; b < NB; ++b) acc[b][t] = fma(wk[b], xk, acc[b][t]);
            }
        }
    }
    if (K & 1) {
        DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
            const f32x16 last = load_pair_first(w + b * block_stride + (K - 1) * 32);
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[b][t] = fma(last, set1(x[t * x_stride + K - 1]), acc[b][t]);
        }
    }
}

// Blocks that multiply_blocks takes at a time: their runs fit the first-level cache together.
constexpr int64_t kGroupBlocks = 4;

// Register tiles of many tokens: their blocks, and the runs that they go through before their sums are put down. With
// 32 wide registers there is room for the sums of two blocks as floats beside those of a run as integers, or for those
// of four blocks of bf16; the weights take no more than half of the first-level cache.
DELTAIC_INLINE constexpr int tile_blocks(Format format) { return kParts > 1 ? 1 : format == Format::bf16 ? 4 : 2; }
constexpr int64_t kTileRuns = kParts == 1 ? 4 : 1;

// How a segment is multiplied with T tokens. The choice does not change a bit of the result.
struct Product {
    Format format;  // of the blocks: as they lie in memory, or f32 if they are expanded into scratch memory first
    bool words;     // with activations in words of several numbers (int8, or bfloat16 pairs), run after run
};
DELTAIC_INLINE Product product_of(const Weight& w, Format stored, int64_t T) {
    const bool integers = stored == Format::int8 || stored == Format::int4;
    if (!w.float_activations && (integers || (stored == Format::bf16 && kBf16Dot))) return {stored, true};
    const bool narrow = kParts > 1 && T >= 24;  // few registers: bf16 is worth taking apart once for all tokens
    return {integers || (stored == Format::bf16 && narrow) ? Format::f32 : stored, false};
}

DELTAIC_INLINE Forms wanted_forms(const Weight& w) {
    Forms forms;
    for (int s = 0; s < w.segments; ++s) {
        const Product product = product_of(w, w.segment[s].format, 1);
        if (product.words) (product.format == Format::bf16 ? forms.halves : forms.integers) = true;
    }
    return forms;
}

// Tokens whose activations (and sums) stay in the second-level cache while many row blocks pass over them; a run of
// words must meet enough of them to be worth expanding.
DELTAIC_INLINE int64_t panel_tokens(Product product, int64_t K) {
    const int64_t row = (product.format == Format::bf16 ? 2 : 1) * max64(K, 1);
    if (product.words) return min64(516, max64(96, (int64_t{3} << 17) / row / 12 * 12));
    return max64(24, (int64_t{1} << 17) / max64(K, 1) / 12 * 12);
}

// Bytes of work space that one thread needs to multiply with T tokens: sums, and weights on their way to another form.
DELTAIC_INLINE int64_t work_bytes(const Weight& w, int64_t T) {
    int64_t bytes = 0;
    for (int s = 0; s < w.segments; ++s) {
        const Product product = product_of(w, w.segment[s].format, T);
        const int64_t sums = min64(round_up(T, 12), panel_tokens(product, w.columns)) * kSumStride * 4;
        int64_t form = 0;
        if (product.format != w.segment[s].format) form = 2 * block_bytes(product.format, w.columns);
        if (product.words && has_form(product.format) && T > few_tokens(product.format))
            form = tile_blocks(product.format) * kTileRuns * kFormBytes;
        bytes = max64(bytes, sums + form);
    }
    return round_up(bytes, 64);
}

// Where the caller will write what becomes of the sums: `pair_bytes` of each pair of blocks, from token to token
// `row_bytes` apart. Called into the cache while the last of the sums are computed. Null: nowhere far.
struct Destination {
    uint8_t* data = nullptr;
    int64_t row_bytes = 0, pair_bytes = 0;
    DELTAIC_INLINE Destination at(int64_t token, int64_t pair) const {
        return data ? Destination{data + token * row_bytes + pair * pair_bytes, row_bytes, pair_bytes} : Destination{};
    }
};
// Of rows of `width` floats, `floats` of them from each pair.
DELTAIC_INLINE Destination rows_of(View y, int64_t width, int64_t floats) { return {y.u8(), width * 4, floats * 4}; }

// sums [T][kSumStride]: the 16 sums of each of `blocks` neighbouring blocks (at most kGroupBlocks; at most 2 unless
// product.words), `stride` bytes apart, with every row of `a`. `form` is work space for weights. Compiled once: the
// callers differ only in what they do with the sums.
void multiply_blocks(Product product, int64_t blocks, const uint8_t* w, int64_t stride, const Activations& a,
                     float* sums, uint8_t* form, Destination target);

// One block of another format as one of format f32.
void expand_block(Format stored, const uint8_t* w, int64_t K, float* out);

// Multiplies blocks of one expert of a matrix with all rows of `a`, over pairs of blocks [first_pair, last_pair)
// counted through all segments: emit(segment, pair within the segment, token, sums of the even block, sums of the odd
// block). `work` has work_bytes(w, a.T) bytes that belong to this thread.
template <class Emit>
DELTAIC_INLINE void multiply_pairs(const Weight& w, int64_t expert, int64_t first_pair, int64_t last_pair,
                                   const Activations& a, uint8_t* work, Destination target, const Emit& emit) {
    int64_t before = 0;
    for (int s = 0; s < w.segments; ++s) {
        const Segment& g = w.segment[s];
        const int64_t pairs = ceil_div(g.blocks, 2);
        const Product product = product_of(w, g.format, a.T);
        const Format format = product.format;
        const int64_t stride = block_bytes(format, a.K), most = panel_tokens(product, a.K);
        const int64_t panel = min64(most, round_up(ceil_div(a.T, max64(ceil_div(a.T, most), 1)), 12));  // of like size
        const int64_t together = product.words ? kGroupBlocks / 2 : 1;
        const int64_t last = min64(last_pair - before, pairs);
        float* const sums = reinterpret_cast<float*>(work);
        uint8_t* const form = work + panel * kSumStride * 4;
        for (int64_t begin = 0; begin < a.T; begin += panel) {
            const int64_t count = min64(panel, a.T - begin);
            for (int64_t p = max64(first_pair - before, 0); p < last; p += together) {
                const int64_t blocks = min64(2 * min64(together, last - p), g.blocks - 2 * p);
                const uint8_t* block = w.block(s, expert, 2 * p);
                if (format != g.format) {
                    for (int64_t b = 0; b < blocks; ++b)
                        expand_block(g.format, w.block(s, expert, 2 * p + b), a.K,
                                     reinterpret_cast<float*>(form + b * stride));
                    block = form;
                }
                multiply_blocks(product, blocks, block, stride, a.rows(begin, count), sums, form,
                                target.at(begin, before + p));
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t b = 0; b < blocks; b += 2) {
                        const float* both = sums + i * kSumStride + b * 16;
                        emit(s, p + b / 2, begin + i, load(both), b + 1 < blocks ? load(both + 16) : zero());
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

// Whether the weights of a product with T tokens are in the caches and quickly read: then they are not cut into more
// portions than there are threads, so that each finds its own in its own cache.
DELTAIC_INLINE bool in_caches(int64_t bytes, int64_t T) { return bytes < int64_t{1} << 20 && T <= 8; }

// Pairs that a thread takes at least: about 32 KiB of weights, but at least four portions for each thread. A few tokens
// share what is read.
DELTAIC_INLINE int64_t pair_grain(const Weight& w, int64_t pairs, int64_t T, int threads) {
    const int64_t bytes = 2 * block_bytes(w.segment[0].format, w.columns);
    const int64_t grain = in_caches(bytes * pairs, T)
                              ? round_up(ceil_div(pairs, threads), 2)
                              : max64(1, min64((int64_t{1} << 15) / max64(bytes, 1), pairs / (4 * threads)));
    return grain_for(bytes * pairs * ceil_div(T, 4), pairs, grain > 1 ? grain / 2 * 2 : 1);
}

// multiply_pairs over a whole matrix, on all threads. Many tokens are cut into slices, so that a thread multiplies rows
// that it wrote itself; a slice must have tokens enough to be worth reading the weights once more.
template <class Emit>
DELTAIC_INLINE void multiply_all(const Weight& w, const Activations& a, Destination target, const Emit& emit) {
    const int threads = thread_count();
    const int64_t pairs = count_pairs(w), T = a.T;
    const int64_t slices = max64(1, min64(threads, T / 96));
    const int64_t slice = slices > 1 ? round_up(ceil_div(T, slices), 6) : T, room = work_bytes(w, slice);
    uint8_t* const work = static_cast<uint8_t*>(scratch(static_cast<size_t>(room * threads)));
    const int64_t grain = T > 8 ? min64(2, pairs) : pair_grain(w, pairs, T, threads);
    parallel_for(ceil_div(T, max64(slice, 1)) * pairs, grain, [&](int64_t begin, int64_t end, int thread) {
        while (begin < end) {
            const int64_t t = begin / pairs * slice, first = begin % pairs, last = min64(pairs, first + end - begin);
            multiply_pairs(
                w, 0, first, last, a.rows(t, min64(slice, T - t)), work + thread * room, target.at(t, 0),
                [&](int s, int64_t pair, int64_t i, f32x16 even, f32x16 odd) { emit(s, pair, t + i, even, odd); });
            begin += last - first;
        }
    });
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

// Rows of x [T, K] after the optional norm, and in the other forms that a product wants. In scratch memory (or x
// itself).
Activations prepare(const float* x, int64_t T, int64_t K, View norm, float eps, Forms forms);

// The operator (linear.cpp).
void linear(View x, const Weight& w, View norm, float eps, View bias, int64_t activation, View residual, View y);

}  // namespace DELTAIC_ISA
}  // namespace deltaic
