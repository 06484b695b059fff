// gated_delta_net: everything of a Gated DeltaNet layer between its input and its output projection.
//
// One task is one key head of one sequence, with the Hv/Hk value heads that read it. Its channels of the convolution
// state and its states S are touched by nobody else, so a layer is one parallel region without a barrier.
//
// Prompts use the same recurrence as decoding, not the chunked form. Per token and 16 elements of S [Dk, Dv] it takes
// four vector operations: decay, rank-one update, and the products of the new S with the k and q of the next token,
//     dv = beta (v - e^g S^T k)     o = e^g S^T q + (k.q) dv     S <- e^g S + k dv^T
// all in one pass over a block of columns that stays in the first-level cache, with one load and one store. The chunked
// form takes three (K S, Q S and K^T W) plus 2 C / Dk for its C x C triangles, that is 4 at C = 64 and 3.25 at C = 16,
// and then has the solve's dependent steps besides. So there is little to win, and the recurrence gives the same bits
// however a prompt is split, and needs no care with the overflow of e^(G_i - G_j).
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

constexpr int64_t kTaps = 4;
constexpr int64_t kChunk = 64;                  // tokens whose q, k, v are prepared at a time
constexpr int64_t kInPlace = 4;                 // up to so many tokens a dense block does not pay
constexpr int kColumns = kWidth == 16 ? 4 : 2;  // vectors of 16 columns in one block: accumulators fill the registers
constexpr int kWide = kWidth == 16 ? 8 : 2;     // the same where few tokens pass over S: rows are read as they lie
constexpr int64_t kWideRows = 8;                // rows of a verify step, which does not write S, that count as few
constexpr int64_t kAhead = 8;                   // rows fetched ahead: the hardware does not follow such strides
constexpr float kL2Eps = 1e-6f;                 // fixed by the model, not rms_norm_eps
constexpr float kSmallestExponent = -87.3f;     // below it e^x is subnormal
constexpr int64_t kVerified = kChunk;           // rows of a sequence that a verify step may have

struct Gates {
    float decay, beta, kq;  // e^g, beta, k.q
};

// Inputs u [T, C] of one sequence and the three rows before them.
struct Window {
    const float* u;
    int64_t stride;
    const float* state;  // [3, C], oldest first
    int64_t channels;
    DELTAIC_INLINE const float* row(int64_t t) const {
        return t >= 0 ? u + t * stride : state + (t + kTaps - 1) * channels;
    }
};

DELTAIC_INLINE int64_t padded(int64_t n) { return ceil_div(n, 16) * 16; }

// out[i] = silu(sum_j weight[j] * u[t0 + i - 3 + j]) for channels [c, c + n) and `count` tokens; lanes up to padded(n)
// get 0. Weights and the last rows stay in registers while the tokens pass.
void convolve(const Window& window, const float* weight, int64_t c, int64_t n, int64_t t0, int64_t count, float* out) {
    const int64_t width = padded(n);
    for (int64_t d = 0; d < n; d += 16) {
        f32x16 w[kTaps], u[kTaps];
        for (int64_t j = 0; j < kTaps; ++j) {
            w[j] = load_n(weight + j * window.channels + c + d, n - d);
            u[j] = load_n(window.row(t0 + j - (kTaps - 1)) + c + d, n - d);
        }
        for (int64_t i = 0; i < count; ++i) {
            f32x16 sum = zero();
            for (int64_t j = 0; j < kTaps; ++j) sum = fma(w[j], u[j], sum);
            store(out + i * width + d, silu(sum));
            for (int64_t j = 0; j + 1 < kTaps; ++j) u[j] = u[j + 1];
            if (i + 1 < count) u[kTaps - 1] = load_n(window.u + (t0 + i + 1) * window.stride + c + d, n - d);
        }
    }
}

// The rows that the next token's convolution will need: the last three of state and u together.
void advance(const Window& window, int64_t T, int64_t c, int64_t n, float* state) {
    for (int64_t j = 0; j < kTaps - 1; ++j) {
        const float* from = window.row(T + j - (kTaps - 1)) + c;  // a later row than j, so ascending order is safe
        memcpy(state + j * window.channels + c, from, static_cast<size_t>(n) * sizeof(float));
    }
}

DELTAIC_INLINE float dot(const float* a, const float* b, int64_t width) {
    f32x16 sum = zero();
    for (int64_t d = 0; d < width; d += 16) sum = fma(load(a + d), load(b + d), sum);
    return reduce_add(sum);
}

DELTAIC_INLINE void unit_l2(float* x, int64_t width, float factor) {
    const f32x16 scale = set1(factor / sqrtf(dot(x, x, width) + kL2Eps));
    for (int64_t d = 0; d < width; d += 16) store(x + d, mul(load(x + d), scale));
}

