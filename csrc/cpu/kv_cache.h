// Where the keys and values of one sequence lie, and attention of a few query rows over a run of them.
#pragma once

#include "cpu/flash.h"

namespace deltaic {
namespace DELTAIC_ISA {

// The keys (or values) of one layer and head: row `i` of D numbers for token i.
struct CacheRows {
    void* const* blocks;
    int64_t tokens, row_bytes, first_byte;  // tokens of a block; bytes of a row; where the head starts in a block

    DELTAIC_INLINE CacheRows(const BlockTable& table, int64_t layer, int64_t which, int64_t head) {
        const int64_t bytes = table.dtype == Dtype::f32 ? 4 : 2;
        blocks = table.blocks;
        tokens = table.tokens;
        row_bytes = table.head_dim * bytes;
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

// Register tiles of the decode path: keys x query rows of a dot product; query rows x groups of 16 dimensions of the
// sum.
constexpr int kDotKeys = kTileTokens >= 12 ? 4 : kTileTokens >= 2 ? 2 : 1;
constexpr int kDotRows = kTileTokens >= 12 ? 4 : 2;
constexpr int kSumGroups = kTileTokens >= 12 ? 4 : 1;
constexpr int64_t kPieceRows = 16;  // query rows that share one pass over the keys
constexpr int64_t kAhead =
    64;  // keys or values between the one that is worked on and the one that is called from memory

// sums[r * 4 + k] = q[r] . key[k] for up to 4 rows and 4 keys.
// `ahead`: the rows that are read next, or null. Rows of several keys at once are no pattern that the hardware
// recognises, so while one group of rows is worked on the group after it is called from memory, line by line in order.
template <bool kHalf, int KEYS, int ROWS>
DELTAIC_INLINE void dot_tile(const uint8_t* const* keys, const float* q, int64_t D, const uint8_t* ahead,
                             f32x16 (&sums)[16], int first_key, int first_row) {
    constexpr int64_t bytes = kHalf ? 2 : 4;
    f32x16 acc[ROWS][KEYS];
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < KEYS; ++k) acc[r][k] = zero();
    const int64_t whole = D / 16 * 16;
    for (int64_t d = 0; d < whole; d += 16) {
        f32x16 key[KEYS];
        for (int k = 0; k < KEYS; ++k) key[k] = load_row<kHalf>(keys[k], d, d + 16);
        if (ahead)
            for (int64_t byte = 0; byte < KEYS * 16 * bytes; byte += 64) prefetch_far(ahead + d * KEYS * bytes + byte);
        for (int r = 0; r < ROWS; ++r) {
            const f32x16 x = load(q + r * D + d);
            for (int k = 0; k < KEYS; ++k) acc[r][k] = fma(key[k], x, acc[r][k]);
        }
    }
    if (whole < D) {
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < KEYS; ++k)
                acc[r][k] = fma(load_row<kHalf>(keys[k], whole, D), load_n(q + r * D + whole, D - whole), acc[r][k]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < KEYS; ++k) sums[(first_row + r) * 4 + first_key + k] = acc[r][k];
}

// scores[r * stride + k] = q[r] . key[k]: ROWS query rows (1, 2 or 4), `count` keys (1..4)
template <bool kHalf, int ROWS>
DELTAIC_INLINE void score_rows(const uint8_t* const* keys, int64_t count, const float* q, int64_t D,
                               const uint8_t* ahead, float* scores, int64_t stride) {
    constexpr int R = ROWS < kDotRows ? ROWS : kDotRows;
    f32x16 sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = zero();
    if (count == 4) {
        for (int r = 0; r < ROWS; r += R)
            for (int k = 0; k < 4; k += kDotKeys)
                dot_tile<kHalf, kDotKeys, R>(keys + k, q + r * D, D,
                                             r || !ahead ? nullptr : ahead + k * D * (kHalf ? 2 : 4), sums, k, r);
    } else {
        for (int r = 0; r < ROWS; r += R)
            for (int k = 0; k < count; ++k) dot_tile<kHalf, 1, R>(keys + k, q + r * D, D, nullptr, sums, k, r);
    }
    float lanes[16];
    store(lanes, reduce_add(sums));
    for (int r = 0; r < ROWS; ++r)
        for (int64_t k = 0; k < count; ++k) scores[r * stride + k] = lanes[r * 4 + k];
}

// out[r] += sum over `count` values of weights[r * stride + i] * value[i], in order
template <bool kHalf, int ROWS, int GROUPS>
DELTAIC_INLINE void sum_tile(const uint8_t* const* values, int64_t count, const float* weights, int64_t stride,
                             int64_t d, int64_t D, const uint8_t* ahead, float* out, int64_t dims) {
    constexpr int64_t bytes = kHalf ? 2 : 4;
    f32x16 acc[ROWS][GROUPS];
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) acc[r][g] = load(out + r * dims + d + g * 16);
    for (int64_t i = 0; i < count; ++i) {
        f32x16 value[GROUPS];
        for (int g = 0; g < GROUPS; ++g) value[g] = load_row<kHalf>(values[i], d + g * 16, D);
        if (ahead)
            for (int64_t byte = 0; byte < GROUPS * 16 * bytes; byte += 64)
                prefetch_far(ahead + (d + i * GROUPS) * 16 * bytes + byte);
        for (int r = 0; r < ROWS; ++r) {
            const f32x16 p = set1(weights[r * stride + i]);
            for (int g = 0; g < GROUPS; ++g) acc[r][g] = fma(value[g], p, acc[r][g]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) store(out + r * dims + d + g * 16, acc[r][g]);
}

template <bool kHalf, int ROWS>
DELTAIC_INLINE void sum_rows(const uint8_t* const* values, int64_t count, const float* weights, int64_t stride,
                             int64_t D, const uint8_t* ahead, float* out, int64_t dims) {
    int64_t d = 0;
    // The bound says the groups are whole, so that the compiler drops the loads of a ragged end.
    for (; d + kSumGroups * 16 <= D; d += kSumGroups * 16)
        sum_tile<kHalf, ROWS, kSumGroups>(values, count, weights, stride, d, d + kSumGroups * 16, ahead, out, dims);
    for (; d < D; d += 16) sum_tile<kHalf, ROWS, 1>(values, count, weights, stride, d, D, ahead, out, dims);
}

// A piece of the keys seen by up to 32 tokens x `group` query heads, rows in (token, head) order.
struct Piece {
    int64_t first, keys;  // first key, and keys that the last row sees
    int64_t seen;         // keys of the piece that token 0 sees; token t sees t more (0 or less: none)
    int64_t group;
    DELTAIC_INLINE int64_t visible(int64_t row) const { return max64(0, min64(keys, seen + row / group)); }
};

// Partial attention of the rows over one piece: out [rows][dims] = sum of exp(score - highest) * value, and per row the
// highest score and the sum of the exponentials. Every row adds its keys in order, so it gets the same bits in any
// company. scores: memory of kPieceRows * kLongPiece floats.
template <bool kHalf>
DELTAIC_INLINE void attend_piece(const CacheRows& keys, const CacheRows& values, const Piece& piece, const float* q,
                                 int64_t rows, int64_t D, float* scores, float* out, float* highest, float* total) {
    const int64_t dims = round_up(D, 16), stride = kLongPiece;
    for (int64_t row0 = 0; row0 < rows; row0 += kPieceRows) {
        const int64_t n = min64(kPieceRows, rows - row0), last = piece.visible(row0 + n - 1);
        if (last == 0) continue;
        for (int64_t k = 0; k < last; k += 16) {
            const int64_t count = min64(16, last - k);
            const uint8_t* at[16];
            keys.rows(piece.first + k, count, at);
            const int64_t beyond = k + kAhead - round_up(last, 16);  // after the last keys come the first values
            const uint8_t* ahead = beyond < 0 ? keys.row(piece.first + min64(k + kAhead, last - 1))
                                              : values.row(piece.first + min64(beyond, last - 1));
            for (int64_t i = 0; i < count; i += 4) {
                float* s = scores + k + i;
                const int64_t c = min64(4, count - i);
                const auto next = [&](int64_t r) { return r ? nullptr : ahead + i * keys.row_bytes; };
                int64_t r = 0;
                for (; r + 4 <= n; r += 4)
                    score_rows<kHalf, 4>(at + i, c, q + (row0 + r) * D, D, next(r), s + r * stride, stride);
                for (; r + 2 <= n; r += 2)
                    score_rows<kHalf, 2>(at + i, c, q + (row0 + r) * D, D, next(r), s + r * stride, stride);
                for (; r < n; ++r)
                    score_rows<kHalf, 1>(at + i, c, q + (row0 + r) * D, D, next(r), s + r * stride, stride);
            }
        }
        for (int64_t r = 0; r < n; ++r) {
            const int64_t visible = piece.visible(row0 + r);
            float* s = scores + r * stride;
            float* o = out + (row0 + r) * dims;
            for (int64_t d = 0; d < dims; ++d) o[d] = 0.0f;
            if (visible == 0) continue;  // nobody reads this row's partial result
            const int64_t end = round_up(visible, 16);
            for (int64_t i = visible; i < end; ++i) s[i] = -INFINITY;
            f32x16 most = load(s);
            for (int64_t i = 16; i < end; i += 16) most = max(most, load(s + i));
            highest[row0 + r] = reduce_max(most);
            f32x16 sum = zero();
            for (int64_t i = 0; i < end; i += 16) {
                store(s + i, exp(sub(load(s + i), set1(highest[row0 + r]))));
                for (int64_t j = visible; j < i + 16; ++j) s[j] = 0.0f;
                sum = add(sum, load(s + i));
            }
            total[row0 + r] = reduce_add(sum);
        }
        for (int64_t k = 0; k < last; k += 16) {
            const uint8_t* at[16];
            values.rows(piece.first + k, min64(16, last - k), at);
            const uint8_t* next = k + kAhead < last ? values.row(piece.first + k + kAhead) : nullptr;
            int64_t r = 0;
            const auto add_rows = [&](auto constant) {
                constexpr int ROWS = decltype(constant)::value;
                float* o = out + (row0 + r) * dims;
                // The rows see different numbers of keys only at the end of the sequence: there each adds the rest
                // alone.
                const int64_t common = max64(0, min64(16, piece.visible(row0 + r) - k));
                sum_rows<kHalf, ROWS>(at, common, scores + r * stride + k, stride, D, r ? nullptr : next, o, dims);
                for (int i = 1; i < ROWS; ++i) {
                    const int64_t own = min64(16, piece.visible(row0 + r + i) - k);
                    if (own > common)
                        sum_rows<kHalf, 1>(at + common, own - common, scores + (r + i) * stride + k + common, stride, D,
                                           nullptr, o + i * dims, dims);
                }
                r += ROWS;
            };
            while (r + 4 <= n) add_rows(Constant<4>{});
            while (r + 2 <= n) add_rows(Constant<2>{});
            while (r < n) add_rows(Constant<1>{});
        }
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
