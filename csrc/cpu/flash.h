// Attention of many query rows, one block of keys after another with a running maximum (FlashAttention, Dao et al.
// 2022): what gated_attention (prefill) and vision_attention share.
//
// Keys and values come packed in lanes of 32 bits, 16 to a block, so that both products are register tiles without a
// horizontal sum. A lane holds one float, or a pair of bfloat16 numbers that are summed (`kNumbers` = 1 or 2):
//   keys    [keys / 16][D / kNumbers][16]     lanes are 16 neighbouring keys; pairs are neighbouring dimensions
//   values  [D / 16][keys / kNumbers][16]     lanes are 16 neighbouring dimensions, zero past D; pairs are neighbouring
//                                             keys, zero past the last
// A row's blocks are fixed by the key index alone and every sum runs in key order, so what a row gets does not depend
// on which other rows share its tile.
//
// Scores are powers of two, and what is subtracted from them is the highest one rounded up to an integer: rescaling is
// exact, and a probability is rounded to bfloat16 alike whatever the maximum was when its turn came.
#pragma once

#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

// Register tile: blocks of 16 lanes x query rows.
constexpr int kFlashBlocks = kTileTokens >= 12 ? 3 : 1;
constexpr int kFlashRows = kTileTokens >= 12 ? 8 : kTileTokens >= 2 ? 6 : 2;
constexpr float kLog2E = 1.44269504088896341f;

// How numbers lie in memory: rows of keys, values or queries.
enum class Stored { f32, bf16, int8 };
constexpr int64_t stored_bytes(Stored format) {  // of a number, without the scales of int8
    return format == Stored::f32 ? 4 : format == Stored::bf16 ? 2 : 1;
}

DELTAIC_INLINE float load_half(const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    return f16_to_float(bits);
#endif
}

// 16 numbers from position d on of an int8 row (core/view.h), n of them; d is a multiple of 16.
DELTAIC_INLINE f32x16 load_int8(const uint8_t* row, int64_t d, int64_t n) {
    const uint8_t *group = row + d / kKvGroup * (kKvGroup + 2), *values = group + 2 + d % kKvGroup;
    uint8_t some[16];
    if (n < 16) {
        memset(some, 128, sizeof some);
        memcpy(some, values, static_cast<size_t>(max64(n, 0)));
        values = some;
    }
    return mul(sub(to_float(load_u8(values)), set1(128.0f)), set1(load_half(group)));
}

// Stores D floats as an int8 row.
DELTAIC_INLINE void store_int8_row(uint8_t* row, const float* x, int64_t D) {
    for (int64_t first = 0; first < D; first += kKvGroup, row += kKvGroup + 2) {
        const int64_t count = min64(kKvGroup, D - first);
        f32x16 largest = zero();
        for (int64_t d = 0; d < count; d += 16) {
            const f32x16 v = load_n(x + first + d, count - d);
            largest = max(max(v, sub(zero(), v)), largest);  // this operand order keeps a NaN
        }
        float lanes[16], amax = 0.0f;
        store(lanes, largest);
        for (int i = 0; i < 16; ++i) amax = lanes[i] <= amax ? amax : lanes[i];
        const uint16_t half = float_to_f16(amax / 127.0f);
        memcpy(row, &half, 2);
        const float step = f16_to_float(half);
        for (int64_t d = 0; d < count; ++d) {
            // A step of 0, infinity or NaN makes every number of the group what it is; values must only be in range.
            const float value = rintf(x[first + d] / step);
            row[2 + d] = static_cast<uint8_t>((value >= -127.0f ? value <= 127.0f ? value : 127.0f : -127.0f) + 128.0f);
        }
    }
}

// 16 numbers from position d on of a row of D numbers; zero past the end.
template <Stored format>
DELTAIC_INLINE f32x16 load_row(const uint8_t* row, int64_t d, int64_t D) {
    if constexpr (format == Stored::bf16) {
        return load_bf16_n(reinterpret_cast<const uint16_t*>(row) + d, D - d);
    } else if constexpr (format == Stored::int8) {
        return load_int8(row, d, D - d);
    } else {
        return load_n(reinterpret_cast<const float*>(row) + d, D - d);
    }
}

