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
constexpr int kDotKeys = kTileTokens >= 12 ? 4 : kTileTokens >= 2 ? 2 : 1;
constexpr int kDotRows = kTileTokens >= 12 ? 4 : 2;
constexpr int kSumGroups = kTileTokens >= 12 ? 4 : 1;
constexpr int64_t kPieceRows = 16;  // query rows that share one pass over the keys
constexpr int64_t kPieceHeads = 4;  // key-value heads of a piece that are worked on in the order in which they lie
constexpr int64_t kRunKeys = 128;   // keys of a head, then their values, that are read before the next head's

// Rows first..first + count - 1 if they lie together, which are then called from memory ahead of their turn; else null.
DELTAIC_INLINE const uint8_t* together(const CacheRows& cache, int64_t first, int64_t count) {
    return first % cache.tokens + count <= cache.tokens ? cache.row(first) : nullptr;
}
// Calls `bytes` bytes from memory, line by line.
DELTAIC_INLINE void call_lines(const uint8_t* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) call_line(from + byte);
}

// sums[r * 4 + k] = q[r] . key[k] for up to 4 rows and 4 keys; q [rows][q_stride], zero past D.
// `ahead`: the rows that are read next, or null. Rows of several keys at once are no pattern that the hardware
// recognises, so while one group of rows is worked on the group after it is called from memory, in order.
template <class Products, Stored format, int KEYS, int ROWS>
DELTAIC_INLINE void dot_tile(const uint8_t* const* keys, const typename Products::Number* q, int64_t q_stride,
                             int64_t D, const uint8_t* ahead, f32x16 (&sums)[16], int first_key, int first_row) {
    constexpr int64_t bytes = stored_bytes(format), step = 16 * Products::kNumbers;
    f32x16 acc[ROWS][KEYS];
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int k = 0; k < KEYS; ++k) acc[r][k] = zero();
    const auto add = [&](int64_t d, int64_t end) __attribute__((always_inline)) {
        typename Products::Vector key[KEYS];
        DELTAIC_UNROLL for (int k = 0; k < KEYS; ++k) key[k] = Products::template load_lanes<format>(keys[k], d, end);
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            const typename Products::Vector x = Products::load_lanes(q + r * q_stride + d);
            DELTAIC_UNROLL for (int k = 0; k < KEYS; ++k) acc[r][k] = Products::dot(key[k], x, acc[r][k]);
        }
    };
    const int64_t whole = D / step * step;
    for (int64_t d = 0; d < whole; d += step) {
        if (ahead) call_lines(ahead + d * KEYS * bytes, KEYS * step * bytes);
        add(d, d + step);  // this bound drops the loads of a ragged end
    }
    if (whole < D) add(whole, D);
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int k = 0; k < KEYS; ++k)
        sums[(first_row + r) * 4 + first_key + k] = acc[r][k];
}

// scores[r * stride + k] = q[r] . key[k]: ROWS query rows (1, 2 or 4), 4 keys
template <class Products, Stored format, int ROWS>
DELTAIC_INLINE void score_rows(const uint8_t* const* keys, const typename Products::Number* q, int64_t q_stride,
                               int64_t D, const uint8_t* ahead, float* scores, int64_t stride) {
    constexpr int R = ROWS < kDotRows ? ROWS : kDotRows;
    f32x16 sums[16];
    DELTAIC_UNROLL for (int i = ROWS * 4; i < 16; ++i) sums[i] = zero();
    DELTAIC_UNROLL for (int r = 0; r < ROWS; r += R) DELTAIC_UNROLL for (int k = 0; k < 4; k += kDotKeys)
        dot_tile<Products, format, kDotKeys, R>(keys + k, q + r * q_stride, q_stride, D,
                                                r || !ahead ? nullptr : ahead + k * D * stored_bytes(format), sums, k,
                                                r);
    float lanes[16];
    store(lanes, reduce_add(sums));
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) memcpy(scores + r * stride, lanes + r * 4, 16);
}

