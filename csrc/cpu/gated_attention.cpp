// gated_attention: norm, rotary embedding, cache append, causal attention and output gate of a full-attention layer.
//
// A sequence of many new rows (prefill) goes through the tiles of cpu/flash.h, panel after panel of packed keys and
// values. One of at most kDecodeRows rows splits its keys into pieces (cpu/kv_cache.h), so that all threads work on one
// token, and adds the partial results in piece order. On each path a row's arithmetic depends on its own place in the
// sequence alone; `prefill` sends all rows down the first, so that what a prompt's rows get does not depend on where
// its reading was interrupted.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/kv_int8.h"

// GCC on x86 copies accumulators around in the loops of integer sums, for want of registers that it has.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define DELTAIC_KEEP_TILES __attribute__((optimize("no-tree-coalesce-vars")))
#else
#define DELTAIC_KEEP_TILES
#endif

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

constexpr int64_t kDecodeRows = 32;  // new rows of a sequence up to which it takes the decode path, unless `prefill`
constexpr int64_t kPartialFloats =
    1 << 24;                                // partial results in memory at a time, unless one sequence alone needs more
constexpr int64_t kPackedFloats = 1 << 20;  // of packed keys and values of a sequence in memory at a time

struct Attention {
    View proj, q_norm, k_norm, cos, sin, y;
    float eps;
    int64_t Hq, Hkv, D, G, dims, layer;
    const int64_t *cut, *starts;
    Tables tables;
    bool prefill;
    // [Hkv][T][G] rows of `q_bytes` bytes, as the products with a sequence's K/V want them: normed, rotated, scaled by
    // log2(e) / sqrt(D).
    uint8_t* q;
    int64_t q_bytes;

    DELTAIC_INLINE int64_t columns() const { return proj.shape[1]; }
    DELTAIC_INLINE int64_t new_rows(int64_t b) const { return cut[b + 1] - cut[b]; }
    DELTAIC_INLINE bool decodes(int64_t b) const { return !prefill && new_rows(b) <= kDecodeRows; }
    DELTAIC_INLINE int64_t pieces(int64_t b) const { return piece_of(starts[b] + new_rows(b) - 1) + 1; }
    template <class Rows>
    DELTAIC_INLINE typename Rows::Number* queries(int64_t kv_head, int64_t token) const {
        return reinterpret_cast<typename Rows::Number*>(q + (kv_head * proj.shape[0] + token) * G * q_bytes);
    }
    template <class Rows>
    DELTAIC_INLINE int64_t q_stride() const {
        return q_bytes / static_cast<int64_t>(sizeof(typename Rows::Number));
    }
};

// One unit of parallel work of a decode step: a piece of the keys, and where its partial results go.
struct Item {
    int32_t sequence, head, heads;  // key-value heads head .. head + heads - 1
    int64_t piece, partial;
};

DELTAIC_INLINE void store_cache(const BlockTable& table, uint8_t* row, const float* x, int64_t D) {
    if (table.dtype == Dtype::u8) return store_int8_row(row, x, D);
    for (int64_t d = 0; d < D; d += 16) {
        const f32x16 v = load_n(x + d, D - d);
        if (table.dtype == Dtype::f32) {
            store_n(reinterpret_cast<float*>(row) + d, v, D - d);
        } else {
            store_bf16_n(reinterpret_cast<uint16_t*>(row) + d, v, D - d);
        }
    }
}

// f(a value of the type that tells how the rows of sequence b are stored and multiplied)
template <class F>
DELTAIC_INLINE void with_rows(const Attention& a, int64_t b, const F& f) {
    switch (a.tables[b].dtype) {
        case Dtype::f32:
            return f(StoredRows<FloatProducts, Stored::f32>{});
        case Dtype::u16:
            return f(StoredRows<HalfProducts, Stored::bf16>{});
        default:
            if (a.decodes(b)) return f(DecodedInt8{});
            return f(StoredRows<HalfProducts, Stored::int8>{});
    }
}

