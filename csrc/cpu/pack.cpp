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
    const BlockLayout at(Format::int8, source.view.shape[1]);
    uint16_t* d = reinterpret_cast<uint16_t*>(out);
    for (int64_t run = 0; run < at.runs; ++run)
        for (int r = 0; r < 16; ++r) {
            float w[kRun], largest = 0;
            source.run(n0 + r, run * kRun, w);
            for (int k = 0; k < kRun; ++k) largest = fabsf(w[k]) > largest ? fabsf(w[k]) : largest;
            const uint16_t half = float_to_f16(largest / 127.0f);
            const float step = f16_to_float(half), inverse = step > 0 ? 1.0f / step : 0.0f;
            d[run * 16 + r] = half;
            for (int k = 0; k < kRun; ++k) {
                const float v = rintf(w[k] * inverse);
                out[at.lines + run * 2048 + k / 4 * 64 + r * 4 + k % 4] =
                    static_cast<uint8_t>(128 + static_cast<int>(v > 127    ? 127
                                                                : v < -127 ? -127
                                                                           : v));
            }
        }
}

DELTAIC_INLINE f32x16 abs(f32x16 a) { return max(a, sub(zero(), a)); }
DELTAIC_INLINE f32x16 clamp(f32x16 a, float low, float high) { return max(set1(low), min(set1(high), a)); }

// d and s of one run of 16 rows (one row a lane; w [128 columns][16 rows]) that make the squared error smallest. d is
// tried with both signs, since the 16 values reach further below zero than above, around largest / (8 * 16); s of each
// group around amax / (8 |d|): a group whose largest number lies on the short side (7 steps) wants a step up to 8/7 of
// that.
void choose_scales(const float* w, f32x16* d, f32x16 (&s)[8]) {
    f32x16 amax[8], largest = zero();
    for (int g = 0; g < 8; ++g) {
        amax[g] = zero();
        for (int k = 0; k < kGroup; ++k) amax[g] = max(amax[g], abs(load(w + (g * kGroup + k) * 16)));
        largest = max(largest, amax[g]);
        s[g] = set1(1.0f);
    }
    *d = zero();
    f32x16 best = set1(INFINITY);
    for (int trial = 0; trial < 10; ++trial) {
        const float factor = (trial % 2 ? -1.0f : 1.0f) * (0.86f + 0.06f * static_cast<float>(trial / 2)) / 128.0f;
        float steps[16];
        store(steps, mul(largest, set1(factor)));
        for (float& step : steps) step = f16_to_float(float_to_f16(step));
        const f32x16 unit = load(steps), magnitude = max(abs(unit), set1(1e-30f));  // a zero row: any s, d = 0
        f32x16 total = zero(), chosen[8];
        for (int g = 0; g < 8; ++g) {
            const f32x16 ideal = div(mul(amax[g], set1(0.125f)), magnitude);
            f32x16 least = set1(INFINITY);
            chosen[g] = set1(1.0f);
            for (int candidate = 0; candidate < 6; ++candidate) {
                const f32x16 scale =
                    clamp(round(mul(ideal, set1(0.80f + 0.075f * static_cast<float>(candidate)))), 1.0f, 16.0f);
                const f32x16 step = mul(unit, scale),
                             inverse = div(set1(1.0f), if_less(abs(step), set1(1e-30f), set1(1e30f), step));
                f32x16 error = zero();
                for (int k = 0; k < kGroup; ++k) {
                    const f32x16 v = load(w + (g * kGroup + k) * 16), q = clamp(round(mul(v, inverse)), -8.0f, 7.0f);
                    const f32x16 miss = sub(v, mul(q, step));
                    error = fma(miss, miss, error);
                }
                chosen[g] = if_less(error, least, scale, chosen[g]);
                least = min(least, error);
            }
            total = add(total, least);
        }
        for (int g = 0; g < 8; ++g) s[g] = if_less(total, best, chosen[g], s[g]);
        *d = if_less(total, best, unit, *d);
        best = min(best, total);
    }
}

void pack_int4(const Source& source, int64_t n0, uint8_t* out) {
    const int64_t K = source.view.shape[1];
    const BlockLayout at(Format::int4, K);
    memset(out, 0, static_cast<size_t>(block_bytes(Format::int4, K)));
    uint16_t* halves = reinterpret_cast<uint16_t*>(out);
    for (int64_t run = 0; run < at.runs; ++run) {
        float w[kRun * 16], row[kRun], d[16], s[16];
        for (int r = 0; r < 16; ++r) {
            source.run(n0 + r, run * kRun, row);
            for (int k = 0; k < kRun; ++k) w[k * 16 + r] = row[k];
        }
        f32x16 unit, scale[8];
        choose_scales(w, &unit, scale);
        store(d, unit);
        for (int r = 0; r < 16; ++r) halves[run * 16 + r] = float_to_f16(d[r]);
        for (int g = 0; g < 8; ++g) {
            store(s, scale[g]);
            for (int r = 0; r < 16; ++r) {
                out[at.scales + run * 64 + g / 2 * 16 + r] |=
                    static_cast<uint8_t>((static_cast<int>(s[r]) - 1) << (g % 2 * 4));
                const float step = d[r] * s[r], inverse = step != 0 ? 1.0f / step : 0.0f;
                for (int k = 0; k < kGroup; ++k) {
                    const float v = rintf(w[(g * kGroup + k) * 16 + r] * inverse);
                    const int q = static_cast<int>(v > 7 ? 7 : v < -8 ? -8 : v) + 8;
                    out[at.lines + run * 1024 + g * 128 + k / 8 * 64 + r * 4 + k % 4] |=
                        static_cast<uint8_t>(q << (k / 4 % 2 * 4));
                }
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
                case Format::f32:
                    pack_f32(rows, b * 16, reinterpret_cast<float*>(out));
                    break;
                case Format::bf16:
                    pack_bf16(rows, b * 16, reinterpret_cast<uint16_t*>(out));
                    break;
                case Format::int8:
                    pack_int8(rows, b * 16, out);
                    break;
                case Format::int4:
                    pack_int4(rows, b * 16, out);
                    break;
            }
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
