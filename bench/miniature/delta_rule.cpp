// Gated delta rule, causal convolution and RMS norm with their gradients, for training the miniature on a CPU.
// Plain loops over (row, head): the state of a head stays in the first-level cache, which PyTorch's batched products
// of 32x32 matrices cannot offer. Built by fast_ops.py; not part of the product.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int D = 32;  // key and value head dimension

// One step: decays s, writes the corrected value w = beta (v - s^T k), adds k w^T. s [D, D], key index first.
inline void step(float* s, const float* k, const float* v, float decay, float beta, float* w) {
    float read[D] = {};
    for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j) {
            s[i * D + j] *= decay;
            read[j] += k[i] * s[i * D + j];
        }
    for (int j = 0; j < D; ++j) w[j] = beta * (v[j] - read[j]);
    for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j) s[i * D + j] += k[i] * w[j];
}

}  // namespace

extern "C" {

// q, k, v, o [B, T, H, D]; g (log decay), beta [B, T, H].
void delta_rule_forward(const float* q, const float* k, const float* v, const float* g, const float* beta, float* o,
                        int64_t batch, int64_t length, int64_t heads, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t bh = 0; bh < batch * heads; ++bh) {
        const int64_t b = bh / heads, h = bh % heads;
        alignas(64) float s[D * D] = {};
        float w[D];
        for (int64_t t = 0; t < length; ++t) {
            const int64_t at = (b * length + t) * heads + h;
            step(s, k + at * D, v + at * D, std::exp(g[at]), beta[at], w);
            float read[D] = {};
            for (int i = 0; i < D; ++i)
                for (int j = 0; j < D; ++j) read[j] += q[at * D + i] * s[i * D + j];
            std::memcpy(o + at * D, read, sizeof read);
        }
    }
}

// Gradients of all inputs from that of o. The states are computed again and kept for one head at a time.
void delta_rule_backward(const float* q, const float* k, const float* v, const float* g, const float* beta,
                         const float* d_o, float* dq, float* dk, float* dv, float* dg, float* dbeta, int64_t batch,
                         int64_t length, int64_t heads, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> states((length + 1) * D * D), writes(length * D);
#pragma omp for schedule(dynamic)
        for (int64_t bh = 0; bh < batch * heads; ++bh) {
            const int64_t b = bh / heads, h = bh % heads;
            std::fill_n(states.data(), D * D, 0.f);
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (b * length + t) * heads + h;
                float* s = states.data() + (t + 1) * D * D;
                std::memcpy(s, s - D * D, sizeof(float) * D * D);
                step(s, k + at * D, v + at * D, std::exp(g[at]), beta[at], writes.data() + t * D);
            }
            alignas(64) float ds[D * D] = {};
            for (int64_t t = length - 1; t >= 0; --t) {
                const int64_t at = (b * length + t) * heads + h;
                const float *qt = q + at * D, *kt = k + at * D, *dot = d_o + at * D, *w = writes.data() + t * D;
                const float *before = states.data() + t * D * D, *after = before + D * D;
                const float decay = std::exp(g[at]);
                float dw[D] = {}, e[D] = {}, de[D];
                for (int i = 0; i < D; ++i) {
                    float sum_q = 0, sum_k = 0;
                    for (int j = 0; j < D; ++j) {
                        sum_q += after[i * D + j] * dot[j];
                        ds[i * D + j] += qt[i] * dot[j];
                        sum_k += ds[i * D + j] * w[j];
                        dw[j] += ds[i * D + j] * kt[i];
                        e[j] += kt[i] * before[i * D + j];
                    }
                    dq[at * D + i] = sum_q;
                    dk[at * D + i] = sum_k;
                }
                float sum_beta = 0;
                for (int j = 0; j < D; ++j) {
                    sum_beta += dw[j] * (v[at * D + j] - decay * e[j]);
                    de[j] = beta[at] * dw[j];
                    dv[at * D + j] = de[j];
                }
                dbeta[at] = sum_beta;
                float sum_decay = 0;
                for (int i = 0; i < D; ++i) {
                    float sum_k = 0;
                    for (int j = 0; j < D; ++j) {
                        const float d = ds[i * D + j] - kt[i] * de[j];
                        sum_k += before[i * D + j] * de[j];
                        sum_decay += d * before[i * D + j];
                        ds[i * D + j] = decay * d;
                    }
                    dk[at * D + i] -= decay * sum_k;
                }
                dg[at] = decay * sum_decay;
            }
        }
    }
}