// Products of floats.
struct FloatProducts {
    using Number = float;
    using Vector = f32x16;
    static constexpr int64_t kNumbers = 1;
    static constexpr int64_t kKeys = 128;  // in one step: of 256 dimensions they fit the second-level cache

    template <Stored format>
    static DELTAIC_INLINE Vector load_lanes(const uint8_t* row, int64_t d, int64_t D) {
        return load_row<format>(row, d, D);
    }
    static DELTAIC_INLINE Vector load_lanes(const float* p) { return load(p); }
    static DELTAIC_INLINE Vector set(const float* p) { return set1(*p); }
    static DELTAIC_INLINE f32x16 dot(Vector a, Vector b, f32x16 acc) { return fma(a, b, acc); }
    // Numbers d .. d + 16 * GROUPS - 1 of a value, 16 to a vector.
    template <Stored format, int GROUPS>
    static DELTAIC_INLINE void load_value(const uint8_t* const* rows, bool, int64_t d, int64_t D,
                                          Vector (&value)[GROUPS]) {
        for (int g = 0; g < GROUPS; ++g) value[g] = load_row<format>(rows[0], d + g * 16, D);
    }
    static DELTAIC_INLINE int64_t value_place(int64_t d) { return d; }
    static constexpr int64_t kPlaces = 16;  // so many neighbours lie together

    template <int NB, int NT>
    static DELTAIC_INLINE void tile(const float* w, int64_t block_stride, const float* x, int64_t x_stride,
                                    int64_t lanes, f32x16 (&acc)[NB][NT]) {
        tile_f32<NB, NT>(w, block_stride, 16, x, x_stride, lanes, acc);
    }
    static DELTAIC_INLINE void store_number(float* p, f32x16 a, int64_t n) { store_n(p, a, n); }

    template <Stored format>
    static DELTAIC_INLINE void pack_keys(const uint8_t* const (&rows)[16], int64_t D, float* packed) {
        for (int64_t d = 0; d < D; d += 16) {
            f32x16 a[16];
            for (int i = 0; i < 16; ++i) a[i] = load_row<format>(rows[i], d, D);
            transpose(a);
            for (int i = 0; i < 16 && d + i < D; ++i) store(packed + (d + i) * 16, a[i]);
        }
    }
    template <Stored format>
    static DELTAIC_INLINE void pack_values(const uint8_t* const (&rows)[16], int64_t count, int64_t D, int64_t stride,
                                           float* packed) {
        for (int64_t d = 0; d < D; d += 16)
            for (int64_t i = 0; i < count; ++i)
                store(packed + d / 16 * stride + i * 16, load_row<format>(rows[i], d, D));
    }
};

#if defined(DELTAIC_BF16_PAIRS)
// Products of bfloat16 pairs: whatever is not stored so is rounded.
struct PairProducts {
    using Number = uint16_t;
    using Vector = bf16x32;
    static constexpr int64_t kNumbers = 2;
    static constexpr int64_t kKeys = 256;

    // 32 numbers from position d on of a row of D numbers; zero past the end.
    template <Stored format>
    static DELTAIC_INLINE Vector load_lanes(const uint8_t* row, int64_t d, int64_t D) {
        if constexpr (format == Stored::bf16) {
            return load_pairs_n(reinterpret_cast<const uint16_t*>(row) + d, D - d);
        } else {
            return to_pairs(load_row<format>(row, d, D), D - d > 16 ? load_row<format>(row, d + 16, D) : zero());
        }
    }
    static DELTAIC_INLINE Vector load_lanes(const uint16_t* p) { return load_pairs(p); }
    static DELTAIC_INLINE Vector set(const uint16_t* p) { return set_pair(p); }
    static DELTAIC_INLINE f32x16 dot(Vector a, Vector b, f32x16 acc) { return dot_pairs(a, b, acc); }
    // The same of two neighbouring values, or of one beside zeros, number d in place value_place(d). GROUPS is even.
    template <Stored format, int GROUPS>
    static DELTAIC_INLINE void load_value(const uint8_t* const* rows, bool both, int64_t d, int64_t D,
                                          Vector (&value)[GROUPS]) {
        for (int g = 0; g < GROUPS; g += 2)
            zip(load_lanes<format>(rows[0], d + g * 16, D),
                both ? load_lanes<format>(rows[1], d + g * 16, D) : no_pairs(), value[g], value[g + 1]);
    }
    static DELTAIC_INLINE int64_t value_place(int64_t d) { return d / 32 * 32 + zip_place(d % 32); }
    static constexpr int64_t kPlaces = kZipRun;