// q, k and v of one token and one key-value head: q into a.q, k and v into the cache. `row`: memory of D floats.
void prepare(const Attention& a, int64_t b, int64_t t, int64_t kv_head, float* row) {
    const int64_t D = a.D, F = a.cos.shape[1];
    const float *x = a.proj.f32() + t * a.columns(), *cos = a.cos.f32() + t * F, *sin = a.sin.f32() + t * F;
    const float factor = kLog2E / sqrtf(static_cast<float>(D));
    for (int64_t g = 0; g < a.G; ++g) {
        rms_norm_row(x + (kv_head * a.G + g) * 2 * D, a.q_norm.f32(), D, a.eps, row);
        rotate_row(row, cos, sin, F);
        with_rows(a, b, [&](auto rows) {
            using Rows = decltype(rows);
            Rows::store_query(a.queries<Rows>(kv_head, t) + g * a.q_stride<Rows>(), row, factor, D);
        });
    }
    const int64_t place = a.starts[b] + t - a.cut[b];
    const BlockTable& table = a.tables[b];
    const float* k = x + a.Hq * 2 * D + kv_head * D;
    rms_norm_row(k, a.k_norm.f32(), D, a.eps, row);
    rotate_row(row, cos, sin, F);
    store_cache(table, CacheRows(table, a.layer, 0, kv_head).row(place), row, D);
    store_cache(table, CacheRows(table, a.layer, 1, kv_head).row(place), k + a.Hkv * D, D);
}

// y = o / total * sigmoid(gate) for one row
DELTAIC_INLINE void finish(const Attention& a, int64_t t, int64_t head, const float* o, float total) {
    const float* gate = a.proj.f32() + t * a.columns() + (head * 2 + 1) * a.D;
    float* y = a.y.f32() + (t * a.Hq + head) * a.D;
    for (int64_t d = 0; d < a.D; d += 16) {
        const f32x16 attended = div(load(o + d), set1(total));
        store_n(y + d, mul(attended, sigmoid(load_n(gate + d, a.D - d))), a.D - d);
    }
}