// out[r] += sum over `count` values of weights[r * stride + i] * value[i], in order. `stride`: numbers.
// out rows have `width` numbers, in the order of Products::value_place. WHOLE: `count` is even.
template <class Products, Stored format, int ROWS, int GROUPS, bool WHOLE>
DELTAIC_INLINE void sum_tile(const uint8_t* const* values, int64_t count, const typename Products::Number* weights,
                             int64_t stride, int64_t d, int64_t D, const uint8_t* ahead, float* out, int64_t width) {
    constexpr int64_t bytes = stored_bytes(format);
    f32x16 acc[ROWS][GROUPS];
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int g = 0; g < GROUPS; ++g) acc[r][g] =
        load(out + r * width + d + g * 16);
    for (int64_t i = 0; i < count; i += Products::kNumbers) {
        typename Products::Vector value[GROUPS];
        Products::template load_value<format, GROUPS>(values + i, WHOLE || i + 1 < count, d, D, value);
        if (ahead && d + GROUPS * 16 <= D)
            call_lines(ahead + (d + i * GROUPS) * 16 * bytes, Products::kNumbers * GROUPS * 16 * bytes);
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            const typename Products::Vector p = Products::set(weights + r * stride + i);
            DELTAIC_UNROLL for (int g = 0; g < GROUPS; ++g) acc[r][g] = Products::dot(value[g], p, acc[r][g]);
        }
    }
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int g = 0; g < GROUPS; ++g)
        store(out + r * width + d + g * 16, acc[r][g]);
}

template <class Products, Stored format, int ROWS, bool WHOLE>
DELTAIC_INLINE void sum_rows(const uint8_t* const* values, int64_t count, const typename Products::Number* weights,
                             int64_t stride, int64_t D, const uint8_t* ahead, float* out, int64_t width) {
    constexpr int G = Products::kNumbers;
    int64_t d = 0;
    // The bound says the groups are whole, so that the compiler drops the loads of a ragged end.
    for (; d + kSumGroups * 16 <= D; d += kSumGroups * 16)
        sum_tile<Products, format, ROWS, kSumGroups, WHOLE>(values, count, weights, stride, d, d + kSumGroups * 16,
                                                            ahead, out, width);
    for (; d < width; d += G * 16)
        sum_tile<Products, format, ROWS, G, WHOLE>(values, count, weights, stride, d, D, ahead, out, width);
}

// A piece of the keys seen by up to 32 tokens x `group` query heads, rows in (token, head) order.
struct Piece {
    int64_t first, keys;  // first key, and keys that the last row sees
    int64_t seen;         // keys of the piece that token 0 sees; token t sees t more (0 or less: none)
    int64_t group;
    DELTAIC_INLINE int64_t visible(int64_t row) const { return max64(0, min64(keys, seen + row / group)); }
};

// A run of up to kRunKeys keys and values that n query rows meet.
struct Run {
    int64_t first, keys;          // first key, and keys that the last row sees
    int64_t rows;                 // query rows, up to kPieceRows
    int64_t visible[kPieceRows];  // keys of the run that a row sees; no fewer than the row before it
};

// The rows of a run. Where they lie in one block, as they do unless its size is odd, no division is needed for them.
struct RunRows {
    const CacheRows& cache;
    int64_t first, keys;
    const uint8_t* base;  // null where they do not lie together

    DELTAIC_INLINE RunRows(const CacheRows& rows, const Run& run)
        : cache(rows), first(run.first), keys(run.keys), base(together(rows, run.first, run.keys)) {}
    // Rows k .. k + 15; the last row of the run again beyond it.
    DELTAIC_INLINE void get(int64_t k, const uint8_t** out) const {
        if (!base) {
            const uint8_t* some[16];
            cache.rows(first + min64(k, keys - 1), max64(1, min64(16, keys - k)), some);
            memcpy(out, some, sizeof some);
        } else {
            const uint8_t* last = base + (keys - 1) * cache.row_bytes;
            const uint8_t* p = base + k * cache.row_bytes;
            for (int64_t i = 0; i < 16; ++i, p += cache.row_bytes) out[i] = p < last ? p : last;
        }
    }
    // `count` rows from row k on if they lie together; beyond the run those at `next`, unless that is null.
    DELTAIC_INLINE const uint8_t* ahead(int64_t k, int64_t count, const uint8_t* next) const {
        const int64_t beyond = k - round_up(keys, count);
        if (beyond >= 0) return next ? next + beyond * cache.row_bytes : nullptr;
        if (!base) return together(cache, first + k, count);
        return k + count <= keys ? base + k * cache.row_bytes : together(cache, first + k, count);
    }
};

// The two products of a run by `Products` on rows stored as `format`; what else may stand in its place is in
// cpu/kv_int8.h. `memory`: what attend_piece was given for them. `next`: what is read after the run, kAhead rows that
// lie together, or null.
template <class P, Stored format>
struct StoredRows {
    using Products = P;
    using Number = typename Products::Number;  // of a query row
    using Probabilities = Products;            // how they are stored
    static constexpr Stored kFormat = format;
    static constexpr bool kPrefills = true;
    // Whether the sums of a row are in the order of its dimensions, and no wider.
    static constexpr bool kPlainSums = Products::kNumbers == 1;
    static constexpr int64_t kAhead = 16;  // rows