// x, y [B, T, C]; weight [C, 4]: y = silu(sum_j weight[c][j] x[t - 3 + j]). `sum` keeps the argument of silu.
void conv_forward(const float* x, const float* weight, float* sum, float* y, int64_t batch, int64_t length,
                  int64_t channels, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<float> taps(4 * channels);
        for (int64_t c = 0; c < channels; ++c)
            for (int j = 0; j < 4; ++j) taps[j * channels + c] = weight[c * 4 + j];
        for (int64_t t = 0; t < length; ++t) {
            float* out = sum + (b * length + t) * channels;
            std::fill_n(out, channels, 0.f);
            for (int j = 0; j < 4; ++j) {
                if (t - 3 + j < 0) continue;
                const float* in = x + (b * length + t - 3 + j) * channels;
                const float* tap = taps.data() + j * channels;
                for (int64_t c = 0; c < channels; ++c) out[c] += tap[c] * in[c];
            }
            float* result = y + (b * length + t) * channels;
            for (int64_t c = 0; c < channels; ++c) result[c] = out[c] / (1.f + std::exp(-out[c]));
        }
    }
}

// `sum` becomes its own gradient; dx [B, T, C]; dweight [B, C, 4], to be summed over B.
void conv_backward(const float* x, const float* weight, float* sum, const float* dy, float* dx, float* dweight,
                   int64_t batch, int64_t length, int64_t channels, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<float> taps(4 * channels), dtaps(4 * channels);
        for (int64_t c = 0; c < channels; ++c)
            for (int j = 0; j < 4; ++j) taps[j * channels + c] = weight[c * 4 + j];
        std::fill_n(dx + b * length * channels, length * channels, 0.f);
        for (int64_t t = 0; t < length; ++t) {
            float* ds = sum + (b * length + t) * channels;
            const float* up = dy + (b * length + t) * channels;
            for (int64_t c = 0; c < channels; ++c) {
                const float sigmoid = 1.f / (1.f + std::exp(-ds[c]));
                ds[c] = up[c] * sigmoid * (1.f + ds[c] * (1.f - sigmoid));
            }
            for (int j = 0; j < 4; ++j) {
                if (t - 3 + j < 0) continue;
                const float* in = x + (b * length + t - 3 + j) * channels;
                float* din = dx + (b * length + t - 3 + j) * channels;
                const float* tap = taps.data() + j * channels;
                float* dtap = dtaps.data() + j * channels;
                for (int64_t c = 0; c < channels; ++c) {
                    din[c] += tap[c] * ds[c];
                    dtap[c] += in[c] * ds[c];
                }
            }
        }
        for (int64_t c = 0; c < channels; ++c)
            for (int j = 0; j < 4; ++j) dweight[(b * channels + c) * 4 + j] = dtaps[j * channels + c];
    }
}

// x, y [N, D], weight [D]; scale [N] = 1 / sqrt(mean(x^2) + eps); y = x scale weight.
void rms_norm_forward(const float* x, const float* weight, float* scale, float* y, int64_t rows, int64_t width,
                      double eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n) {
        float sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += x[n * width + i] * x[n * width + i];
        scale[n] = 1.f / std::sqrt(sum / width + static_cast<float>(eps));
        for (int64_t i = 0; i < width; ++i) y[n * width + i] = x[n * width + i] * scale[n] * weight[i];
    }
}

// dx [N, D]; dweight [D].
void rms_norm_backward(const float* x, const float* weight, const float* scale, const float* dy, float* dx,
                       float* dweight, int64_t rows, int64_t width) {
    std::fill_n(dweight, width, 0.f);
    for (int64_t n = 0; n < rows; ++n) {
        const float *in = x + n * width, *up = dy + n * width;
        float sum = 0;
        for (int64_t i = 0; i < width; ++i) {
            sum += up[i] * weight[i] * in[i];
            dweight[i] += up[i] * in[i] * scale[n];
        }
        const float mean = sum / width * scale[n] * scale[n];
        for (int64_t i = 0; i < width; ++i) dx[n * width + i] = scale[n] * (up[i] * weight[i] - in[i] * mean);
    }
}

}  // extern "C"