// One sequence whose rows are read: panels of keys and values are packed once for all of its rows.
template <class Rows>
void prefill_sequence(const Attention& a, int64_t b) {
    using Products = typename Rows::Products;
    constexpr int64_t kKeys = Products::kKeys, kNumbers = Products::kNumbers;
    const int64_t D = a.D, G = a.G, Hkv = a.Hkv, new_rows = a.new_rows(b), start = a.starts[b], end = start + new_rows;
    const int64_t threads = thread_count(), lanes = ceil_div(D, kNumbers), v_stride = kKeys / kNumbers * 16;
    // A block of kKeys packed keys, then its values; blocks of all heads that are packed at a time.
    const int64_t k_floats = kKeys * lanes, block_floats = k_floats + a.dims / 16 * v_stride,
                  blocks = ceil_div(end, kKeys);
    const int64_t together = min64(blocks, max64(1, kPackedFloats / (Hkv * block_floats)));
    // Large tiles read packed keys less often; small ones keep all threads busy. A row's result is the same in either.
    const bool large = new_rows * a.Hq / 192 >= 4 * threads;
    const int64_t tile_tokens = max64(1, (large ? 192 : 96) / G), tiles = ceil_div(new_rows, tile_tokens);
    const int64_t score_floats = flash_score_floats<Products>(tile_tokens * G),
                  state_floats = flash_state_floats(tile_tokens * G, D);
    float* packed = scratch_f32(Hkv * together * block_floats);
    float* scores = scratch_f32(threads * score_floats);
    float* states = scratch_f32(tiles * Hkv * state_floats);
    const BlockTable& table = a.tables[b];

    for (int64_t first = 0; first < blocks; first += together) {
        const int64_t count = min64(together, blocks - first), panel_end = min64(end, (first + count) * kKeys);
        const int64_t groups = ceil_div(panel_end - first * kKeys, 16);
        parallel_for(Hkv * groups, 4, [&](int64_t begin, int64_t stop, int) {
            for (int64_t i = begin; i < stop; ++i) {
                const int64_t h = i / groups, key = i % groups * 16, within = key % kKeys;
                const int64_t n = min64(16, panel_end - first * kKeys - key);
                float* to = packed + (h * together + key / kKeys) * block_floats;
                const uint8_t* at[16];
                CacheRows(table, a.layer, 0, h).rows(first * kKeys + key, n, at);
                Products::template pack_keys<Rows::kFormat>(at, D, to + within * lanes);
                CacheRows(table, a.layer, 1, h).rows(first * kKeys + key, n, at);
                Products::template pack_values<Rows::kFormat>(at, n, D, v_stride,
                                                              to + k_floats + within / kNumbers * 16);
            }
        });
        // The last tiles, which see the most keys, come first.
        parallel_for(tiles * Hkv, 1, [&](int64_t begin, int64_t stop, int thread) {
            for (int64_t i = begin; i < stop; ++i) {
                const int64_t tile = tiles - 1 - i / Hkv, h = i % Hkv, token = tile * tile_tokens;
                const int64_t tokens = min64(tile_tokens, new_rows - token), place = start + token;
                const int64_t seen = place + tokens;  // keys of its last row
                if (seen <= first * kKeys) continue;
                const auto t =
                    flash_tile<Products>(a.queries<Rows>(h, a.cut[b] + token), a.q_stride<Rows>(), tokens * G, D,
                                         scores + thread * score_floats, states + (tile * Hkv + h) * state_floats);
                if (first == 0) flash_begin(t);
                for (int64_t block = 0; block < count; ++block) {
                    const int64_t key = (first + block) * kKeys, n = min64(kKeys, seen - key);
                    if (n <= 0) break;
                    const float* from = packed + (h * together + block) * block_floats;
                    flash_keys(t, from, from + k_floats, v_stride, n,
                               [&](int64_t r) { return max64(0, min64(n, place + r / G + 1 - key)); });
                }
                if (seen > panel_end) continue;
                for (int64_t r = 0; r < t.rows; ++r)
                    finish(a, a.cut[b] + token + r / G, h * G + r % G, t.out + r * t.dims, flash_total(t, r));
            }
        });
    }
}

// Partial results of one piece of one key-value head.
DELTAIC_INLINE int64_t piece_floats(const Attention& a, int64_t b) {
    return PieceSums::floats(a.new_rows(b) * a.G, a.dims);
}

// partial: of the item's sequence, [Hkv][pieces][piece_floats].
template <class Rows>
DELTAIC_KEEP_TILES void decode_piece(const Attention& a, const Item& item, float* partial, float* memory) {
    const int64_t b = item.sequence, rows = a.new_rows(b) * a.G, pieces = a.pieces(b);
    const int64_t begin = piece_begin(item.piece),
                  end = min64(piece_begin(item.piece + 1), a.starts[b] + a.new_rows(b));
    const Piece piece{begin, end - begin, a.starts[b] + 1 - begin, a.G};
    for (int64_t done = 0; done < item.heads; done += kPieceHeads) {
        const int64_t first = item.head + done;
        attend_piece<Rows>(
            a.tables[b], a.layer, first, min64(kPieceHeads, item.heads - done), piece,
            [&](int64_t h) { return a.queries<Rows>(first + h, a.cut[b]); }, a.q_stride<Rows>(), rows, a.D, memory,
            [&](int64_t h) {
                return PieceSums(partial + ((first + h) * pieces + item.piece) * piece_floats(a, b), rows, a.dims);
            });
    }
}