    // Of a row of sums, in numbers.
    static DELTAIC_INLINE int64_t width(int64_t D) { return round_up(D, 16 * Products::kNumbers); }
    static DELTAIC_INLINE void plain_sums(const float* sums, int64_t n, int64_t D, float* out) {
        for (int64_t r = 0; r < n; ++r)
            for (int64_t d = 0; d < D; d += Products::kPlaces)
                memcpy(out + r * round_up(D, 16) + d, sums + r * width(D) + Products::value_place(d),
                       sizeof(float) * Products::kPlaces);
    }
    static DELTAIC_INLINE int64_t query_bytes(int64_t D) {
        return round_up(D, 32) * static_cast<int64_t>(sizeof(Number));
    }
    // A query row of x [D] * factor, zero from D on.
    static DELTAIC_INLINE void store_query(Number* q, const float* x, float factor, int64_t D) {
        for (int64_t d = 0; d < round_up(D, 32); d += 16)
            Products::store_number(q + d, d < D ? mul(load_n(x + d, D - d), set1(factor)) : zero(), 16);
    }
    static DELTAIC_INLINE int64_t floats(int64_t) { return 0; }  // of memory

    // scores[r * kRunKeys + k] = q[r] . key k
    static DELTAIC_INLINE void scores(const CacheRows& keys, const Run& run, const Number* q, int64_t q_stride,
                                      int64_t D, const uint8_t* next, float* scores, float*) {
        const RunRows rows(keys, run);
        for (int64_t k = 0; k < run.keys; k += 16) {
            const uint8_t *at[16], *ahead = rows.ahead(k + 16, 16, next);
            rows.get(k, at);
            for (int64_t i = 0; i < min64(16, run.keys - k); i += 4)  // beyond the last key the last again
                row_tiles(run.rows, [&](auto constant, int64_t r) {
                    score_rows<Products, format, decltype(constant)::value>(
                        at + i, q + r * q_stride, q_stride, D, r || !ahead ? nullptr : ahead + i * keys.row_bytes,
                        scores + r * kRunKeys + k + i, kRunKeys);
                });
        }
    }

    // out[r] += sum over the keys that row r sees of its probabilities * value
    static DELTAIC_INLINE void values(const CacheRows& values, const Run& run, int64_t D, const uint8_t* next,
                                      const float* scores, float*, float* out) {
        constexpr int64_t stride = kRunKeys * Products::kNumbers;
        const int64_t out_stride = width(D);
        const RunRows rows(values, run);
        for (int64_t k = 0; k < run.keys; k += 16) {
            const uint8_t *at[16], *ahead = rows.ahead(k + 16, 16, next);
            rows.get(k, at);
            row_tiles(run.rows, [&](auto constant, int64_t r) {
                constexpr int ROWS = decltype(constant)::value;
                float* o = out + r * out_stride;
                const Number* p = reinterpret_cast<const Number*>(scores) + r * stride + k;
                if (k + 16 <= run.visible[r])
                    return sum_rows<Products, format, ROWS, true>(at, 16, p, stride, D, r ? nullptr : ahead, o,
                                                                  out_stride);
                // The rows see different numbers of keys only at the end of the sequence: there each adds the rest
                // alone. Whole lanes only are common, since nobody may touch a later row's value.
                const int64_t fewest = max64(0, run.visible[r] - k);
                const int64_t common = ROWS == 1 ? fewest : fewest / Products::kNumbers * Products::kNumbers;
                if (common) sum_rows<Products, format, ROWS, false>(at, common, p, stride, D, nullptr, o, out_stride);
                for (int i = 0; ROWS > 1 && i < ROWS; ++i) {
                    const int64_t own = min64(16, run.visible[r + i] - k);
                    if (own > common)
                        sum_rows<Products, format, 1, false>(at + common, own - common, p + i * stride + common, stride,
                                                             D, nullptr, o + i * out_stride, out_stride);
                }
            });
        }
    }
};

// What is known of one key-value head of a piece: out [rows][dims] = sum of 2^(score - highest) * value, and per row
// the highest score (rounded up) and the sum of the exponentials.
struct PieceSums {
    float *out, *highest, *total;
    DELTAIC_INLINE PieceSums(float* memory, int64_t rows, int64_t dims)
        : out(memory), highest(out + rows * dims), total(highest + rows) {}
    static DELTAIC_INLINE int64_t floats(int64_t rows, int64_t dims) { return round_up(rows * (dims + 2), 16); }
};