// log(1 + e^x)
DELTAIC_INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Where a verify step leaves the errors dv [n] of one value head, rows `stride` apart; `columns` of the block are real.
struct Errors {
    float* dv;
    int64_t stride, columns;
};

// Rows that are called from memory while S is worked on, which needs none: those that come next, a row with each token.
struct Ahead {
    struct Rows {
        const float* first;
        int64_t stride;
    } rows[5];
    int count = 0;
    DELTAIC_INLINE void add(const float* first, int64_t stride) { rows[count++] = {first, stride}; }
    DELTAIC_INLINE Ahead columns(int64_t c) const {
        Ahead a = *this;
        for (int r = 0; r < count; ++r) a.rows[r].first += c;
        return a;
    }
};

// A block of columns of S: rows `stride` apart.
struct Block {
    float* data;
    int64_t stride;
};

// One token on VB * 16 columns: to <- decay from + now dv^T, and the products of that with the next token's k and q.
// Without kStore nobody wants it but these products.
template <int VB, bool kStore>
DELTAIC_INLINE void update(const Block& from, const Block& to, int64_t Dk, f32x16 decay, const float* now,
                           const f32x16 (&dv)[VB], const float* next_k, const float* next_q, f32x16 (&sk)[VB],
                           f32x16 (&sq)[VB]) {
    for (int64_t d = 0; d < Dk; ++d) {
        const f32x16 kd = set1(now[d]), k1 = set1(next_k[d]), q1 = set1(next_q[d]);
        DELTAIC_UNROLL for (int b = 0; b < VB; ++b) {
            const f32x16 s = fma(kd, dv[b], mul(decay, load(from.data + d * from.stride + b * 16)));
            if (kStore) store(to.data + d * to.stride + b * 16, s);
            sk[b] = fma(s, k1, sk[b]);
            sq[b] = fma(s, q1, sq[b]);
        }
    }
}

