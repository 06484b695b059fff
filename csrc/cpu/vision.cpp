// The vision tower's own operators: patch_embed (pixels to patches with positions) and vision_attention (no mask,
// whole-head rotation). The rest of the tower is layer_norm and linear.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/flash.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Rows and columns of the position table around one patch, and the weight of the second of each.
struct Corners {
    int64_t r0, r1, c0, c1;
    float fr, fc;
};

// Aligned corners: sample i of n lies at i * (side - 1) / (n - 1).
DELTAIC_INLINE void corners(int64_t i, int64_t n, int64_t side, int64_t* before, int64_t* after, float* weight) {
    const float place = static_cast<float>(i) * static_cast<float>(side - 1) / static_cast<float>(max64(n - 1, 1));
    *before = min64(static_cast<int64_t>(place), side - 1);
    *after = min64(*before + 1, side - 1);
    *weight = place - static_cast<float>(*before);
}

constexpr int64_t kPanelPatches = 2048;   // patches whose normalised pixels are in memory at a time
constexpr int64_t kHeadBytes = 16 << 20;  // packed q, k, v of the heads that are worked on at a time
constexpr int64_t kQueryRows = 192;       // query rows of a tile

struct QueryTile {
    int64_t segment, first, rows;
};

}  // namespace

void patch_embed(View image, const Weight& weight, View bias, View pos_embed, int64_t patch_size, int64_t merge_size,
                 View mean, View std, View y) {
    const int64_t h = image.shape[0], w = image.shape[1], p = patch_size, m = merge_size, V = weight.rows,
                  K = weight.columns;
    if (p < 1 || m < 1 || p > h + w || m > h + w)
        fail("patch_embed", "patch_size and merge_size must be positive and within the image");
    if (h % (p * m) || w % (p * m))
        fail("patch_embed", "height and width of the image must be multiples of patch_size * merge_size");
    if (K != 3 * p * p) fail("patch_embed", "the weight must have 3 * patch_size^2 columns");
    if (weight.segments != 1 || weight.glu) fail("patch_embed", "the weight must be packed from one matrix");
    const int64_t grid_h = h / p, grid_w = w / p, patches = grid_h * grid_w;
    if (y.shape[0] != patches) fail("patch_embed", "y must have one row per patch");
    int64_t side = 0;
    while (side * side < pos_embed.shape[0]) ++side;
    if (side == 0 || side * side != pos_embed.shape[0])
        fail("patch_embed", "pos_embed must have a square number of rows");

    // (value/255 - mean) / std of the 256 possible values
    float* levels = scratch_f32(3 * 256);
    for (int64_t c = 0; c < 3; ++c)
        for (int64_t i = 0; i < 256; ++i)
            levels[c * 256 + i] = (static_cast<float>(i) / 255.0f - mean.f32()[c]) / std.f32()[c];

    const int64_t panel = min64(patches, kPanelPatches);
    float* x = scratch_f32(panel * K);
    Corners* places = static_cast<Corners*>(scratch(static_cast<size_t>(panel) * sizeof(Corners)));
    for (int64_t begin = 0; begin < patches; begin += panel) {
        const int64_t count = min64(panel, patches - begin);
        parallel_for(count, 16, [&](int64_t first, int64_t last, int) {
            for (int64_t i = first; i < last; ++i) {
                // Merge-block order: m x m patches of a block are neighbours, blocks in reading order.
                const int64_t block = (begin + i) / (m * m), within = (begin + i) % (m * m), across = grid_w / m;
                const int64_t row = block / across * m + within / m, col = block % across * m + within % m;
                Corners& at = places[i];
                corners(row, grid_h, side, &at.r0, &at.r1, &at.fr);
                corners(col, grid_w, side, &at.c0, &at.c1, &at.fc);
                float* out = x + i * K;
                for (int64_t py = 0; py < p; ++py) {
                    const uint8_t* pixels = image.u8() + ((row * p + py) * w + col * p) * 3;
                    for (int64_t c = 0; c < 3; ++c)
                        for (int64_t px = 0; px < p; ++px)
                            out[(c * p + py) * p + px] = levels[c * 256 + pixels[px * 3 + c]];
                }
            }
        });
        const auto finish = [&](int64_t n, int64_t i, f32x16 sums) {
            const Corners& at = places[i];
            const int64_t valid = V - n;
            const float* table = pos_embed.f32() + n;
            const f32x16 fr = set1(at.fr), fc = set1(at.fc), gr = set1(1.0f - at.fr), gc = set1(1.0f - at.fc);
            const f32x16 top = add(mul(gc, load_n(table + (at.r0 * side + at.c0) * V, valid)),
                                   mul(fc, load_n(table + (at.r0 * side + at.c1) * V, valid)));
            const f32x16 bottom = add(mul(gc, load_n(table + (at.r1 * side + at.c0) * V, valid)),
                                      mul(fc, load_n(table + (at.r1 * side + at.c1) * V, valid)));
            const f32x16 position = add(mul(gr, top), mul(fr, bottom));
            store_n(y.f32() + (begin + i) * V + n, add(add(sums, load_n(bias.f32() + n, valid)), position), valid);
        };
        const Activations a = prepare(x, count, K, View{}, 0.0f, wanted_forms(weight));
        multiply_all(weight, a, {}, [&](int, int64_t pair, int64_t i, f32x16 even, f32x16 odd) {
            finish(pair * 32, i, even);
            if (pair * 32 + 16 < V) finish(pair * 32 + 16, i, odd);
        });
    }
}

