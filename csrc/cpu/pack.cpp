// Rows of a plain matrix -> blocks of 16 rows (layouts: core/view.h).
#include "core/error.h"
#include "core/pool.h"
#include "cpu/quant.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Element (row, column) of a float or bfloat16 matrix; rows past the end read as zero.
struct Source {
    View view;
    DELTAIC_INLINE float at(int64_t n, int64_t k) const {
        if (n >= view.shape[0]) return 0.0f;
        const int64_t i = n * view.shape[1] + k;
        return view.dtype == Dtype::f32 ? view.f32()[i] : bf16_to_float(view.u16()[i]);
    }
    // 128 columns from k on; columns past the end read as zero.
    DELTAIC_INLINE void run(int64_t n, int64_t k, float* out) const {
        for (int64_t i = 0; i < kRun; ++i) out[i] = k + i < view.shape[1] ? at(n, k + i) : 0.0f;
    }
};

void pack_f32(const Source& source, int64_t n0, float* out) {
    const int64_t K = source.view.shape[1];
    for (int64_t k = 0; k < K; ++k)
        for (int r = 0; r < 16; ++r) out[k * 16 + r] = source.at(n0 + r, k);
}

void pack_bf16(const Source& source, int64_t n0, uint16_t* out) {
    const int64_t K = source.view.shape[1];
    for (int64_t k = 0; k < K; k += 2)
        for (int r = 0; r < 16; ++r) {
            out[k * 16 + 2 * r] = float_to_bf16(source.at(n0 + r, k));
            out[k * 16 + 2 * r + 1] = k + 1 < K ? float_to_bf16(source.at(n0 + r, k + 1)) : uint16_t{0};
        }
}

void pack_int8(const Source& source, int64_t n0, uint8_t* out) {
    const int64_t K = source.view.shape[1], runs = ceil_div(K, kRun);
    uint16_t* d = reinterpret_cast<uint16_t*>(out + runs * 2048);
    for (int64_t run = 0; run < runs; ++run)
        for (int r = 0; r < 16; ++r) {
            float w[kRun], largest = 0;
            source.run(n0 + r, run * kRun, w);
            for (int k = 0; k < kRun; ++k) largest = fabsf(w[k]) > largest ? fabsf(w[k]) : largest;
            const uint16_t half = float_to_f16(largest / 127.0f);
            const float step = f16_to_float(half), inverse = step > 0 ? 1.0f / step : 0.0f;
            d[run * 16 + r] = half;
            for (int k = 0; k < kRun; ++k) {
                const float v = rintf(w[k] * inverse);
                out[run * 2048 + k / 4 * 64 + r * 4 + k % 4] = static_cast<uint8_t>(128 + static_cast<int>(v > 127 ? 127 : v < -127 ? -127 : v));
            }
        }
}

// Squared error of a group with step `step`; `inverse` is 1 / step.
DELTAIC_INLINE float group_error(f32x16 w, float step, float inverse) {
    const f32x16 q = max(set1(-8.0f), min(set1(7.0f), round(mul(w, set1(inverse)))));
    const f32x16 error = fma(q, set1(-step), w);
    return reduce_add(mul(error, error));
}