    template <int NB, int NT>
    static DELTAIC_INLINE void tile(const float* w, int64_t block_stride, const uint16_t* x, int64_t x_stride,
                                    int64_t lanes, f32x16 (&acc)[NB][NT]) {
        for (int64_t k = 0; k < lanes; ++k) {
            bf16x32 wk[NB];
            DELTAIC_UNROLL for (int b = 0; b < NB; ++b) wk[b] = load_pairs(w + b * block_stride + k * 16);
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) {
                const bf16x32 xk = set_pair(x + t * x_stride + 2 * k);
                DELTAIC_UNROLL for (int b = 0; b < NB; ++b) acc[b][t] = dot_pairs(wk[b], xk, acc[b][t]);
            }
        }
    }
    static DELTAIC_INLINE void store_number(uint16_t* p, f32x16 a, int64_t n) {
        n >= 16 ? store_half(p, a) : store_bf16_n(p, a, n);
    }

    template <Stored format>
    static DELTAIC_INLINE void pack_keys(const uint8_t* const (&rows)[16], int64_t D, float* packed) {
        for (int64_t d = 0; d < D; d += 32) {
            f32x16 a[16];
            for (int i = 0; i < 16; ++i) {
                const bf16x32 pairs = load_lanes<format>(rows[i], d, D);
                for (int part = 0; part < kParts; ++part) a[i].part[part] = as_float(pairs.part[part]);
            }
            transpose(a);
            for (int i = 0; i < 16 && d + 2 * i < D; ++i) store(packed + (d / 2 + i) * 16, a[i]);
        }
    }
    template <Stored format>
    static DELTAIC_INLINE void pack_values(const uint8_t* const (&rows)[16], int64_t count, int64_t D, int64_t stride,
                                           float* packed) {
        for (int64_t d = 0; d < D; d += 32)
            for (int64_t i = 0; i < count; i += 2) {
                bf16x32 low, high;
                interleave(load_lanes<format>(rows[i], d, D),
                           i + 1 < count ? load_lanes<format>(rows[i + 1], d, D) : no_pairs(), low, high);
                store_pairs(packed + d / 16 * stride + i / 2 * 16, low);
                if (D - d > 16) store_pairs(packed + (d / 16 + 1) * stride + i / 2 * 16, high);
            }
    }
};
using HalfProducts = PairProducts;
#else
using HalfProducts = FloatProducts;
#endif

template <class Products>
struct FlashTile {
    using Number = typename Products::Number;
    int64_t rows, padded;  // query rows, and rounded up to kFlashRows
    int64_t D, dims;       // head width, and rounded up to 16
    const Number* q;       // [padded][stride], scaled by log2(e) / sqrt(D); zero from D to a whole lane
    int64_t stride;        // numbers
    float* scores;         // [padded][Products::kKeys]; then a row's probabilities in place of its scores
    float* out;            // [padded][dims], to be divided by `total`
    float* highest;        // [padded], largest score so far, rounded up
    float* total;          // [padded][16], sums of 2^(score - highest), to be added up

    DELTAIC_INLINE Number* probabilities(int64_t row) const {
        return reinterpret_cast<Number*>(scores + row * Products::kKeys);
    }
    static constexpr int64_t kRowNumbers =
        Products::kKeys * Products::kNumbers;  // from one row of `scores` to the next
};

