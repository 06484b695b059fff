// Attention of many query rows, one block of keys after another with a running maximum (FlashAttention, Dao et al.
// 2022): what gated_attention (prefill) and vision_attention share.
//
// Keys and values come packed in blocks of 16 lanes, so that both products are the tile of cpu/gemm.h without a
// horizontal sum:
//   keys    [keys / 16][D][16]     lanes are 16 neighbouring keys
//   values  [D / 16][keys][16]     lanes are 16 neighbouring dimensions, zero past D
// A row's blocks are fixed by the key index alone and every sum runs in key order, so what a row gets does not depend
// on which other rows share its tile.
#pragma once

#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

// Register tile: blocks of 16 lanes x query rows.
constexpr int kFlashBlocks = kTileTokens >= 12 ? 2 : 1;
constexpr int kFlashRows = kTileTokens >= 12 ? 12 : kTileTokens >= 2 ? 6 : 2;
constexpr int64_t kFlashKeys =
    128;  // keys in one step: packed keys and values of 256 dimensions fit the second-level cache

struct FlashTile {
    int64_t rows, padded;  // query rows, and rounded up to kFlashRows
    int64_t D, dims;       // head width, and rounded up to 16
    const float* q;        // [padded][D], scaled by 1/sqrt(D)
    float* scores;         // [padded][kFlashKeys]
    float* out;            // [padded][dims], to be divided by `total`
    float* highest;        // [padded], largest score so far
    float* total;          // [padded], sum of exp(score - highest)
};

// Floats of memory that a tile of up to `rows` rows works in.
DELTAIC_INLINE int64_t flash_floats(int64_t rows, int64_t D) {
    return round_up(rows, kFlashRows) * (kFlashKeys + round_up(D, 16) + 2);
}

DELTAIC_INLINE FlashTile flash_begin(const float* q, int64_t rows, int64_t D, float* memory) {
    FlashTile t;
    t.rows = rows, t.padded = round_up(rows, kFlashRows);
    t.D = D, t.dims = round_up(D, 16);
    t.q = q;
    t.scores = memory;
    t.out = t.scores + t.padded * kFlashKeys;
    t.highest = t.out + t.padded * t.dims;
    t.total = t.highest + t.padded;
    for (int64_t i = 0; i < t.padded * t.dims; ++i) t.out[i] = 0.0f;
    for (int64_t i = 0; i < t.padded; ++i) t.highest[i] = -INFINITY, t.total[i] = 0.0f;
    return t;
}

template <int NB>
DELTAIC_INLINE void flash_scores(const FlashTile& t, const float* keys, int64_t block) {
    const int64_t stride = t.D * 16;
    for (int64_t r = 0; r < t.padded; r += kFlashRows) {
        f32x16 acc[NB][kFlashRows];
        for (int b = 0; b < NB; ++b)
            for (int i = 0; i < kFlashRows; ++i) acc[b][i] = zero();
        tile_f32<NB, kFlashRows>(keys + block * stride, stride, 16, t.q + r * t.D, t.D, t.D, acc);
        for (int i = 0; i < kFlashRows; ++i)
            for (int b = 0; b < NB; ++b) store(t.scores + (r + i) * kFlashKeys + (block + b) * 16, acc[b][i]);
    }
}

template <int NB>
DELTAIC_INLINE void flash_values(const FlashTile& t, const float* values, int64_t stride, int64_t keys, int64_t block) {
    for (int64_t r = 0; r < t.padded; r += kFlashRows) {
        float* out = t.out + r * t.dims + block * 16;
        f32x16 acc[NB][kFlashRows];
        for (int b = 0; b < NB; ++b)
            for (int i = 0; i < kFlashRows; ++i) acc[b][i] = load(out + i * t.dims + b * 16);
        tile_f32<NB, kFlashRows>(values + block * stride, stride, 16, t.scores + r * kFlashKeys, kFlashKeys, keys, acc);
        for (int i = 0; i < kFlashRows; ++i)
            for (int b = 0; b < NB; ++b) store(out + i * t.dims + b * 16, acc[b][i]);
    }
}

