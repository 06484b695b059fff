// linear and swiglu: matrix products with everything that touches the same rows fused in (norm before; bias,
// activation, residual or the gated product after).
#include "core/pool.h"
#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Run `run` of row t as int8: x ~ scale * q for the run's columns; those past K are zero.
DELTAIC_INLINE void quantise_run(const float* x, int64_t K, const Activations& a, int64_t t, int64_t run) {
    const int64_t i = run * a.stride + t, columns = min64(kRun, K - run * kRun);
    f32x16 v[8], largest = zero(), smallest = zero();
    for (int64_t g = 0; g < 8; ++g) {
        v[g] = load_n(x + run * kRun + g * 16, max64(0, columns - g * 16));
        largest = max(largest, v[g]), smallest = min(smallest, v[g]);
    }
    const float amax = reduce_max(max(largest, sub(zero(), smallest)));
    const float step = amax / 127.0f, inverse = amax > 0 ? 127.0f / amax : 0.0f;
    int8_t* q = const_cast<int8_t*>(a.q) + i * kWordBytes;
    int16_t* bias = const_cast<int16_t*>(a.group_bias) + i * 8;
    for (int64_t g = 0; g < 8; ++g) v[g] = mul(v[g], set1(inverse));
    const_cast<float*>(a.scale)[i] = step;
    const_cast<int32_t*>(a.run_sum)[i] = store_run(q, v, bias);
}

// 64 columns of row t rounded to bfloat16; those past K are zero.
DELTAIC_INLINE void round_chunk(const float* x, int64_t K, const Activations& a, int64_t t, int64_t chunk) {
    uint16_t* out = const_cast<uint16_t*>(a.halves) + (chunk * a.stride + t) * 64;
    for (int64_t i = 0; i < 64; i += 16) store_bf16(out + i, load_n(x + chunk * 64 + i, max64(0, K - chunk * 64 - i)));
}

}  // namespace

Activations prepare(const float* x, int64_t T, int64_t K, View norm, float eps, Forms forms) {
    Activations a = scratch_activations(T, K, static_cast<bool>(norm), forms);
    if (!norm) a.x = x;
    if (!norm && !forms.integers && !forms.halves) return a;
    // Some tokens at a time, run after run: what is written then lies together.
    parallel_for(T, max64(8, 16384 / max64(K, 1)), [&](int64_t begin, int64_t end, int) {
        if (norm)
            for (int64_t t = begin; t < end; ++t)
                rms_norm_row(x + t * K, norm.f32(), K, eps, const_cast<float*>(a.x) + t * K);
        if (forms.integers)
            for (int64_t run = 0; run < a.runs; ++run)
                for (int64_t t = begin; t < end; ++t) quantise_run(a.x + t * K, K, a, t, run);
        if (forms.halves)
            for (int64_t chunk = 0; chunk < ceil_div(K, 64); ++chunk)
                for (int64_t t = begin; t < end; ++t) round_chunk(a.x + t * K, K, a, t, chunk);
    });
    return a;
}

void linear(View x, const Weight& w, View norm, float eps, View bias, int64_t activation, View residual, View y) {
    const int64_t T = x.shape[0], N = w.rows;
    const Activations a = prepare(x.f32(), T, x.shape[1], norm, eps, wanted_forms(w));
    int64_t row0[Weight::kMaxSegments] = {};  // first output of each segment
    for (int s = 1; s < w.segments; ++s) row0[s] = row0[s - 1] + w.segment[s - 1].rows;
    const auto finish = [&](int64_t n, int64_t valid, int64_t t, f32x16 sums) {
        if (bias) sums = add(sums, load_n(bias.f32() + n, valid));
        sums = activate(static_cast<Activation>(activation), sums);
        if (residual) sums = add(sums, load_n(residual.f32() + t * N + n, valid));
        store_n(y.f32() + t * N + n, sums, valid);
    };
    const bool plain = !bias && !residual && static_cast<Activation>(activation) == Activation::none;
    multiply_all(w, a, rows_of(y, N, 32), [&](int s, int64_t pair, int64_t t, f32x16 even, f32x16 odd) {
        const int64_t n = pair * 32, rows = w.segment[s].rows;
        if (plain && n + 32 <= rows) {
            float* const out = y.f32() + t * N + row0[s] + n;
            store(out, even), store(out + 16, odd);
            return;
        }
        finish(row0[s] + n, min64(16, rows - n), t, even);
        if (n + 16 < rows) finish(row0[s] + n + 16, min64(16, rows - n - 16), t, odd);
    });
}

void swiglu(View x, const Weight& w, View norm, float eps, View y) {
    const int64_t T = x.shape[0], I = y.shape[1];
    const Activations a = prepare(x.f32(), T, x.shape[1], norm, eps, wanted_forms(w));
    multiply_all(w, a, rows_of(y, I, 16), [&](int, int64_t pair, int64_t t, f32x16 gate, f32x16 up) {
        store_n(y.f32() + t * I + pair * 16, mul(silu(gate), up), I - pair * 16);
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