// The delta rule for n tokens on VB * 16 columns of S; v [n, width] becomes o. Between the first and the last token the
// columns lie in `work`, which may be S.
// Products with the next token's k and q are taken while S is in registers anyway. Every sum runs over d = 0..Dk-1 in
// order, whatever n and VB are, so that the bits do not depend on how tokens come. With `errors`, dv is stored and S
// stays as it is.
template <int VB>
DELTAIC_INLINE void delta_rule(const Block& S, const Block& work, int64_t Dk, const float* q, const float* k,
                               int64_t k_width, const Gates* gates, float* v, int64_t v_width, int64_t n,
                               const Errors& errors, const Ahead& ahead) {
    const bool strided = S.stride > VB * 16;  // what lies in one piece is fetched ahead by the hardware, and faster
    f32x16 sk[VB], sq[VB], dv[VB];
    DELTAIC_UNROLL for (int b = 0; b < VB; ++b) sk[b] = sq[b] = zero();
    for (int64_t d = 0; d < Dk; ++d) {
        const f32x16 kd = set1(k[d]), qd = set1(q[d]);
        DELTAIC_UNROLL for (int b = 0; b < VB; ++b) {
            if (strided) prefetch(S.data + (d + kAhead) * S.stride + b * 16);
            const f32x16 s = load(S.data + d * S.stride + b * 16);
            sk[b] = fma(s, kd, sk[b]);
            sq[b] = fma(s, qd, sq[b]);
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const f32x16 decay = set1(gates[i].decay);
        for (int r = 0; r < ahead.count; ++r)
            for (int b = 0; b < VB; ++b) prefetch_far(ahead.rows[r].first + i * ahead.rows[r].stride + b * 16);
        DELTAIC_UNROLL for (int b = 0; b < VB; ++b) {
            float* value = v + i * v_width + b * 16;
            dv[b] = mul(set1(gates[i].beta), sub(load(value), mul(decay, sk[b])));
            store(value, fma(set1(gates[i].kq), dv[b], mul(decay, sq[b])));
            if (errors.dv) store_n(errors.dv + i * errors.stride + b * 16, dv[b], errors.columns - b * 16);
            sk[b] = sq[b] = zero();
        }
        const float* now = k + i * k_width;
        const Block& from = i == 0 ? S : work;
        if (i + 1 == n) {
            if (errors.dv) break;
            const auto last = [&](const Block& from) __attribute__((always_inline)) {
                for (int64_t d = 0; d < Dk; ++d) {
                    const f32x16 kd = set1(now[d]);
                    DELTAIC_UNROLL for (int b = 0; b < VB; ++b) {
                        const f32x16 s = mul(decay, load(from.data + d * from.stride + b * 16));
                        store(S.data + d * S.stride + b * 16, fma(kd, dv[b], s));
                    }
                }
            };
            from.data == S.data ? last(S) : last(work);
            break;
        }
        const float *next_k = now + k_width, *next_q = q + (i + 1) * k_width;
        if (errors.dv && i + 2 == n) {
            update<VB, false>(from, work, Dk, decay, now, dv, next_k, next_q, sk, sq);
        } else {
            update<VB, true>(from, work, Dk, decay, now, dv, next_k, next_q, sk, sq);
        }
    }
}

// The same for all Dv columns. `dense` [Dk][columns of a block] holds what is worked on, if more tokens than a few pass
// over it, if S is to stay or if the columns have to be padded. `dv` (rows `dv_stride` apart), where given: takes the
// errors, and S stays as it is.
void delta_rule_head(float* S, int64_t Dk, int64_t Dv, const float* q, const float* k, const Gates* gates, float* v,
                     int64_t n, float* dense, float* dv, int64_t dv_stride, const Ahead& ahead) {
    const int64_t k_width = padded(Dk), v_width = padded(Dv);
    const bool pad = Dv % 16 != 0, few = n <= kInPlace;
    for (int64_t c = 0; c < v_width;) {
        const bool wide = !pad && n <= (dv ? kWideRows : 1) && v_width - c >= kWide * 16;
        const bool full = v_width - c >= kColumns * 16, pair = v_width - c >= 32;
        const int64_t columns = wide ? kWide * 16 : full ? kColumns * 16 : pair ? 32 : 16;
        const Block packed{dense, columns}, rows{S + c, Dv}, block = pad ? packed : rows;
        if (pad) {
            for (int64_t d = 0; d < Dk; ++d)
                for (int64_t b = 0; b < columns; b += 16)
                    store(dense + d * columns + b, load_n(S + d * Dv + c + b, Dv - c - b));
        }
        const Block work = few && !dv ? block : packed;
        const Errors errors{dv ? dv + c : nullptr, dv_stride, Dv - c};
        if (wide) {
            delta_rule<kWide>(block, work, Dk, q, k, k_width, gates, v + c, v_width, n, errors, ahead.columns(c));
        } else if (full) {
            delta_rule<kColumns>(block, work, Dk, q, k, k_width, gates, v + c, v_width, n, errors, ahead.columns(c));
        } else if (pair) {
            delta_rule<2>(block, work, Dk, q, k, k_width, gates, v + c, v_width, n, errors, ahead.columns(c));
        } else {
            delta_rule<1>(block, work, Dk, q, k, k_width, gates, v + c, v_width, n, errors, ahead.columns(c));
        }
        if (pad && !dv) {
            for (int64_t d = 0; d < Dk; ++d)
                for (int64_t b = 0; b < columns; b += 16)
                    store_n(S + d * Dv + c + b, load(dense + d * columns + b), Dv - c - b);
        }
        c += columns;
    }
}

// y = norm * o / sqrt(mean(o^2) + eps) * silu(z); lanes of o past Dv are 0
DELTAIC_INLINE void gated_norm(const float* o, const float* norm, const float* z, int64_t Dv, float eps, float* y) {
    const f32x16 scale = set1(1.0f / sqrtf(dot(o, o, padded(Dv)) / static_cast<float>(Dv) + eps));
    for (int64_t d = 0; d < Dv; d += 16) {
        const f32x16 unit = mul(mul(load(o + d), scale), load_n(norm + d, Dv - d));
        store_n(y + d, mul(unit, silu(load_n(z + d, Dv - d))), Dv - d);
    }
}

}  // namespace