// Work space of attend_piece: scores, sums of exponentials, and what Rows wants.
template <class Rows>
DELTAIC_INLINE int64_t piece_memory(int64_t D) {
    const int64_t sums = Rows::kPlainSums ? 0 : Rows::width(D);
    return round_up(kPieceHeads * kPieceRows * (kRunKeys + 16 + sums) + Rows::floats(D), 16);
}

// Partial attention of the rows q(head) [rows][q_stride] over one piece of `heads` neighbouring key-value heads, into
// sums(head). Every row adds its keys in order, in runs that depend on the key index alone, so it gets the same bits in
// any company.
template <class Rows, class Query, class Sums>
DELTAIC_INLINE void attend_piece(const BlockTable& table, int64_t layer, int64_t first_head, int64_t heads,
                                 const Piece& piece, const Query& q, int64_t q_stride, int64_t rows, int64_t D,
                                 float* memory, const Sums& sums) {
    using Probabilities = typename Rows::Probabilities;
    constexpr int64_t head_floats = kPieceRows * kRunKeys, row_floats = kPieceRows * 16;
    const int64_t dims = round_up(D, 16);
    const int64_t width = Rows::width(D), own_floats = Rows::kPlainSums ? 0 : kPieceRows * width;
    float *totals = memory + kPieceHeads * head_floats, *own = totals + kPieceHeads * row_floats,
          *more = own + kPieceHeads * own_floats;
    const auto cache = [&](int64_t which, int64_t h)
                           __attribute__((always_inline)) { return CacheRows(table, layer, which, first_head + h); };
    for (int64_t row0 = 0; row0 < rows; row0 += kPieceRows) {
        Run run;
        run.rows = min64(kPieceRows, rows - row0);
        const int64_t end = piece.visible(row0 + run.rows - 1);
        const auto out = [&](int64_t h) __attribute__((always_inline)) {
            return Rows::kPlainSums ? sums(h).out + row0 * dims : own + h * own_floats;
        };
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < run.rows * width; i += 16) store(out(h) + i, zero());
            for (int64_t r = 0; r < run.rows; ++r) {
                store(totals + h * row_floats + r * 16, zero());
                sums(h).highest[row0 + r] = -INFINITY;
            }
        }
        if (const uint8_t* begin = end ? together(cache(0, 0), piece.first, Rows::kAhead) : nullptr)
            for (int64_t byte = 0; byte < Rows::kAhead * cache(0, 0).row_bytes; byte += 64) prefetch_far(begin + byte);
        for (int64_t key = 0; key < end; key += kRunKeys) {
            run.first = piece.first + key, run.keys = min64(kRunKeys, end - key);
            for (int64_t r = 0; r < run.rows; ++r)
                run.visible[r] = max64(0, min64(run.keys, piece.visible(row0 + r) - key));
            // In the order in which they lie: keys of all heads, values of all heads, then the next block.
            for (int64_t h = 0; h < heads; ++h) {
                const uint8_t* next = together(h + 1 < heads ? cache(0, h + 1) : cache(1, 0), run.first, Rows::kAhead);
                Rows::scores(cache(0, h), run, q(h) + row0 * q_stride, q_stride, D, next, memory + h * head_floats,
                             more);
            }
            if (const uint8_t* begin = together(cache(1, 0), run.first + Rows::kAhead, Rows::kAhead))
                for (int64_t byte = 0; byte < Rows::kAhead * cache(1, 0).row_bytes; byte += 64)
                    prefetch_far(begin + byte);
            for (int64_t h = 0; h < heads; ++h)
                softmax_rows<Probabilities>(run.rows, memory + h * head_floats, kRunKeys, run.keys, run.visible,
                                            sums(h).highest + row0, totals + h * row_floats, out(h), width);
            for (int64_t h = 0; h < heads; ++h) {
                const uint8_t* next = nullptr;
                if (h + 1 < heads)
                    next = together(cache(1, h + 1), run.first, Rows::kAhead);
                else if (key + kRunKeys < end)
                    next = together(cache(0, 0), run.first + kRunKeys, Rows::kAhead);
                Rows::values(cache(1, h), run, D, next, memory + h * head_floats, more, out(h));
            }
        }
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t r = 0; r < run.rows; ++r)
                sums(h).total[row0 + r] = reduce_add(load(totals + h * row_floats + r * 16));
            if constexpr (!Rows::kPlainSums) Rows::plain_sums(out(h), run.rows, D, sums(h).out + row0 * dims);
        }
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