// Adds up the pieces that one row sees, in order. partial: of this sequence and key-value head, [pieces][piece_floats].
// o: memory of dims floats.
void combine(const Attention& a, int64_t b, int64_t t, int64_t kv_head, int64_t g, const float* partial, float* o) {
    const int64_t row = (t - a.cut[b]) * a.G + g, rows = a.new_rows(b) * a.G, stride = piece_floats(a, b);
    const int64_t pieces = piece_of(a.starts[b] + t - a.cut[b]) + 1;
    const PieceSums first(const_cast<float*>(partial), rows, a.dims);
    const float *highest = first.highest + row, *totals = first.total + row;
    float most = highest[0], total = 0.0f;
    for (int64_t p = 1; p < pieces; ++p) most = highest[p * stride] > most ? highest[p * stride] : most;
    for (int64_t d = 0; d < a.dims; ++d) o[d] = 0.0f;
    for (int64_t p = 0; p < pieces; ++p) {
        const float* sums = partial + p * stride + row * a.dims;
        const f32x16 scale = exp2(set1(highest[p * stride] - most));
        float lanes[16];
        store(lanes, scale);
        total += lanes[0] * totals[p * stride];
        for (int64_t d = 0; d < a.dims; d += 16) store(o + d, fma(load(sums + d), scale, load(o + d)));
    }
    finish(a, t, kv_head * a.G + g, o, total);
}

int64_t sequence_of(const Attention& a, int64_t b, int64_t t) {
    while (t >= a.cut[b + 1]) ++b;
    return b;
}

// The sequences that decode among first..last - 1.
void decode_sequences(const Attention& a, int64_t first, int64_t last) {
    int64_t items = 0, partials = 0;
    int64_t* offsets = static_cast<int64_t*>(scratch(static_cast<size_t>(last - first) * sizeof(int64_t)));
    for (int64_t b = first; b < last; ++b) {
        offsets[b - first] = partials;
        if (!a.decodes(b) || a.new_rows(b) == 0) continue;
        items += a.pieces(b) * a.Hkv;
        partials += a.pieces(b) * a.Hkv * piece_floats(a, b);
    }
    if (items == 0) return;
    Item* item = static_cast<Item*>(scratch(static_cast<size_t>(items) * sizeof(Item)));
    float* partial = scratch_f32(partials);
    const int64_t memory = piece_memory<DecodedInt8>(a.D);  // the most that any of the rows wants
    float* work = scratch_f32(thread_count() * memory);

    // All heads of a piece lie together; one at a time they keep more threads busy. The result is the same. The last
    // pieces of a sequence, which may be the longest, come first.
    const int64_t heads = items / a.Hkv >= 8 * thread_count() ? a.Hkv : 1;
    items = 0;
    for (int64_t b = first; b < last; ++b) {
        if (!a.decodes(b) || a.new_rows(b) == 0) continue;
        for (int64_t p = a.pieces(b) - 1; p >= 0; --p)
            for (int64_t h = 0; h < a.Hkv; h += heads)
                item[items++] = {static_cast<int32_t>(b), static_cast<int32_t>(h),
                                 static_cast<int32_t>(min64(heads, a.Hkv - h)), p, offsets[b - first]};
    }
    int64_t products = 0;  // of a row and a key
    for (int64_t b = first; b < last; ++b) products += a.new_rows(b) * (a.starts[b] + a.new_rows(b));
    parallel_for(items, grain_for(products * a.Hkv * a.D * 4, items, 1), [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i)
            with_rows(a, item[i].sequence, [&](auto rows) {
                decode_piece<decltype(rows)>(a, item[i], partial + item[i].partial, work + thread * memory);
            });
    });
    const int64_t t0 = a.cut[first];
    parallel_for((a.cut[last] - t0) * a.Hq, 16, [&](int64_t begin, int64_t end, int thread) {
        int64_t b = first;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t t = t0 + i / a.Hq, head = i % a.Hq, h = head / a.G;
            b = sequence_of(a, b, t);
            if (!a.decodes(b)) continue;
            const float* of_head = partial + offsets[b - first] + h * a.pieces(b) * piece_floats(a, b);
            combine(a, b, t, h, head % a.G, of_head, work + thread * memory);
        }
    });
}

