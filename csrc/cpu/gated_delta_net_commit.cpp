// gated_delta_net_commit: the rows of a verify step that were accepted reach the states of all layers.
//
// One pass over S: every element is read once, goes through all accepted rows in a register, and is written once, by
// the operations of decoding in their order, S <- e^g S + k dv^T. Plain decoding leaves the same bits.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

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
            const float *k = row + C + j / (Hv / Hk) * Dk, *dv = row + C + Hk * Dk + j * Dv,
                        *decay = row + C + Hk * Dk + Hv * Dv + j;
            float* S = states[b].f32() + (layer * Hv + j) * Dk * Dv;
            for (int64_t d = 0; d < Dk && n[b] > 0; ++d)
                for (int64_t c = 0; c < Dv; c += 16) {
                    f32x16 s = load_n(S + d * Dv + c, Dv - c);
                    for (int64_t i = 0; i < n[b]; ++i)
                        s = fma(set1(k[i * W + d]), load_n(dv + i * W + c, Dv - c), mul(set1(decay[i * W]), s));
                    store_n(S + d * Dv + c, s, Dv - c);
                }
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
