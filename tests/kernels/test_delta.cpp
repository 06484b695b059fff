// gated_delta_net
#include <cmath>
#include <cstring>

#include "check.h"

namespace deltaic::test {

namespace {

struct Layer {
    int64_t Hk, Hv, Dk, Dv;
    Floats conv_weight, A_log, dt_bias, norm;

    int64_t channels() const { return 2 * Hk * Dk + Hv * Dv; }
    int64_t columns() const { return channels() + Hv * Dv + 2 * Hv; }
};

Layer make_layer(Random& random, int64_t Hk, int64_t Hv, int64_t Dk, int64_t Dv) {
    const int64_t C = 2 * Hk * Dk + Hv * Dv;
    return {Hk, Hv, Dk, Dv, normal(random, {4, C}), normal(random, {Hv}), normal(random, {Hv}), normal(random, {Dv})};
}

// One token: u [C] with its three predecessors -> q, k (normalised) and v.
Numbers convolved(const Layer& l, const std::vector<Numbers>& window, int64_t t) {
    const int64_t C = l.channels();
    Numbers c(static_cast<size_t>(C));
    for (int64_t i = 0; i < C; ++i) {
        double sum = 0.0;
        for (int64_t j = 0; j < 4; ++j)
            sum += l.conv_weight[j * C + i] * window[static_cast<size_t>(t + j)][static_cast<size_t>(i)];
        c[static_cast<size_t>(i)] = silu(sum);
    }
    for (int64_t head = 0; head < 2 * l.Hk; ++head) {
        double* x = c.data() + head * l.Dk;
        double squares = 0.0;
        for (int64_t d = 0; d < l.Dk; ++d) squares += x[d] * x[d];
        const double scale =
            1.0 / std::sqrt(squares + 1e-6) / (head < l.Hk ? std::sqrt(static_cast<double>(l.Dk)) : 1.0);
        for (int64_t d = 0; d < l.Dk; ++d) x[d] *= scale;
    }
    return c;
}

// One sequence, token by token, by the formulas of ops/reference.py; S [Hv, Dk, Dv] and conv [3, C] are updated.
Numbers expected_output(const Layer& l, const float* proj, int64_t T, double eps, Numbers& conv, Numbers& S) {
    const int64_t C = l.channels(), P = l.columns();
    std::vector<Numbers> window;
    for (int64_t j = 0; j < 3; ++j) window.emplace_back(conv.begin() + j * C, conv.begin() + (j + 1) * C);
    for (int64_t t = 0; t < T; ++t) window.emplace_back(proj + t * P, proj + t * P + C);
    Numbers y;
    for (int64_t t = 0; t < T; ++t) {
        const Numbers c = convolved(l, window, t);
        const float *z = proj + t * P + C, *b = z + l.Hv * l.Dv, *a = b + l.Hv;
        for (int64_t h = 0; h < l.Hv; ++h) {
            const double *q = c.data() + h / (l.Hv / l.Hk) * l.Dk, *k = q + l.Hk * l.Dk,
                         *v = c.data() + 2 * l.Hk * l.Dk + h * l.Dv;
            double* s = S.data() + h * l.Dk * l.Dv;
            const double x = static_cast<double>(a[h]) + l.dt_bias[h];
            const double decay =
                std::exp(-std::exp(static_cast<double>(l.A_log[h])) * (x > 20 ? x : std::log1p(std::exp(x))));
            Numbers o(static_cast<size_t>(l.Dv));
            double squares = 0.0;
            for (int64_t i = 0; i < l.Dv; ++i) {
                double read = 0.0;
                for (int64_t d = 0; d < l.Dk; ++d) read += (s[d * l.Dv + i] *= decay) * k[d];
                const double delta = sigmoid(b[h]) * (v[i] - read);
                for (int64_t d = 0; d < l.Dk; ++d)
                    o[static_cast<size_t>(i)] += (s[d * l.Dv + i] += k[d] * delta) * q[d];
                squares += o[static_cast<size_t>(i)] * o[static_cast<size_t>(i)];
            }
            for (int64_t i = 0; i < l.Dv; ++i)
                y.push_back(l.norm[i] * o[static_cast<size_t>(i)] /
                            std::sqrt(squares / static_cast<double>(l.Dv) + eps) * silu(z[h * l.Dv + i]));
        }
    }
    for (int64_t j = 0; j < 3; ++j)
        for (int64_t i = 0; i < C; ++i)
            conv[static_cast<size_t>(j * C + i)] = window[static_cast<size_t>(T + j)][static_cast<size_t>(i)];
    return y;
}

struct Batch {
    std::vector<Floats> conv, S;
    std::vector<View> conv_views, S_views;