void check(const Attention& a, View cu_seqlens, int64_t T) {
    const char* op = "gated_attention";
    if (a.Hkv < 1 || a.Hq < a.Hkv || a.Hq % a.Hkv) fail(op, "num_heads must be a positive multiple of num_kv_heads");
    if (a.D < 1 || 2 * a.cos.shape[1] > a.D) fail(op, "cos and sin must have at most half a head's width");
    if (a.layer < 0) fail(op, "layer must not be negative");
    if (!cuts(cu_seqlens, T)) fail(op, "cu_seqlens must rise from 0 to the number of tokens");
    for (int64_t b = 0; b < a.tables.size; ++b) {
        const BlockTable& table = a.tables[b];
        if (a.starts[b] < 0) fail(op, "starts must not be negative");
        if (a.new_rows(b) == 0) continue;
        if (table.size == 0 || a.starts[b] > table.size * table.tokens - a.new_rows(b))
            fail(op, "a BlockTable has no room for the new tokens");
        if (table.kv_heads != a.Hkv || table.width != kv_width(table.dtype, a.D))
            fail(op, "a BlockTable has other heads than this layer");
        if (a.layer >= table.layers) fail(op, "a BlockTable has too few layers");
    }
}

}  // namespace

void gated_attention(View proj, View q_norm, View k_norm, View cos, View sin, float eps, int64_t num_heads,
                     int64_t num_kv_heads, int64_t layer, View cu_seqlens, View starts, Tables tables, int64_t prefill,
                     View y) {
    const int64_t T = proj.shape[0], B = tables.size;
    Attention a{proj,         q_norm,       k_norm,          cos,     sin, y,     eps,
                num_heads,    num_kv_heads, q_norm.shape[0], 0,       0,   layer, cu_seqlens.i64(),
                starts.i64(), tables,       prefill != 0,    nullptr, 0};
    check(a, cu_seqlens, T);
    if (T == 0) return;
    a.G = a.Hq / a.Hkv, a.dims = round_up(a.D, 16);

    // The last tile reads whole groups of kFlashRows rows.
    for (int64_t b = 0; b < B; ++b)
        with_rows(a, b, [&](auto rows) { a.q_bytes = max64(a.q_bytes, decltype(rows)::query_bytes(a.D)); });
    a.q = static_cast<uint8_t*>(scratch(static_cast<size_t>((T * a.Hq + kFlashRows) * a.q_bytes)));
    memset(a.q + T * a.Hq * a.q_bytes, 0, static_cast<size_t>(kFlashRows * a.q_bytes));
    float* rows = scratch_f32(thread_count() * a.dims);
    const int64_t grain = max64(1, 8192 / ((a.G + 2) * a.D));
    parallel_for(T * a.Hkv, grain, [&](int64_t begin, int64_t end, int thread) {
        int64_t b = 0;
        for (int64_t i = begin; i < end; ++i) {
            b = sequence_of(a, b, i / a.Hkv);
            prepare(a, b, i / a.Hkv, i % a.Hkv, rows + thread * a.dims);
        }
    });

    int64_t first = 0, floats = 0;
    for (int64_t b = 0; b < B; ++b) {
        const int64_t more = a.decodes(b) && a.new_rows(b) ? a.pieces(b) * a.Hkv * piece_floats(a, b) : 0;
        if (b > first && floats + more > kPartialFloats) {
            decode_sequences(a, first, b);
            first = b, floats = 0;
        }
        floats += more;
    }
    decode_sequences(a, first, B);
    for (int64_t b = 0; b < B; ++b)
        if (!a.decodes(b) && a.new_rows(b) > 0)
            with_rows(a, b, [&](auto rows) {
                if constexpr (decltype(rows)::kPrefills) prefill_sequence<decltype(rows)>(a, b);
            });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
