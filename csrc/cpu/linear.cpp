// linear and swiglu: matrix products with everything that touches the same rows fused in (norm before; bias, activation,
// residual or the gated product after).
#include "core/pool.h"
#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

const float* normalised(View x, View norm, float eps) {
    if (!norm) return x.f32();
    const int64_t T = x.shape[0], D = x.shape[1];
    float* y = scratch_f32(T * D);
    parallel_for(T, max64(1, 16384 / max64(D, 1)), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) rms_norm_row(x.f32() + t * D, norm.f32(), D, eps, y + t * D);
    });
    return y;
}

void linear(View x, const Weight& w, View norm, float eps, View bias, int64_t activation, View residual, View y) {
    const int64_t T = x.shape[0], N = w.rows;
    const float* h = normalised(x, norm, eps);
    int64_t row0[Weight::kMaxSegments] = {};  // first output of each segment
    for (int s = 1; s < w.segments; ++s) row0[s] = row0[s - 1] + w.segment[s - 1].rows;
    const int64_t pairs = count_pairs(w);
    const auto finish = [&](int64_t n, int64_t valid, int64_t t, f32x16 sums) {
        if (bias) sums = add(sums, load_n(bias.f32() + n, valid));
        sums = activate(static_cast<Activation>(activation), sums);
        if (residual) sums = add(sums, load_n(residual.f32() + t * N + n, valid));
        store_n(y.f32() + t * N + n, sums, valid);
    };
    parallel_for(pairs, pair_grain(w, pairs, thread_count()), [&](int64_t begin, int64_t end, int) {
        multiply_pairs(w, 0, begin, end, h, T, [&](int s, int64_t pair, int64_t t, f32x16 even, f32x16 odd) {
            const int64_t n = pair * 32, rows = w.segment[s].rows;
            finish(row0[s] + n, min64(16, rows - n), t, even);
            if (n + 16 < rows) finish(row0[s] + n + 16, min64(16, rows - n - 16), t, odd);
        });
    });
}

void swiglu(View x, const Weight& w, View norm, float eps, View y) {
    const int64_t T = x.shape[0], I = y.shape[1];
    const float* h = normalised(x, norm, eps);
    const int64_t pairs = count_pairs(w);
    parallel_for(pairs, pair_grain(w, pairs, thread_count()), [&](int64_t begin, int64_t end, int) {
        multiply_pairs(w, 0, begin, end, h, T, [&](int, int64_t pair, int64_t t, f32x16 gate, f32x16 up) {
            store_n(y.f32() + t * I + pair * 16, mul(silu(gate), up), I - pair * 16);
        });
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
