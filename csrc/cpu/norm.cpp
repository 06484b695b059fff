// embed, rms_norm, rms_norm_pair, layer_norm: one row per token.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

DELTAIC_INLINE int64_t row_grain(int64_t D) { return max64(1, 16384 / max64(D, 1)); }

}  // namespace

// Rows of a packed matrix, unpacked. A table is one segment, so row n is lane n % 16 of block n / 16.
void embed(View ids, const Weight& table, View y) {
    const int64_t T = ids.shape[0], H = table.columns;
    if (table.segments != 1 || table.glu) fail("embed", "the table must be packed from one matrix");
    for (int64_t t = 0; t < T; ++t)
        if (ids.i64()[t] < 0 || ids.i64()[t] >= table.rows) fail("embed", "a token id is outside the table");
    parallel_for(T, row_grain(H), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const int64_t n = ids.i64()[t], lane = n % 16;
            const uint8_t* block = table.block(0, 0, n / 16);
            float* row = y.f32() + t * H;
            const int64_t runs = ceil_div(H, kRun);
            switch (table.segment[0].format) {
                case Format::f32:
                    for (int64_t k = 0; k < H; ++k) row[k] = reinterpret_cast<const float*>(block)[k * 16 + lane];
                    break;
                case Format::bf16:
                    for (int64_t k = 0; k < H; ++k)
                        row[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(block)[k / 2 * 32 + lane * 2 + k % 2]);
                    break;
                case Format::int8:
                    for (int64_t k = 0; k < H; ++k) row[k] = element_int8(block, runs, k, lane);
                    break;
                case Format::int4:
                    for (int64_t k = 0; k < H; ++k) row[k] = element_int4(block, runs, k, lane);
                    break;
            }
        }
    });
}

void rms_norm(View x, View weight, float eps, View y) {
    const int64_t T = x.shape[0], D = x.shape[1];
    parallel_for(T, row_grain(D), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) rms_norm_row(x.f32() + t * D, weight.f32(), D, eps, y.f32() + t * D);
    });
}

void rms_norm_pair(View a, View a_weight, View b, View b_weight, float eps, View y) {
    const int64_t T = a.shape[0], D = a.shape[1];
    parallel_for(T, row_grain(2 * D), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            rms_norm_row(a.f32() + t * D, a_weight.f32(), D, eps, y.f32() + t * 2 * D);
            rms_norm_row(b.f32() + t * D, b_weight.f32(), D, eps, y.f32() + t * 2 * D + D);
        }
    });
}

void layer_norm(View x, View weight, View bias, float eps, View y) {
    const int64_t T = x.shape[0], D = x.shape[1];
    parallel_for(T, row_grain(D), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const float* row = x.f32() + t * D;
            f32x16 sum = zero(), squares = zero();
            for (int64_t i = 0; i < D; i += 16) sum = add(sum, load_n(row + i, D - i));
            const float mean = reduce_add(sum) / static_cast<float>(D);
            const int64_t whole = D / 16 * 16;
            for (int64_t i = 0; i < whole; i += 16) {
                const f32x16 centred = sub(load(row + i), set1(mean));
                squares = fma(centred, centred, squares);
            }
            if (whole < D) {
                // Lanes past the end hold zero and would add mean^2: their mean is zero too.
                float means[16];
                for (int j = 0; j < 16; ++j) means[j] = whole + j < D ? mean : 0.0f;
                const f32x16 centred = sub(load_n(row + whole, D - whole), load(means));
                squares = fma(centred, centred, squares);
            }
            const float scale = 1.0f / sqrtf(reduce_add(squares) / static_cast<float>(D) + eps);
            for (int64_t i = 0; i < D; i += 16) {
                const f32x16 centred = mul(sub(load_n(row + i, D - i), set1(mean)), set1(scale));
                store_n(y.f32() + t * D + i,
                        fma(centred, load_n(weight.f32() + i, D - i), load_n(bias.f32() + i, D - i)), D - i);
            }
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