namespace {

// Products: of floats, or of bfloat16 pairs where that is asked for and the instruction set has them.
template <class Products>
void attend(View qkv, View cos, View sin, int64_t num_heads, View cu_seqlens, View y) {
    using Number = typename Products::Number;
    const int64_t P = qkv.shape[0], V = y.shape[1], segments = cu_seqlens.shape[0] - 1;
    if (num_heads < 1 || V % num_heads) fail("vision_attention", "the width must be a multiple of num_heads");
    const int64_t D = V / num_heads, F = cos.shape[1], dims = round_up(D, 16);
    if (2 * F != D) fail("vision_attention", "cos and sin must have half a head's width");
    if (!cuts(cu_seqlens, P)) fail("vision_attention", "cu_seqlens must rise from 0 to the number of patches");
    if (P == 0 || V == 0) return;
    const int64_t* cut = cu_seqlens.i64();

    // Each segment is padded to whole groups of 16 patches: padded rows in total, group g of a segment at first_group +
    // g.
    int64_t groups = 0, tiles = 0;
    for (int64_t s = 0; s < segments; ++s) {
        groups += ceil_div(cut[s + 1] - cut[s], 16);
        tiles += ceil_div(cut[s + 1] - cut[s], kQueryRows);
    }
    struct Group {
        int64_t segment, first, segment_group;
    };
    Group* group = static_cast<Group*>(scratch(static_cast<size_t>(groups) * sizeof(Group)));
    QueryTile* tile = static_cast<QueryTile*>(scratch(static_cast<size_t>(tiles) * sizeof(QueryTile)));
    int64_t* first_group = static_cast<int64_t*>(scratch(static_cast<size_t>(segments) * sizeof(int64_t)));
    groups = tiles = 0;
    for (int64_t s = 0; s < segments; ++s) {
        first_group[s] = groups;
        for (int64_t i = cut[s]; i < cut[s + 1]; i += 16) group[groups++] = {s, i, first_group[s]};
        for (int64_t i = cut[s]; i < cut[s + 1]; i += kQueryRows)
            tile[tiles++] = {s, i, min64(kQueryRows, cut[s + 1] - i)};
    }

    // Per head: q [P + padding][stride], keys [groups][lanes of D][16], values [segment][dims / 16][16 * groups of the
    // segment, in lanes][16].
    const int64_t q_stride = round_up(D, Products::kNumbers), lanes = ceil_div(D, Products::kNumbers);
    const int64_t q_floats = ceil_div((P + kFlashRows) * q_stride, Products::kNumbers), k_floats = groups * lanes * 16,
                  v_floats = groups * dims * 16 / Products::kNumbers;
    const int64_t together = min64(num_heads, max64(1, kHeadBytes / 4 / (q_floats + k_floats + v_floats)));
    float* queries = scratch_f32(together * q_floats);
    float* keys = scratch_f32(together * k_floats);
    float* values = scratch_f32(together * v_floats);
    const int64_t score_floats = flash_score_floats<Products>(min64(kQueryRows, P));
    const int64_t tile_floats = score_floats + flash_state_floats(min64(kQueryRows, P), D);
    const int64_t row_floats = 17 * round_up(D, 16);
    float* work = scratch_f32(thread_count() * (tile_floats + row_floats));
    const float scale = kLog2E / sqrtf(static_cast<float>(D));
    const auto head_queries = [&](int64_t h) { return reinterpret_cast<Number*>(queries + h * q_floats); };

    for (int64_t head0 = 0; head0 < num_heads; head0 += together) {
        const int64_t heads = min64(together, num_heads - head0);
        parallel_for(heads * groups, 4, [&](int64_t begin, int64_t end, int thread) {
            float* rotated = work + thread * (tile_floats + row_floats);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t h = item / groups, g = item % groups;
                const Group& at = group[g];
                const int64_t n = min64(16, cut[at.segment + 1] - at.first);
                const uint8_t *k_rows[16], *v_rows[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const int64_t t = at.first + min64(i, n - 1);
                    const float* row = qkv.f32() + t * 3 * V + (head0 + h) * D;
                    v_rows[i] = reinterpret_cast<const uint8_t*>(row + 2 * V);
                    k_rows[i] = reinterpret_cast<const uint8_t*>(rotated + i * D);
                    memcpy(rotated + i * D, row + V, static_cast<size_t>(D) * 4);
                    rotate_row(rotated + i * D, cos.f32() + t * F, sin.f32() + t * F, F);
                    if (i >= n) continue;
                    float* q = rotated + 16 * D;
                    memcpy(q, row, static_cast<size_t>(D) * 4);
                    rotate_row(q, cos.f32() + t * F, sin.f32() + t * F, F);
                    Number* numbers = head_queries(h) + t * q_stride;
                    for (int64_t d = 0; d < D; d += 16)
                        Products::store_number(numbers + d, mul(load_n(q + d, D - d), set1(scale)), q_stride - d);
                }
                Products::template pack_keys<Stored::f32>(k_rows, D, keys + h * k_floats + g * lanes * 16);
                const int64_t length = cut[at.segment + 1] - cut[at.segment];
                float* v = values + h * v_floats +
                           (at.segment_group * dims + at.first - cut[at.segment]) / Products::kNumbers * 16;
                Products::template pack_values<Stored::f32>(v_rows, n, D, ceil_div(length, Products::kNumbers) * 16, v);
            }
        });
        for (int64_t h = 0; h < heads; ++h)
            memset(head_queries(h) + P * q_stride, 0, static_cast<size_t>(kFlashRows * q_stride) * sizeof(Number));

        parallel_for(heads * tiles, 1, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t h = item / tiles;
                const QueryTile& at = tile[item % tiles];
                const int64_t length = cut[at.segment + 1] - cut[at.segment], base = first_group[at.segment];
                const float* k = keys + h * k_floats + base * lanes * 16;
                const float* v = values + h * v_floats + base * dims / Products::kNumbers * 16;
                float* memory = work + thread * (tile_floats + row_floats);
                const auto t = flash_tile<Products>(head_queries(h) + at.first * q_stride, q_stride, at.rows, D, memory,
                                                    memory + score_floats);
                flash_begin(t);
                for (int64_t key = 0; key < length; key += Products::kKeys) {
                    const int64_t n = min64(Products::kKeys, length - key);
                    flash_keys(t, k + key * lanes, v + key / Products::kNumbers * 16,
                               ceil_div(length, Products::kNumbers) * 16, n, [&](int64_t) { return n; });
                }
                for (int64_t r = 0; r < at.rows; ++r) {
                    float* out = y.f32() + (at.first + r) * V + (head0 + h) * D;
                    const f32x16 total = set1(flash_total(t, r));
                    for (int64_t d = 0; d < D; d += 16) store_n(out + d, div(load(t.out + r * dims + d), total), D - d);
                }
            }
        });
    }
}

}  // namespace

void vision_attention(View qkv, View cos, View sin, int64_t num_heads, View cu_seqlens, int64_t rounded, View y) {
    rounded ? attend<HalfProducts>(qkv, cos, sin, num_heads, cu_seqlens, y)
            : attend<FloatProducts>(qkv, cos, sin, num_heads, cu_seqlens, y);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
