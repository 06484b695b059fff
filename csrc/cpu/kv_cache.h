// Where the keys and values of one sequence lie, and attention of a few query rows over a run of them.
#pragma once

#include "cpu/flash.h"

namespace deltaic {
namespace DELTAIC_ISA {

// The keys (or values) of one layer and head: row `i` of D numbers, as `Stored`, for token i.
struct CacheRows {
    void* const* blocks;
    int64_t tokens, row_bytes, first_byte;  // tokens of a block; bytes of a row; where the head starts in a block

    DELTAIC_INLINE CacheRows(const BlockTable& table, int64_t layer, int64_t which, int64_t head) {
        const int64_t bytes = table.dtype == Dtype::f32 ? 4 : table.dtype == Dtype::u16 ? 2 : 1;
        blocks = table.blocks;
        tokens = table.tokens;
        row_bytes = table.width * bytes;
        first_byte = table.offset(layer, which, head) * bytes;
    }
    DELTAIC_INLINE uint8_t* row(int64_t i) const {
        return static_cast<uint8_t*>(blocks[i / tokens]) + first_byte + i % tokens * row_bytes;
    }
    // Rows first..first + count - 1 (count 1..16); the last one again up to 16.
    DELTAIC_INLINE void rows(int64_t first, int64_t count, const uint8_t* (&out)[16]) const {
        int64_t block = first / tokens, slot = first % tokens;
        const uint8_t* p = static_cast<const uint8_t*>(blocks[block]) + first_byte + slot * row_bytes;
        for (int64_t i = 0; i < 16; ++i) {
            out[i] = p;
            if (i + 1 >= count) continue;
            p += row_bytes;
            if (++slot == tokens) slot = 0, p = static_cast<const uint8_t*>(blocks[++block]) + first_byte;
        }
    }
};

// The decode path splits the keys of a sequence into pieces whose borders depend on the key index alone: short ones
// first, so that a short context feeds many threads, then long ones, so that partial results stay few.
constexpr int64_t kShortPiece = 256, kShortPieces = 32, kLongPiece = 1024;
DELTAIC_INLINE int64_t piece_begin(int64_t piece) {
    return piece <= kShortPieces ? piece * kShortPiece
                                 : kShortPieces * kShortPiece + (piece - kShortPieces) * kLongPiece;
}
DELTAIC_INLINE int64_t piece_of(int64_t key) {
    constexpr int64_t border = kShortPieces * kShortPiece;
    return key < border ? key / kShortPiece : kShortPieces + (key - border) / kLongPiece;
}

template <int N>
struct Constant {
    static constexpr int value = N;
};
// f(Constant<rows>, first row) for register tiles of 4, 2 and 1 of n query rows.
template <class F>
DELTAIC_INLINE void row_tiles(int64_t n, const F& f) {
    int64_t r = 0;
    for (; r + 4 <= n; r += 4) f(Constant<4>{}, r);
    for (; r + 2 <= n; r += 2) f(Constant<2>{}, r);
    for (; r < n; ++r) f(Constant<1>{}, r);
}

// Register tiles of the decode path: keys x query rows of a dot product; query rows x groups of 16 dimensions of the
// sum.
constexpr int kDotKeys = kTileTokens >= 2 ? 2 : 1;
constexpr int kDotRows = kTileTokens >= 12 ? 4 : 2;
constexpr int kSumGroups = kTileTokens >= 12 ? 4 : 1;
constexpr int64_t kPieceRows = 16;  // query rows that share one pass over the keys
constexpr int64_t kAhead = 16;      // keys or values between what is worked on and what is called from memory

// sums[r * 4 + k] = q[r] . key[k] for up to 4 rows and 4 keys; q [rows][q_stride], zero past D.
// `ahead`: the rows that are read next, or null. Rows of several keys at once are no pattern that the hardware
// recognises, so while one group of rows is worked on the group after it is called from memory, line by line in order.
template <class Products, Stored format, int KEYS, int ROWS>
DELTAIC_INLINE void dot_tile(const uint8_t* const* keys, const typename Products::Number* q, int64_t q_stride,
                             int64_t D, const uint8_t* ahead, f32x16 (&sums)[16], int first_key, int first_row) {
    constexpr int64_t bytes = stored_bytes(format), step = 16 * Products::kNumbers;
    f32x16 acc[ROWS][KEYS];
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < KEYS; ++k) acc[r][k] = zero();
    const auto add = [&](int64_t d, int64_t end) {
        typename Products::Vector key[KEYS];
        for (int k = 0; k < KEYS; ++k) key[k] = Products::template load_lanes<format>(keys[k], d, end);
        for (int r = 0; r < ROWS; ++r) {
            const typename Products::Vector x = Products::load_lanes(q + r * q_stride + d);
            for (int k = 0; k < KEYS; ++k) acc[r][k] = Products::dot(key[k], x, acc[r][k]);
        }
    };
    const int64_t whole = D / step * step;
    for (int64_t d = 0; d < whole; d += step) {
        if (ahead)
            for (int64_t byte = 0; byte < KEYS * step * bytes; byte += 64)
                prefetch_far(ahead + d * KEYS * bytes + byte);
        add(d, d + step);  // this bound drops the loads of a ragged end
    }
    if (whole < D) add(whole, D);
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < KEYS; ++k) sums[(first_row + r) * 4 + first_key + k] = acc[r][k];
}