// For one run: the d (either sign, since the 16 values reach further below zero than above) and the s of each group with the
// smallest squared error. d is searched around largest / (8 * 16), s around each group's own best.
float choose_scales(const f32x16 (&w)[8], int (&s)[8]) {
    float largest = 0, amax[8];
    for (int g = 0; g < 8; ++g) {
        amax[g] = reduce_max(max(w[g], sub(zero(), w[g])));
        largest = amax[g] > largest ? amax[g] : largest;
    }
    for (int g = 0; g < 8; ++g) s[g] = 1;
    if (!(largest > 0) || f16_to_float(float_to_f16(largest / 128.0f)) == 0) return 0;
    float best = INFINITY, best_d = 0;
    for (int sign = -1; sign <= 1; sign += 2)
        for (int trial = 0; trial < 8; ++trial) {
            const float d = f16_to_float(float_to_f16(static_cast<float>(sign) * largest / 128.0f * (0.79f + 0.04f * static_cast<float>(trial))));
            float total = 0;
            int chosen[8];
            for (int g = 0; g < 8 && total < best; ++g) {
                // The best step of 16 Gaussian numbers lies between 0.75 and 1.05 of amax / 8.
                const float ideal = amax[g] / (8.0f * fabsf(d));
                int low = static_cast<int>(ideal * 0.78f), high = static_cast<int>(ideal * 1.1f) + 1;
                low = low < 1 ? 1 : low > 16 ? 16 : low, high = high > 16 ? 16 : high < 1 ? 1 : high;
                float least = INFINITY;
                for (int candidate = low; candidate <= high; ++candidate) {
                    const float step = d * static_cast<float>(candidate), error = group_error(w[g], step, 1.0f / step);
                    if (error < least) least = error, chosen[g] = candidate;
                }
                total += least;
            }
            if (total < best) {
                best = total, best_d = d;
                for (int g = 0; g < 8; ++g) s[g] = chosen[g];
            }
        }
    return best_d;
}

void pack_int4(const Source& source, int64_t n0, uint8_t* out) {
    const int64_t K = source.view.shape[1], runs = ceil_div(K, kRun);
    memset(out, 0, static_cast<size_t>(block_bytes(Format::int4, K)));
    uint16_t* halves = reinterpret_cast<uint16_t*>(out + runs * 1088);
    for (int64_t run = 0; run < runs; ++run)
        for (int r = 0; r < 16; ++r) {
            float row[kRun];
            source.run(n0 + r, run * kRun, row);
            f32x16 w[8];
            for (int g = 0; g < 8; ++g) w[g] = load(row + g * kGroup);
            int s[8];
            const float d = choose_scales(w, s);
            halves[run * 16 + r] = float_to_f16(d);
            for (int g = 0; g < 8; ++g) {
                out[runs * 1024 + run * 64 + g / 2 * 16 + r] |= static_cast<uint8_t>((s[g] - 1) << (g % 2 * 4));
                const float step = d * static_cast<float>(s[g]), inverse = step != 0 ? 1.0f / step : 0.0f;
                for (int k = 0; k < kGroup; ++k) {
                    const float v = rintf(row[g * kGroup + k] * inverse);
                    const int q = static_cast<int>(v > 7 ? 7 : v < -8 ? -8 : v) + 8;
                    out[run * 1024 + g * 128 + k / 8 * 64 + r * 4 + k % 4] |= static_cast<uint8_t>(q << (k / 4 % 2 * 4));
                }
            }
        }
}

}  // namespace

// Block b of `source` becomes block first + b * step of `packed`.
void pack(View source, int64_t format, int64_t first, int64_t step, View packed) {
    if (format < 0 || format > static_cast<int64_t>(Format::int4)) fail("pack", "unknown format");
    const int64_t blocks = ceil_div(source.shape[0], kBlockRows);
    const int64_t bytes = block_bytes(static_cast<Format>(format), source.shape[1]);
    if (first < 0 || step < 1 || (blocks > 0 && (first + (blocks - 1) * step + 1) * bytes > packed.shape[0]))
        fail("pack", "the packed array is too small for these blocks");
    const Source rows{source};
    parallel_for(blocks, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            uint8_t* out = packed.u8() + (first + b * step) * bytes;
            switch (static_cast<Format>(format)) {
                case Format::f32: pack_f32(rows, b * 16, reinterpret_cast<float*>(out)); break;
                case Format::bf16: pack_bf16(rows, b * 16, reinterpret_cast<uint16_t*>(out)); break;
                case Format::int8: pack_int8(rows, b * 16, out); break;
                case Format::int4: pack_int4(rows, b * 16, out); break;
            }
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
