// gated_delta_net_commit: the rows of a verify step that were accepted reach the states of all layers.
//
// One pass over S for up to four rows: every element is read once, goes through them in a register, and is written
// once, by the operations of decoding in their order, S <- e^g S + k dv^T. Plain decoding leaves the same bits.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Rows of the trace of one layer and value head, `stride` apart.
struct Accepted {
    const float *k, *dv, *decay;
    int64_t stride;
};

// Rows first..first + N on VB * 16 columns of S, `columns` of them real. What all rows of S need is in registers.
template <int64_t N, int VB>
DELTAIC_INLINE void apply(float* S, int64_t Dk, int64_t Dv, int64_t columns, const Accepted& rows, int64_t c,
                          int64_t first) {
    f32x16 decay[N], dv[N][VB];
    DELTAIC_UNROLL for (int64_t i = 0; i < N; ++i) {
        decay[i] = set1(rows.decay[(first + i) * rows.stride]);
        const float* from = rows.dv + (first + i) * rows.stride + c;
        DELTAIC_UNROLL for (int b = 0; b < VB; ++b) dv[i][b] = load_n(from + b * 16, columns - b * 16);
    }
    for (int64_t d = 0; d < Dk; ++d) {
        float* const row = S + d * Dv + c;
        f32x16 k[N];
        DELTAIC_UNROLL for (int64_t i = 0; i < N; ++i) k[i] = set1(rows.k[(first + i) * rows.stride + d]);
        DELTAIC_UNROLL for (int b = 0; b < VB; ++b) {
            f32x16 s = load_n(row + b * 16, columns - b * 16);
            DELTAIC_UNROLL for (int64_t i = 0; i < N; ++i) s = fma(k[i], dv[i][b], mul(decay[i], s));
            store_n(row + b * 16, s, columns - b * 16);
        }
    }
}

// The same on all columns of S [Dk, Dv], many of them at a time: its rows are read in their order.
template <int64_t N>
void apply_head(float* S, int64_t Dk, int64_t Dv, const Accepted& rows, int64_t first) {
    int64_t c = 0;
    for (; c + 128 <= Dv; c += 128) apply<N, 8>(S, Dk, Dv, 128, rows, c, first);
    for (; c + 32 <= Dv; c += 32) apply<N, 2>(S, Dk, Dv, 32, rows, c, first);
    for (; c < Dv; c += 16) apply<N, 1>(S, Dk, Dv, Dv - c, rows, c, first);
}

}  // namespace

void gated_delta_net_commit(View trace, int64_t Hk, View cu_seqlens, View counts, Views conv_states, Views states) {
    const char* const op = "gated_delta_net_commit";
    const int64_t L = trace.shape[0], T = trace.shape[1], W = trace.shape[2], B = states.size;
    const int64_t *starts = cu_seqlens.i64(), *n = counts.i64();
    if (starts[0] != 0 || starts[B] != T) fail(op, "cu_seqlens must begin with 0 and end with the number of rows");
    for (int64_t b = 0; b < B; ++b)
        if (n[b] < 0 || n[b] > starts[b + 1] - starts[b])
            fail(op, "counts must be between 0 and the rows of each sequence");
    if (B == 0) return;
    const int64_t Hv = states[0].shape[1], Dk = states[0].shape[2], Dv = states[0].shape[3];
    if (Hk < 1 || Hv % Hk != 0) fail(op, "value heads must be a multiple of key heads");
    const int64_t C = 2 * Hk * Dk + Hv * Dv, taps = conv_states[0].shape[1];

    parallel_for(L * B * Hv, grain_for(L * B * Hv * Dk * Dv * 4, L * B * Hv, 1), [&](int64_t begin, int64_t end, int) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t layer = task / (B * Hv), b = task / Hv % B, j = task % Hv;
            const float* row =
                trace.f32() + (layer * T + starts[b]) * W;  // u (C) | k (Hk*Dk) | dv (Hv*Dv) | decay (Hv)
            const Accepted rows{row + C + j / (Hv / Hk) * Dk, row + C + Hk * Dk + j * Dv,
                                row + C + Hk * Dk + Hv * Dv + j, W};
            float* S = states[b].f32() + (layer * Hv + j) * Dk * Dv;
            for (int64_t i = 0; i < n[b]; ++i)  // of the next head: short pieces that no stream leads to
                for (int64_t c = 0; c < Dv; c += 16)
                    prefetch(rows.dv + i * W + Dv + c), prefetch(rows.k + i * W + Dk + c);
            int64_t done = 0;
            for (; n[b] - done >= 4; done += 4) apply_head<4>(S, Dk, Dv, rows, done);
            if (n[b] - done == 3) apply_head<3>(S, Dk, Dv, rows, done);
            if (n[b] - done == 2) apply_head<2>(S, Dk, Dv, rows, done);
            if (n[b] - done == 1) apply_head<1>(S, Dk, Dv, rows, done);
            // A share of the channels: the last rows of old tail and accepted inputs together, oldest first.
            const int64_t first = C * j / Hv, last = C * (j + 1) / Hv;
            float* tail = conv_states[b].f32() + layer * taps * C;
            for (int64_t t = 0; t < taps; ++t) {
                const int64_t from = t + n[b] - taps;  // ascending t: an old row is read before it is overwritten
                const float* source = from < 0 ? tail + (from + taps) * C : row + from * W;
                if (source != tail + t * C)
                    memcpy(tail + t * C + first, source + first, static_cast<size_t>(last - first) * sizeof(float));
            }
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