// The scores of one row, of which the first `visible` count, become exp(score - highest); the others become zero.
DELTAIC_INLINE void flash_softmax(const FlashTile& t, int64_t row, int64_t visible, int64_t keys) {
    float* s = t.scores + row * kFlashKeys;
    const int64_t end = round_up(keys, 16);
    for (int64_t i = visible; i < end; ++i) s[i] = -INFINITY;
    f32x16 most = load(s);
    for (int64_t i = 16; i < visible; i += 16) most = max(most, load(s + i));
    const float before = t.highest[row], now = reduce_max(most);
    const float highest = now > before ? now : before;
    f32x16 sum = zero();
    for (int64_t i = 0; i < end; i += 16) {
        if (i >= visible) {
            store(s + i, zero());
            continue;
        }
        store(s + i, exp(sub(load(s + i), set1(highest))));
        for (int64_t j = visible; j < i + 16; ++j) s[j] = 0.0f;  // exp clamps, so -inf does not become zero by itself
        sum = add(sum, load(s + i));
    }
    if (highest != before) {
        float lanes[16];
        store(lanes, exp(set1(before - highest)));
        const f32x16 scale = set1(lanes[0]);
        float* out = t.out + row * t.dims;
        for (int64_t d = 0; d < t.dims; d += 16) store(out + d, mul(load(out + d), scale));
        t.total[row] *= lanes[0];
    }
    t.highest[row] = highest;
    t.total[row] += reduce_add(sum);
}

// Adds a block of up to kFlashKeys keys; visible(row) of them, 0..keys, are seen by a row. `stride`: floats between two
// blocks of 16 dimensions of the values.
template <class Visible>
DELTAIC_INLINE void flash_keys(const FlashTile& t, const float* keys_packed, const float* values, int64_t stride,
                               int64_t keys, const Visible& visible) {
    const int64_t key_blocks = ceil_div(keys, 16), value_blocks = t.dims / 16;
    int64_t b = 0;
    for (; b + kFlashBlocks <= key_blocks; b += kFlashBlocks) flash_scores<kFlashBlocks>(t, keys_packed, b);
    for (; b < key_blocks; ++b) flash_scores<1>(t, keys_packed, b);
    for (int64_t r = 0; r < t.padded; ++r) {
        const int64_t seen = r < t.rows ? visible(r) : 0;
        if (seen > 0) {
            flash_softmax(t, r, seen, keys);
        } else {
            for (int64_t i = 0; i < keys; ++i) t.scores[r * kFlashKeys + i] = 0.0f;
        }
    }
    b = 0;
    for (; b + kFlashBlocks <= value_blocks; b += kFlashBlocks) flash_values<kFlashBlocks>(t, values, stride, keys, b);
    for (; b < value_blocks; ++b) flash_values<1>(t, values, stride, keys, b);
}

// 16 numbers from position d on of a row of D floats, or of D bfloat16 numbers; zero past the end.
template <bool kHalf>
DELTAIC_INLINE f32x16 load_row(const uint8_t* row, int64_t d, int64_t D) {
    if constexpr (kHalf) {
        return load_bf16_n(reinterpret_cast<const uint16_t*>(row) + d, D - d);
    } else {
        return load_n(reinterpret_cast<const float*>(row) + d, D - d);
    }
}

// 16 rows of D numbers -> [D][16].
template <bool kHalf>
DELTAIC_INLINE void pack_keys(const uint8_t* const (&rows)[16], int64_t D, float* packed) {
    for (int64_t d = 0; d < D; d += 16) {
        f32x16 a[16];
        for (int i = 0; i < 16; ++i) a[i] = load_row<kHalf>(rows[i], d, D);
        transpose(a);
        for (int i = 0; i < 16 && d + i < D; ++i) store(packed + (d + i) * 16, a[i]);
    }
}

// The first `count` of 16 rows of D numbers -> [D / 16][count][16] with `stride` floats between blocks.
template <bool kHalf>
DELTAIC_INLINE void pack_values(const uint8_t* const (&rows)[16], int64_t count, int64_t D, int64_t stride,
                                float* packed) {
    for (int64_t d = 0; d < D; d += 16)
        for (int64_t i = 0; i < count; ++i) store(packed + d / 16 * stride + i * 16, load_row<kHalf>(rows[i], d, D));
}

// Rotates x [D] in place, half-split: pairs (x[f], x[f + F]) of the first 2F dimensions.
DELTAIC_INLINE void rotate_row(float* x, const float* cos, const float* sin, int64_t F) {
    for (int64_t f = 0; f < F; f += 16) {
        const int64_t n = F - f;
        const f32x16 c = load_n(cos + f, n), s = load_n(sin + f, n), a = load_n(x + f, n), b = load_n(x + F + f, n);
        store_n(x + f, sub(mul(a, c), mul(b, s)), n);
        store_n(x + F + f, add(mul(b, c), mul(a, s)), n);
    }
}

// Checks that cu_seqlens [n + 1] cuts `total` rows into n runs.
DELTAIC_INLINE bool cuts(View cu_seqlens, int64_t total) {
    const int64_t* cut = cu_seqlens.i64();
    const int64_t n = cu_seqlens.shape[0] - 1;
    if (n < 0 || cut[0] != 0 || cut[n] != total) return false;
    for (int64_t i = 0; i < n; ++i)
        if (cut[i] > cut[i + 1]) return false;
    return true;
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