// scores[r * stride + k] = q[r] . key[k]: ROWS query rows (1, 2 or 4), `count` keys (1..4)
template <class Products, Stored format, int ROWS>
DELTAIC_INLINE void score_rows(const uint8_t* const* keys, int64_t count, const typename Products::Number* q,
                               int64_t q_stride, int64_t D, const uint8_t* ahead, float* scores, int64_t stride) {
    constexpr int R = ROWS < kDotRows ? ROWS : kDotRows;
    f32x16 sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = zero();
    if (count == 4) {
        for (int r = 0; r < ROWS; r += R)
            for (int k = 0; k < 4; k += kDotKeys)
                dot_tile<Products, format, kDotKeys, R>(keys + k, q + r * q_stride, q_stride, D,
                                                        r || !ahead ? nullptr : ahead + k * D * stored_bytes(format),
                                                        sums, k, r);
    } else {
        for (int r = 0; r < ROWS; r += R)
            for (int k = 0; k < count; ++k)
                dot_tile<Products, format, 1, R>(keys + k, q + r * q_stride, q_stride, D, nullptr, sums, k, r);
    }
    float lanes[16];
    store(lanes, reduce_add(sums));
    for (int r = 0; r < ROWS; ++r)
        for (int64_t k = 0; k < count; ++k) scores[r * stride + k] = lanes[r * 4 + k];
}

