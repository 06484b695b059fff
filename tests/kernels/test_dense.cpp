// pack, embed, rms_norm, layer_norm, linear, swiglu
#include <cmath>

#include "check.h"

namespace deltaic::test {

namespace {

const Format kFormats[] = {Format::f32, Format::bf16, Format::int8, Format::int4};

std::string size_text(const char* what, Format format, int64_t T, int64_t K, int64_t N) {
    return std::string(what) + " format " + std::to_string(static_cast<int>(format)) + " T=" + std::to_string(T) +
           " K=" + std::to_string(K) + " N=" + std::to_string(N);
}

bool is_integer(Format format) { return format == Format::int8 || format == Format::int4; }

// What the integer formats read of a row: int8 steps of amax / 127 in each run of 128 columns. In float, since a step
// is a decision.
Numbers quantised(const Floats& x, int64_t t, int64_t K) {
    Numbers y(static_cast<size_t>(K));
    for (int64_t first = 0; first < K; first += 128) {
        const int64_t last = std::min(K, first + 128);
        float amax = 0.0f;
        for (int64_t k = first; k < last; ++k) amax = std::max(amax, std::fabs(x[t * K + k]));
        for (int64_t k = first; k < last; ++k) {
            const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
            y[static_cast<size_t>(k)] = std::rint(x[t * K + k] * inverse) * (static_cast<double>(amax) / 127.0);
        }
    }
    return y;
}

enum class Form { floats, integers, halves };

// The form in which a product reads its activations. Those that are normed first are not rounded in these tests: a last
// bit of the norm could flip a step.
Form form_of(const Suite& t, Format format, const Weight& w) {
    if (w.float_activations) return Form::floats;
    if (format == Format::bf16 && t.rounds_to_bf16) return Form::halves;
    return is_integer(format) ? Form::integers : Form::floats;
}

// Input rows of a product: normed, or as the product reads them.
std::vector<Numbers> product_inputs(const Floats& x, int64_t T, int64_t K, const Floats* norm, Form form) {
    const Numbers values = wide(x);
    std::vector<Numbers> rows;
    for (int64_t t = 0; t < T; ++t) {
        if (norm) {
            rows.push_back(rms_norm(values.data() + t * K, *norm, 1e-6));
        } else if (form == Form::integers) {
            rows.push_back(quantised(x, t, K));
        } else if (form == Form::halves) {
            rows.emplace_back();
            for (int64_t k = 0; k < K; ++k) rows.back().push_back(from_bf16(to_bf16(x[t * K + k])));
        } else {
            rows.emplace_back(values.begin() + t * K, values.begin() + (t + 1) * K);
        }
    }
    return rows;
}

double product(const Packed& w, int64_t n, const Numbers& h) {
    double sum = 0.0;
    for (int64_t k = 0; k < w.weight.columns; ++k) sum += w.at(0, n, k) * h[static_cast<size_t>(k)];
    return sum;
}

Floats slice(const Floats& x, int64_t t, int64_t K) {
    Floats row({1, K});
    for (int64_t k = 0; k < K; ++k) row[k] = x[t * K + k];
    return row;
}

}  // namespace

void test_pack(Suite& t) {
    Random random(1);
    // Largest error of a format, relative to the largest of 128 neighbours: half a step of 127, or of 7 to 8 steps to
    // either side.
    const double allowed[] = {0.0, std::ldexp(1.0, -8), 0.5 / 127 * 1.01, 0.135};
    for (const Format format : kFormats)
        for (const int64_t K : {1, 5, 16, 128, 131, 256}) {
            const int64_t N = 19;
            const Packed p = pack(t, random, {{N, format}}, K);
            bool ok = true;
            for (int64_t n = 0; n < N; ++n)
                for (int64_t first = 0; first < K; first += 128) {
                    double amax = 0.0;
                    for (int64_t k = first; k < std::min(K, first + 128); ++k)
                        amax = std::max<double>(amax, std::fabs(p.source[n * K + k]));
                    for (int64_t k = first; k < std::min(K, first + 128); ++k) {
                        const double want = p.source[n * K + k];
                        const double limit = format == Format::bf16 ? allowed[1] * std::fabs(want)
                                                                    : allowed[static_cast<int>(format)] * amax;
                        ok = ok && std::fabs(p.at(0, n, k) - want) <= limit;
                        if (format == Format::bf16) ok = ok && p.at(0, n, k) == from_bf16(to_bf16(want));
                    }
                }
            t.check(ok, size_text("stored values", format, 0, K, N));
        }
    Floats source({17, 4});
    Bytes small({2 * block_bytes(Format::f32, 4) - 1});
    t.refuses("an array that is too small", [&] { t.call([&] { t.ops.pack(source.view(), 0, 0, 1, small.view()); }); });
    t.refuses("an unknown format", [&] { t.call([&] { t.ops.pack(source.view(), 9, 0, 1, small.view()); }); });
}

void test_embed(Suite& t) {
    Random random(2);
    for (const Format format : kFormats) {
        const int64_t V = 37, H = 131;
        const Packed table = pack(t, random, {{V, format}}, H);
        Integers ids({5});
        Numbers expected;
        for (int64_t i = 0; i < 5; ++i) {
            ids[i] = i == 0 ? V - 1 : random.below(V);
            for (int64_t k = 0; k < H; ++k) expected.push_back(table.at(0, ids[i], k));
        }
        Floats y = poisoned({5, H});
        t.call([&] { t.ops.embed(ids.view(), table.weight, y.view()); });
        t.close(y, expected, 1e-7, size_text("rows", format, 5, H, V));
        for (const int64_t bad : {int64_t{-1}, V}) {
            ids[2] = bad;
            t.refuses("an id outside the table",
                      [&] { t.call([&] { t.ops.embed(ids.view(), table.weight, y.view()); }); });
        }
    }
}

void test_rms_norm(Suite& t) {
    Random random(3);
    for (const int64_t T : {0, 1, 5})
        for (const int64_t D : {1, 7, 16, 33, 300}) {
            Floats x = normal(random, {T, D}, 3.0), weight = normal(random, {D}), y = poisoned({T, D});
            Numbers expected;
            const Numbers values = wide(x);
            for (int64_t i = 0; i < T; ++i) {
                const Numbers row = rms_norm(values.data() + i * D, weight, 1e-6);
                expected.insert(expected.end(), row.begin(), row.end());
            }
            t.call([&] { t.ops.rms_norm(x.view(), weight.view(), 1e-6f, y.view()); });
            t.close(y, expected, 1e-6, "D=" + std::to_string(D));
        }
}

void test_rms_norm_pair(Suite& t) {
    Random random(8);
    for (const int64_t T : {0, 1, 5})
        for (const int64_t D : {1, 16, 33}) {
            Floats a = normal(random, {T, D}), b = normal(random, {T, D}), y = poisoned({T, 2 * D});
            Floats a_weight = normal(random, {D}), b_weight = normal(random, {D});
            Numbers expected;
            for (int64_t i = 0; i < T; ++i)
                for (const auto& [x, weight] : {std::pair(&a, &a_weight), std::pair(&b, &b_weight)}) {
                    const Numbers values = wide(*x), row = rms_norm(values.data() + i * D, *weight, 1e-6);
                    expected.insert(expected.end(), row.begin(), row.end());
                }
            t.call([&] { t.ops.rms_norm_pair(a.view(), a_weight.view(), b.view(), b_weight.view(), 1e-6f, y.view()); });
            t.close(y, expected, 1e-6, "D=" + std::to_string(D));
        }
}

void test_layer_norm(Suite& t) {
    Random random(4);
    for (const int64_t T : {0, 1, 5})
        for (const int64_t D : {1, 7, 16, 33, 300}) {
            Floats x = normal(random, {T, D}), weight = normal(random, {D}), bias = normal(random, {D}),
                   y = poisoned({T, D});
            for (float& v : x.data) v += 5.0f;  // a mean far from zero
            Numbers expected;
            for (int64_t i = 0; i < T; ++i) {
                double mean = 0.0, variance = 0.0;
                for (int64_t d = 0; d < D; ++d) mean += x[i * D + d] / static_cast<double>(D);
                for (int64_t d = 0; d < D; ++d) variance += std::pow(x[i * D + d] - mean, 2) / static_cast<double>(D);
                for (int64_t d = 0; d < D; ++d)
                    expected.push_back((x[i * D + d] - mean) / std::sqrt(variance + 1e-6) * weight[d] + bias[d]);
            }
            t.call([&] { t.ops.layer_norm(x.view(), weight.view(), bias.view(), 1e-6f, y.view()); });
            t.close(y, expected, D == 1 ? 1e-3 : 1e-5, "D=" + std::to_string(D));
        }
}

void test_linear(Suite& t) {
    Random random(5);
    const auto activate = [](int64_t kind, double x) {
        if (kind == 1) return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        if (kind == 2) return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
        return x;
    };
    int64_t variant = 0;
    for (const Format format : kFormats)
        for (const int64_t T : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33})
            for (const int64_t K : {1, 31, 130, 256, 300}) {
                const int64_t N = 16 * (variant % 6) + 11, kind = variant % 3;
                // A second part in another format, as the projections of a layer have.
                Packed w = pack(t, random, {{N, format}, {5, Format::f32}}, K);
                const bool with_norm = ++variant % 2;
                w.weight.float_activations = with_norm || variant % 8 == 0;
                Floats x = normal(random, {T, K}), norm = normal(random, {K}, 0.3), bias = normal(random, {N + 5});
                Floats residual = normal(random, {T, N + 5}), y = poisoned({T, N + 5});
                const auto rows = product_inputs(x, T, K, with_norm ? &norm : nullptr, form_of(t, format, w.weight));
                const auto plain = product_inputs(x, T, K, with_norm ? &norm : nullptr, Form::floats);
                Numbers expected;
                for (int64_t i = 0; i < T; ++i)
                    for (int64_t n = 0; n < N + 5; ++n)
                        expected.push_back(activate(kind, product(w, n,
                                                                  n < N ? rows[static_cast<size_t>(i)]
                                                                        : plain[static_cast<size_t>(i)]) +
                                                              bias[n]) +
                                           residual[i * (N + 5) + n]);
                const View norm_view = with_norm ? norm.view() : View{};
                t.call([&] {
                    t.ops.linear(x.view(), w.weight, norm_view, 1e-6f, bias.view(), kind, residual.view(), y.view());
                });
                t.close(y, expected, 1e-5, size_text("products", format, T, K, N));
                for (const int64_t i : {int64_t{0}, T / 2, T - 1}) {
                    if (T == 0) break;
                    Floats one = slice(x, i, K), more = slice(residual, i, N + 5), alone = poisoned({1, N + 5});
                    t.call([&] {
                        t.ops.linear(one.view(), w.weight, norm_view, 1e-6f, bias.view(), kind, more.view(),
                                     alone.view());
                    });
                    t.same_bits(alone, slice(y, i, N + 5), size_text("one row alone", format, T, K, N));
                }
            }
}

void test_swiglu(Suite& t) {
    Random random(6);
    for (const Format format : kFormats)
        for (const int64_t T : {0, 1, 13})
            for (const int64_t I : {1, 16, 45}) {
                const int64_t K = 70;
                Packed w = pack_glu(t, random, I, K, format);
                w.weight.float_activations = true;
                Floats x = normal(random, {T, K}, 3.0), norm = normal(random, {K}, 0.3), y = poisoned({T, I});
                Numbers expected;
                for (const Numbers& row : product_inputs(x, T, K, &norm, Form::floats))
                    for (int64_t i = 0; i < I; ++i)
                        expected.push_back(silu(product(w, i, row)) * product(w, I + i, row));
                t.call([&] { t.ops.swiglu(x.view(), w.weight, norm.view(), 1e-6f, y.view()); });
                t.close(y, expected, 1e-5, size_text("gated products", format, T, K, I));
            }
}

}  // namespace deltaic::test