// Floats of memory of a tile of up to `rows` rows: its scores, which are of no use after flash_keys, and its state.
template <class Products>
DELTAIC_INLINE int64_t flash_score_floats(int64_t rows) {
    return round_up(rows, kFlashRows) * Products::kKeys;
}
DELTAIC_INLINE int64_t flash_state_floats(int64_t rows, int64_t D) {
    return round_up(round_up(rows, kFlashRows) * (round_up(D, 16) + 17), 16);
}

template <class Products>
DELTAIC_INLINE FlashTile<Products> flash_tile(const typename Products::Number* q, int64_t stride, int64_t rows,
                                              int64_t D, float* scores, float* state) {
    FlashTile<Products> t;
    t.rows = rows, t.padded = round_up(rows, kFlashRows);
    t.D = D, t.dims = round_up(D, 16);
    t.q = q, t.stride = stride;
    t.scores = scores;
    t.out = state;
    t.total = t.out + t.padded * t.dims;
    t.highest = t.total + t.padded * 16;
    return t;
}
// Before the first keys.
template <class Products>
DELTAIC_INLINE void flash_begin(const FlashTile<Products>& t) {
    for (int64_t i = 0; i < t.padded * (t.dims + 16); i += 16) store(t.out + i, zero());
    for (int64_t i = 0; i < t.padded; ++i) t.highest[i] = -INFINITY;
}

template <int NB, class Products>
DELTAIC_INLINE void flash_scores(const FlashTile<Products>& t, const float* keys, int64_t block) {
    const int64_t lanes = ceil_div(t.D, Products::kNumbers);
    for (int64_t r = 0; r < t.padded; r += kFlashRows) {
        f32x16 acc[NB][kFlashRows];
        for (int b = 0; b < NB; ++b)
            for (int i = 0; i < kFlashRows; ++i) acc[b][i] = zero();
        Products::template tile<NB, kFlashRows>(keys + block * lanes * 16, lanes * 16, t.q + r * t.stride, t.stride,
                                                lanes, acc);
        for (int i = 0; i < kFlashRows; ++i)
            for (int b = 0; b < NB; ++b) store(t.scores + (r + i) * Products::kKeys + (block + b) * 16, acc[b][i]);
    }
}

template <int NB, class Products>
DELTAIC_INLINE void flash_values(const FlashTile<Products>& t, const float* values, int64_t stride, int64_t keys,
                                 int64_t block) {
    for (int64_t r = 0; r < t.padded; r += kFlashRows) {
        float* out = t.out + r * t.dims + block * 16;
        f32x16 acc[NB][kFlashRows];
        for (int b = 0; b < NB; ++b)
            for (int i = 0; i < kFlashRows; ++i) acc[b][i] = load(out + i * t.dims + b * 16);
        Products::template tile<NB, kFlashRows>(values + block * stride, stride, t.probabilities(r), t.kRowNumbers,
                                                ceil_div(keys, Products::kNumbers), acc);
        for (int i = 0; i < kFlashRows; ++i)
            for (int b = 0; b < NB; ++b) store(out + i * t.dims + b * 16, acc[b][i]);
    }
}