    void draw(Random& random, const Layer& l, size_t n) {
        for (size_t b = 0; b < n; ++b) {
            conv.push_back(normal(random, {3, l.channels()}));
            S.push_back(normal(random, {l.Hv, l.Dk, l.Dv}));
        }
    }
};

Floats apply(Suite& t, Layer& l, Floats& proj, const Shape& lengths, double eps, Batch& batch, View trace = {}) {
    batch.conv_views.clear(), batch.S_views.clear();
    for (Floats& x : batch.conv) batch.conv_views.push_back(x.view());
    for (Floats& x : batch.S) batch.S_views.push_back(x.view());
    const int64_t B = static_cast<int64_t>(lengths.size());
    Integers cuts = offsets(lengths);
    Floats y = poisoned({proj.shape[0], l.Hv * l.Dv});
    t.call([&] {
        t.ops.gated_delta_net(proj.view(), l.conv_weight.view(), l.A_log.view(), l.dt_bias.view(), l.norm.view(),
                              static_cast<float>(eps), l.Hk, l.Dk, cuts.view(), Views{batch.conv_views.data(), B},
                              Views{batch.S_views.data(), B}, trace, y.view());
    });
    return y;
}

void compare(Suite& t, Layer& l, Floats& proj, const Shape& lengths, Batch& batch, const std::string& what) {
    const double eps = 1e-6;
    std::vector<Numbers> conv, S;
    for (size_t b = 0; b < lengths.size(); ++b) conv.push_back(wide(batch.conv[b])), S.push_back(wide(batch.S[b]));
    const Floats y = apply(t, l, proj, lengths, eps, batch);
    Numbers expected;
    int64_t first = 0;
    for (size_t b = 0; b < lengths.size(); ++b) {
        const Numbers of_one =
            expected_output(l, proj.data.data() + first * l.columns(), lengths[b], eps, conv[b], S[b]);
        expected.insert(expected.end(), of_one.begin(), of_one.end());
        first += lengths[b];
        t.close(batch.S[b], S[b], 2e-5, what + " state " + std::to_string(b));
        t.close(batch.conv[b], conv[b], 0.0, what + " convolution state " + std::to_string(b));
    }
    t.close(y, expected, 2e-5, what + " output");
}

Floats rows(const Floats& x, int64_t first, int64_t count) {
    Floats part({count, x.shape[1]});
    std::memcpy(part.data.data(), x.data.data() + first * x.shape[1], part.data.size() * sizeof(float));
    return part;
}

}  // namespace

void test_gated_delta_net(Suite& t) {
    Random random(7);
    const Shape sizes[] = {{1, 1, 1, 1}, {1, 3, 5, 7}, {2, 4, 16, 32}, {2, 2, 33, 80}, {1, 2, 64, 128}};
    const Shape batches[] = {{}, {0}, {1}, {2}, {5, 0, 1}, {64}, {67, 3}};
    for (const Shape& s : sizes)
        for (const Shape& lengths : batches) {
            Layer l = make_layer(random, s[0], s[1], s[2], s[3]);
            int64_t T = 0;
            for (const int64_t n : lengths) T += n;
            Floats proj = normal(random, {T, l.columns()});
            Batch batch;
            batch.draw(random, l, lengths.size());
            compare(t, l, proj, lengths, batch,
                    "Dk=" + std::to_string(l.Dk) + " Dv=" + std::to_string(l.Dv) + " T=" + std::to_string(T));
        }

    // Decay of e^-100 per token, and almost none; q and k of nothing but zeros.
    for (const float a : {100.0f, -30.0f}) {
        Layer l = make_layer(random, 1, 2, 16, 16);
        for (float& v : l.A_log.data) v = 0.0f;
        for (float& v : l.dt_bias.data) v = a;
        Floats proj = normal(random, {70, l.columns()});
        for (int64_t i = 0; i < 2 * l.Hk * l.Dk; ++i) proj[9 * l.columns() + i] = 0.0f;
        Batch batch;
        batch.draw(random, l, 1);
        compare(t, l, proj, {70}, batch, "dt_bias " + std::to_string(a));
    }

    // However a prompt is split, the bits are the same.
    for (const Shape& s : {Shape{1, 2, 20, 24}, Shape{1, 1, 32, 64}}) {
        Layer l = make_layer(random, s[0], s[1], s[2], s[3]);
        const int64_t T = 71;
        Floats proj = normal(random, {T, l.columns()});
        Batch start;
        start.draw(random, l, 1);
        Batch whole = start;
        const Floats y = apply(t, l, proj, {T}, 1e-6, whole);
        for (const int64_t step : {1, 3, 65}) {
            Batch parts = start;
            for (int64_t first = 0; first < T; first += step) {
                const int64_t n = std::min(step, T - first);
                Floats part = rows(proj, first, n);
                t.same_bits(apply(t, l, part, {n}, 1e-6, parts), rows(y, first, n),
                            "a prompt in steps of " + std::to_string(step));
            }
            t.same_bits(parts.S[0], whole.S[0], "the state after steps of " + std::to_string(step));
            t.same_bits(parts.conv[0], whole.conv[0], "the convolution state after steps of " + std::to_string(step));
        }
    }

    Layer l = make_layer(random, 2, 2, 4, 4);
    Floats proj = normal(random, {3, l.columns()});
    Batch batch;
    batch.draw(random, l, 2);
    t.refuses("cu_seqlens that decreases", [&] { apply(t, l, proj, {5, -2}, 1e-6, batch); });
    t.refuses("cu_seqlens that ends early", [&] { apply(t, l, proj, {1, 1}, 1e-6, batch); });
    l.Hk = 3;
    t.refuses("value heads that are no multiple of key heads", [&] { apply(t, l, proj, {1, 2}, 1e-6, batch); });
}

// Verify some rows, accept fewer, and compare with decoding the accepted ones alone: outputs, states, tails.
void test_gated_delta_net_commit(Suite& t) {
    Random random(11);
    const Shape sizes[] = {{1, 1, 1, 1}, {1, 3, 5, 7}, {2, 4, 16, 32}, {2, 2, 33, 80}, {1, 2, 64, 128}};
    const Shape batches[] = {{1}, {2, 0, 5}, {5, 1, 3}, {64}};
    for (const Shape& s : sizes)
        for (const Shape& lengths : batches) {
            Layer l = make_layer(random, s[0], s[1], s[2], s[3]);
            const int64_t B = static_cast<int64_t>(lengths.size());
            Integers cuts = offsets(lengths);
            const int64_t T = cuts[B], W = l.channels() + l.Hk * l.Dk + l.Hv * l.Dv + l.Hv;
            Floats proj = normal(random, {T, l.columns()}), trace = poisoned({1, T, W});
            View row_trace = trace.view();
            row_trace.ndim = 2, row_trace.shape[0] = T, row_trace.shape[1] = W;
            Batch start;
            start.draw(random, l, lengths.size());
            Batch verified = start;
            const Floats y = apply(t, l, proj, lengths, 1e-6, verified, row_trace);
            for (int64_t accepted = 0; accepted <= 5; ++accepted) {
                Batch plain = start;
                Integers counts({B});
                for (int64_t b = 0; b < B; ++b) {
                    counts[b] = std::min(accepted, lengths[static_cast<size_t>(b)]);
                    Batch one;
                    one.conv = {plain.conv[static_cast<size_t>(b)]}, one.S = {plain.S[static_cast<size_t>(b)]};
                    for (int64_t i = 0; i < counts[b]; ++i) {
                        Floats token = rows(proj, cuts[b] + i, 1);
                        t.same_bits(apply(t, l, token, {1}, 1e-6, one), rows(y, cuts[b] + i, 1), "a verified row");
                    }
                    plain.conv[static_cast<size_t>(b)] = one.conv[0], plain.S[static_cast<size_t>(b)] = one.S[0];
                }
                Batch committed = verified;
                std::vector<View> conv_views, S_views;
                for (Floats& x : committed.conv) {
                    conv_views.push_back(x.view());
                    View& v = conv_views.back();
                    v.ndim = 3, v.shape[0] = 1, v.shape[1] = 3, v.shape[2] = l.channels();
                }
                for (Floats& x : committed.S) {
                    S_views.push_back(x.view());
                    View& v = S_views.back();
                    v.ndim = 4, v.shape[0] = 1, v.shape[1] = l.Hv, v.shape[2] = l.Dk, v.shape[3] = l.Dv;
                }
                t.call([&] {
                    t.ops.gated_delta_net_commit(trace.view(), l.Hk, cuts.view(), counts.view(),
                                                 Views{conv_views.data(), B}, Views{S_views.data(), B});
                });
                for (size_t b = 0; b < lengths.size(); ++b) {
                    t.same_bits(committed.S[b], plain.S[b], "the state after a commit");
                    t.same_bits(committed.conv[b], plain.conv[b], "the convolution state after a commit");
                }
            }
        }
}

}  // namespace deltaic::test