// out[r] += sum over `count` values of weights[r * stride + i] * value[i], in order. `stride`: numbers.
template <class Products, Stored format, int ROWS, int GROUPS>
DELTAIC_INLINE void sum_tile(const uint8_t* const* values, int64_t count, const typename Products::Number* weights,
                             int64_t stride, int64_t d, int64_t D, const uint8_t* ahead, float* out, int64_t dims) {
    constexpr int64_t bytes = stored_bytes(format);
    f32x16 acc[ROWS][GROUPS];
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) acc[r][g] = load(out + r * dims + d + g * 16);
    for (int64_t i = 0; i < count; i += Products::kNumbers) {
        typename Products::Vector value[GROUPS];
        Products::template load_value<format, GROUPS>(values + i, i + 1 < count, d, D, value);
        if (ahead)
            for (int64_t byte = 0; byte < Products::kNumbers * GROUPS * 16 * bytes; byte += 64)
                prefetch_far(ahead + (d + i * GROUPS) * 16 * bytes + byte);
        for (int r = 0; r < ROWS; ++r) {
            const typename Products::Vector p = Products::set(weights + r * stride + i);
            for (int g = 0; g < GROUPS; ++g) acc[r][g] = Products::dot(value[g], p, acc[r][g]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) store(out + r * dims + d + g * 16, acc[r][g]);
}

template <class Products, Stored format, int ROWS>
DELTAIC_INLINE void sum_rows(const uint8_t* const* values, int64_t count, const typename Products::Number* weights,
                             int64_t stride, int64_t D, const uint8_t* ahead, float* out, int64_t dims) {
    constexpr int G = Products::kNumbers == 2 ? 2 : 1;
    int64_t d = 0;
    // The bound says the groups are whole, so that the compiler drops the loads of a ragged end.
    for (; d + kSumGroups * 16 <= D; d += kSumGroups * 16)
        sum_tile<Products, format, ROWS, kSumGroups>(values, count, weights, stride, d, d + kSumGroups * 16, ahead, out,
                                                     dims);
    for (; d + G * 16 <= dims; d += G * 16)
        sum_tile<Products, format, ROWS, G>(values, count, weights, stride, d, D, ahead, out, dims);
    if constexpr (G > 1)
        for (; d < D; d += 16)
            sum_tile<Products, format, ROWS, 1>(values, count, weights, stride, d, D, ahead, out, dims);
}

// A piece of the keys seen by up to 32 tokens x `group` query heads, rows in (token, head) order.
struct Piece {
    int64_t first, keys;  // first key, and keys that the last row sees
    int64_t seen;         // keys of the piece that token 0 sees; token t sees t more (0 or less: none)
    int64_t group;
    DELTAIC_INLINE int64_t visible(int64_t row) const { return max64(0, min64(keys, seen + row / group)); }
};

// The two products of a piece by `Products` on rows stored as `format`; what else may stand in its place is in
// cpu/kv_int8.h. `memory`: what attend_piece was given beside the scores.
template <class P, Stored format>
struct StoredRows {
    using Products = P;
    using Number = typename Products::Number;  // of a query row
    using Probabilities = Products;            // how they are stored
    static constexpr Stored kFormat = format;
    static constexpr bool kPrefills = true;

    static DELTAIC_INLINE int64_t query_bytes(int64_t D) {
        return round_up(D, 32) * static_cast<int64_t>(sizeof(Number));
    }
    // A query row of x [D] * factor, zero from D on.
    static DELTAIC_INLINE void store_query(Number* q, const float* x, float factor, int64_t D) {
        for (int64_t d = 0; d < round_up(D, 32); d += 16)
            Products::store_number(q + d, d < D ? mul(load_n(x + d, D - d), set1(factor)) : zero(), 16);
    }
    static DELTAIC_INLINE int64_t floats(int64_t) { return 0; }  // of memory beside the scores

    // scores[r * kLongPiece + k] = q[r] . key k, for n query rows and the first `count` keys of a piece.
    static DELTAIC_INLINE void scores(const CacheRows& keys, const CacheRows& values, const Piece& piece, int64_t count,
                                      const Number* q, int64_t q_stride, int64_t n, int64_t D, float* scores, float*) {
        for (int64_t k = 0; k < min64(kAhead, piece.keys); ++k)
            for (int64_t byte = 0; byte < keys.row_bytes; byte += 64) prefetch_far(keys.row(piece.first + k) + byte);
        for (int64_t k = 0; k < count; k += 16) {
            const int64_t some = min64(16, count - k);
            const uint8_t* at[16];
            keys.rows(piece.first + k, some, at);
            const int64_t beyond = k + kAhead - round_up(count, 16);  // after the last keys come the first values
            const uint8_t* ahead = beyond < 0 ? keys.row(piece.first + min64(k + kAhead, count - 1))
                                              : values.row(piece.first + min64(beyond, count - 1));
            for (int64_t i = 0; i < some; i += 4)
                row_tiles(n, [&](auto constant, int64_t r) {
                    score_rows<Products, format, decltype(constant)::value>(
                        at + i, min64(4, some - i), q + r * q_stride, q_stride, D,
                        r ? nullptr : ahead + i * keys.row_bytes, scores + r * kLongPiece + k + i, kLongPiece);
                });
        }
    }

    // out[r] += sum over the keys that row row0 + r sees of its probabilities * value; the last row sees `count`.
    static DELTAIC_INLINE void values(const CacheRows& values, const Piece& piece, int64_t count, int64_t row0,
                                      int64_t n, int64_t D, const float* scores, float*, float* out) {
        constexpr int64_t stride = kLongPiece * Products::kNumbers;
        const int64_t dims = round_up(D, 16);
        for (int64_t k = 0; k < count; k += 16) {
            const uint8_t* at[16];
            values.rows(piece.first + k, min64(16, count - k), at);
            const uint8_t* next = k + kAhead < count ? values.row(piece.first + k + kAhead) : nullptr;
            row_tiles(n, [&](auto constant, int64_t r) {
                constexpr int ROWS = decltype(constant)::value;
                float* o = out + r * dims;
                const Number* p = reinterpret_cast<const Number*>(scores) + r * stride + k;
                // The rows see different numbers of keys only at the end of the sequence: there each adds the rest
                // alone. Whole lanes only are common, since nobody may touch a later row's value.
                const int64_t fewest = max64(0, min64(16, piece.visible(row0 + r) - k));
                const int64_t common = ROWS == 1 ? fewest : fewest / Products::kNumbers * Products::kNumbers;
                if (common) sum_rows<Products, format, ROWS>(at, common, p, stride, D, r ? nullptr : next, o, dims);
                for (int i = 0; ROWS > 1 && i < ROWS; ++i) {
                    const int64_t own = min64(16, piece.visible(row0 + r + i) - k);
                    if (own > common)
                        sum_rows<Products, format, 1>(at + common, own - common, p + i * stride + common, stride, D,
                                                      nullptr, o + i * dims, dims);
                }
            });
        }
    }
};

// Partial attention of the rows q [rows][q_stride] over one piece: out [rows][dims] = sum of 2^(score - highest) *
// value, and per row the highest score (rounded up) and the sum of the exponentials. Every row adds its keys in order,
// so it gets the same bits in any company. memory: kPieceRows * kLongPiece floats, and what `Rows` wants beside them.
template <class Rows>
DELTAIC_INLINE void attend_piece(const CacheRows& keys, const CacheRows& values, const Piece& piece,
                                 const typename Rows::Number* q, int64_t q_stride, int64_t rows, int64_t D,
                                 float* memory, float* out, float* highest, float* total) {
    using Probabilities = typename Rows::Probabilities;
    using Number = typename Probabilities::Number;
    const int64_t dims = round_up(D, 16);
    float *scores = memory, *more = memory + kPieceRows * kLongPiece;
    for (int64_t row0 = 0; row0 < rows; row0 += kPieceRows) {
        const int64_t n = min64(kPieceRows, rows - row0), last = piece.visible(row0 + n - 1);
        if (last == 0) continue;
        Rows::scores(keys, values, piece, last, q + row0 * q_stride, q_stride, n, D, scores, more);
        for (int64_t r = 0; r < n; ++r) {
            const int64_t visible = piece.visible(row0 + r);
            float* s = scores + r * kLongPiece;
            float* o = out + (row0 + r) * dims;
            for (int64_t d = 0; d < dims; ++d) o[d] = 0.0f;
            if (visible == 0) continue;  // nobody reads this row's partial result
            const int64_t end = round_up(visible, 16);
            for (int64_t i = visible; i < end; ++i) s[i] = -INFINITY;
            f32x16 most = load(s);
            for (int64_t i = 16; i < end; i += 16) most = max(most, load(s + i));
            highest[row0 + r] = ceilf(reduce_max(most));
            f32x16 sum = zero();
            Number* p = reinterpret_cast<Number*>(s);
            for (int64_t i = 0; i < end; i += 16) {
                f32x16 e = exp2(sub(load(s + i), set1(highest[row0 + r])));
                if (i + 16 > visible) {
                    float lanes[16];
                    store(lanes, e);
                    for (int64_t j = visible - i; j < 16; ++j) lanes[j] = 0.0f;
                    e = load(lanes);
                }
                sum = add(sum, e);
                Probabilities::store_number(p + i, e, 16);
            }
            total[row0 + r] = reduce_add(sum);
        }
        Rows::values(values, piece, last, row0, n, D, scores, more, out + row0 * dims);
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