// Scores of up to 16 rows, scores [rows][stride], become 2^(score - highest) in their place: of `keys` keys a row sees
// the first seen[row], and gets zeros beyond. `highest` [rows] is raised where a score is higher, and then the row's
// sums, totals [rows][16] and out [rows][dims], are scaled.
template <class Products>
DELTAIC_INLINE void softmax_rows(int64_t rows, float* scores, int64_t stride, int64_t keys, const int64_t* seen,
                                 float* highest, float* totals, float* out, int64_t dims) {
    const int64_t end = round_up(keys, 16);
    f32x16 most[16];
    for (int64_t i = 0; i < 16; ++i) {
        if (i >= rows) {
            most[i] = zero();
            continue;
        }
        float* s = scores + i * stride;
        for (int64_t j = seen[i]; j < end; ++j) s[j] = -INFINITY;
        most[i] = load(s);
        for (int64_t j = 16; j < end; j += 16) most[i] = max(most[i], load(s + j));
    }
    alignas(64) float now[16];
    store(now, reduce_max(most));
    for (int64_t i = 0; i < rows; ++i) {
        const float* s = scores + i * stride;
        typename Products::Number* p = reinterpret_cast<typename Products::Number*>(scores + i * stride);
        if (seen[i] == 0) {  // the highest may be -inf still
            for (int64_t j = 0; j < end; j += 16) Products::store_number(p + j, zero(), 16);
            continue;
        }
        const float before = highest[i], rounded = ceilf(now[i]);
        float* sums = totals + i * 16;
        f32x16 total = load(sums);
        if (!(rounded <= before)) {
            highest[i] = rounded;
            const f32x16 scale = exp2(set1(before - rounded));
            if (before != -INFINITY) {
                float* o = out + i * dims;
                for (int64_t d = 0; d < dims; d += 16) store(o + d, mul(load(o + d), scale));
                total = mul(total, scale);
            }
        }
        const f32x16 most_seen = set1(highest[i]);
        const int64_t whole = seen[i] / 16 * 16;
        for (int64_t j = 0; j < whole; j += 16) {
            const f32x16 e = exp2(sub(load(s + j), most_seen));
            total = add(total, e);
            Products::store_number(p + j, e, 16);
        }
        for (int64_t j = whole; j < end; j += 16) {
            if (j >= seen[i]) {
                Products::store_number(p + j, zero(), 16);
                continue;
            }
            // 2^x need not become zero for -inf
            alignas(64) float lanes[16];
            store(lanes, exp2(sub(load(s + j), most_seen)));
            for (int64_t k = seen[i] - j; k < 16; ++k) lanes[k] = 0.0f;
            total = add(total, load(lanes));
            Products::store_number(p + j, load(lanes), 16);
        }
        store(sums, total);
    }
}

// The scores of kFlashRows rows from `row` on, of which a row sees the first visible(row).
template <class Products, class Visible>
DELTAIC_INLINE void flash_softmax(const FlashTile<Products>& t, int64_t row, int64_t keys, const Visible& visible) {
    int64_t seen[kFlashRows];
    for (int i = 0; i < kFlashRows; ++i) seen[i] = row + i < t.rows ? visible(row + i) : 0;
    softmax_rows<Products>(kFlashRows, t.scores + row * Products::kKeys, Products::kKeys, keys, seen, t.highest + row,
                           t.total + row * 16, t.out + row * t.dims, t.dims);
}

// Adds a block of up to Products::kKeys keys; visible(row) of them, 0..keys, are seen by a row. `stride`: floats
// between two blocks of 16 dimensions of the values.
template <class Products, class Visible>
DELTAIC_INLINE void flash_keys(const FlashTile<Products>& t, const float* keys_packed, const float* values,
                               int64_t stride, int64_t keys, const Visible& visible) {
    const int64_t key_blocks = ceil_div(keys, 16), value_blocks = t.dims / 16;
    int64_t b = 0;
    for (; b + kFlashBlocks <= key_blocks; b += kFlashBlocks) flash_scores<kFlashBlocks>(t, keys_packed, b);
    for (; b < key_blocks; ++b) flash_scores<1>(t, keys_packed, b);
    for (int64_t r = 0; r < t.padded; r += kFlashRows) flash_softmax(t, r, keys, visible);
    b = 0;
    for (; b + kFlashBlocks <= value_blocks; b += kFlashBlocks) flash_values<kFlashBlocks>(t, values, stride, keys, b);
    for (; b < value_blocks; ++b) flash_values<1>(t, values, stride, keys, b);
}

// The sum of a row's exponentials.
template <class Products>
DELTAIC_INLINE float flash_total(const FlashTile<Products>& t, int64_t row) {
    return reduce_add(load(t.total + row * 16));
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