void gated_delta_net(View proj, View conv_weight, View A_log, View dt_bias, View norm, float eps, int64_t Hk,
                     int64_t Dk, View cu_seqlens, Views conv_states, Views states, View trace, View y) {
    const int64_t T = proj.shape[0], P = proj.shape[1], Hv = A_log.shape[0], Dv = norm.shape[0];
    if (Hk < 1 || Dk < 1 || Dv < 1 || Hv % Hk != 0)
        fail("gated_delta_net", "value heads must be a multiple of key heads");
    const int64_t B = states.size, group = Hv / Hk, C = 2 * Hk * Dk + Hv * Dv;
    const int64_t* starts = cu_seqlens.i64();
    if (starts[0] != 0 || starts[B] != T)
        fail("gated_delta_net", "cu_seqlens must begin with 0 and end with the number of rows");
    for (int64_t b = 0; b < B; ++b)
        if (starts[b] > starts[b + 1]) fail("gated_delta_net", "cu_seqlens must not decrease");
    for (int64_t b = 0; b < B && trace; ++b)
        if (starts[b + 1] - starts[b] > kVerified)
            fail("gated_delta_net", "with a trace, a sequence may have at most 64 rows");
    const int64_t W = trace ? trace.shape[1] : 0;

    const int64_t k_width = padded(Dk), v_width = padded(Dv);
    const int64_t per_thread = kChunk * (2 * k_width + v_width) + Dk * max64(kColumns, kWide) * 16;
    float* buffers = scratch_f32(thread_count() * per_thread);

    parallel_for(B * Hk, grain_for(T * Hv * Dk * Dv * 4, B * Hk, 1), [&](int64_t begin, int64_t end, int thread) {
        float* q = buffers + thread * per_thread;
        float* k = q + kChunk * k_width;
        float* v = k + kChunk * k_width;
        float* dense = v + kChunk * v_width;
        Gates gates[kChunk];
        for (int64_t task = begin; task < end; ++task) {
            const int64_t b = task / Hk, kh = task % Hk, rows = starts[b + 1] - starts[b];
            const float* first = proj.f32() + starts[b] * P;
            const Window window{first, P, conv_states[b].f32(), C};
            const int64_t q_channel = kh * Dk, k_channel = (Hk + kh) * Dk, v_channel = 2 * Hk * Dk + kh * group * Dv;
            for (int64_t t0 = 0; t0 < rows; t0 += kChunk) {
                const int64_t n = min64(kChunk, rows - t0);
                convolve(window, conv_weight.f32(), q_channel, Dk, t0, n, q);
                convolve(window, conv_weight.f32(), k_channel, Dk, t0, n, k);
                for (int64_t i = 0; i < n; ++i) {
                    unit_l2(q + i * k_width, k_width, 1.0f / sqrtf(static_cast<float>(Dk)));
                    unit_l2(k + i * k_width, k_width, 1.0f);
                    gates[i].kq = dot(q + i * k_width, k + i * k_width, k_width);
                }
                for (int64_t j = kh * group; j < (kh + 1) * group; ++j) {
                    const float rate = -expf(A_log.f32()[j]);
                    for (int64_t i = 0; i < n; ++i) {
                        const float* row = first + (t0 + i) * P + C + Hv * Dv;  // b (Hv) | a (Hv)
                        const float g = rate * softplus(row[Hv + j] + dt_bias.f32()[j]);
                        gates[i].decay = g < kSmallestExponent ? 0.0f : expf(g);
                        gates[i].beta = 1.0f / (1.0f + expf(-row[j]));
                    }
                    convolve(window, conv_weight.f32(), v_channel + (j - kh * group) * Dv, Dv, t0, n, v);
                    float* row =
                        trace ? trace.f32() + starts[b] * W + C + Hk * Dk : nullptr;  // dv (Hv*Dv) | decay (Hv)
                    for (int64_t i = 0; trace && i < n; ++i) row[i * W + Hv * Dv + j] = gates[i].decay;
                    const float* z = first + t0 * P + C + j * Dv;
                    float* out = y.f32() + ((starts[b] + t0) * Hv + j) * Dv;
                    const bool last = j + 1 == (kh + 1) * group;
                    Ahead ahead;  // a few rows are in the caches: the projection has just written them
                    if (n > kInPlace) ahead.add(z, P), ahead.add(out, Hv * Dv);
                    if (n > kInPlace && !last) {
                        ahead.add(first + t0 * P + 2 * Hk * Dk + (j + 1) * Dv, P);
                    } else if (t0 + kChunk < rows) {
                        const float* next = first + (t0 + kChunk) * P;
                        ahead.add(next + q_channel, P), ahead.add(next + k_channel, P), ahead.add(next + v_channel, P);
                    }
                    delta_rule_head(states[b].f32() + j * Dk * Dv, Dk, Dv, q, k, gates, v, n, dense,
                                    trace ? row + j * Dv : nullptr, W, ahead);
                    for (int64_t i = 0; i < n; ++i)
                        gated_norm(v + i * v_width, norm.f32(), z + i * P, Dv, eps, out + i * Hv * Dv);
                }
            }
            if (trace) {
                for (int64_t i = 0; i < rows; ++i) {
                    float* row = trace.f32() + (starts[b] + i) * W;  // u (C) | k (Hk*Dk)
                    const float* u = first + i * P;
                    memcpy(row + C + kh * Dk, k + i * k_width, static_cast<size_t>(Dk) * sizeof(float));
                    memcpy(row + q_channel, u + q_channel, static_cast<size_t>(Dk) * sizeof(float));
                    memcpy(row + k_channel, u + k_channel, static_cast<size_t>(Dk) * sizeof(float));
                    memcpy(row + v_channel, u + v_channel, static_cast<size_t>(group * Dv) * sizeof(float));
                }
                continue;
            }
            advance(window, rows, q_channel, Dk, conv_states[b].f32());
            advance(window, rows, k_channel, Dk, conv_states[b].f32());
            advance(window, rows, v_channel, group * Dv, conv_states[b].f32());
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
