// moe
#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"

namespace deltaic::test {

namespace {

struct Experts {
    Packed router, gate_up, down, shared_gate_up, shared_down, shared_gate;
    int64_t E, H, I, Is;
};

Experts make_experts(Suite& t, Random& random, int64_t E, int64_t H, int64_t I, int64_t Is, Format format) {
    Experts x{pack(t, random, {{E, Format::f32}}, H),
              pack_glu(t, random, I, H, format, E),
              pack(t, random, {{H, format}}, I, E),
              pack_glu(t, random, Is, H, format),
              pack(t, random, {{H, format}}, Is),
              pack(t, random, {{1, Format::f32}}, H),
              E,
              H,
              I,
              Is};
    Packed* const all[] = {&x.gate_up, &x.down, &x.shared_gate_up, &x.shared_down};
    for (Packed* p : all)
        p->weight.float_activations = true;  // a rounding of the hidden values could flip an int8 step
    return x;
}

double dot(const Packed& w, int64_t expert, int64_t row, const Numbers& h) {
    double sum = 0.0;
    for (int64_t k = 0; k < w.weight.columns; ++k) sum += w.at(expert, row, k) * h[static_cast<size_t>(k)];
    return sum;
}

// y += c * ffn(h)
void add_ffn(const Packed& gate_up, const Packed& down, int64_t expert, const Numbers& h, double c, double* y) {
    const int64_t I = gate_up.rows / 2;
    Numbers hidden;
    for (int64_t i = 0; i < I; ++i) hidden.push_back(silu(dot(gate_up, expert, i, h)) * dot(gate_up, expert, I + i, h));
    for (int64_t n = 0; n < down.rows; ++n) y[n] += c * dot(down, expert, n, hidden);
}

Numbers expected_output(const Experts& x, const Numbers& input, const Floats& norm, int64_t top_k,
                        const Floats* residual) {
    Numbers y(input.size());
    for (int64_t t = 0; t < static_cast<int64_t>(input.size()) / x.H; ++t) {
        const Numbers h = rms_norm(input.data() + t * x.H, norm, 1e-6);
        Numbers logits;
        for (int64_t e = 0; e < x.E; ++e) logits.push_back(dot(x.router, 0, e, h));
        std::vector<int64_t> order(static_cast<size_t>(x.E));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
        });
        double sum = 0.0;
        for (int64_t j = 0; j < top_k; ++j) sum += std::exp(logits[static_cast<size_t>(order[static_cast<size_t>(j)])]);
        double* row = y.data() + t * x.H;
        for (int64_t j = 0; j < top_k; ++j) {
            const int64_t e = order[static_cast<size_t>(j)];
            add_ffn(x.gate_up, x.down, e, h, std::exp(logits[static_cast<size_t>(e)]) / sum, row);
        }
        add_ffn(x.shared_gate_up, x.shared_down, 0, h, sigmoid(dot(x.shared_gate, 0, 0, h)), row);
        for (int64_t i = 0; residual && i < x.H; ++i) row[i] += (*residual)[t * x.H + i];
    }
    return y;
}

void apply(Suite& t, const Experts& e, View x, Floats& norm, int64_t top_k, View residual, View y) {
    t.call([&] {
        t.ops.moe(x, e.router.weight, e.gate_up.weight, e.down.weight, e.shared_gate_up.weight, e.shared_down.weight,
                  e.shared_gate.weight, norm.view(), 1e-6f, top_k, residual, y);
    });
}

}  // namespace

void test_moe(Suite& t) {
    Random random(8);
    struct Size {
        int64_t E, H, I, Is, top_k;
        Format format;
    };
    const Size sizes[] = {{1, 7, 5, 3, 1, Format::f32},     {5, 40, 24, 17, 3, Format::f32},
                          {5, 40, 24, 17, 3, Format::bf16}, {33, 49, 16, 31, 8, Format::bf16},
                          {4, 130, 20, 9, 2, Format::int8}, {4, 130, 20, 9, 4, Format::int4}};
    for (const Size& s : sizes) {
        const Experts experts = make_experts(t, random, s.E, s.H, s.I, s.Is, s.format);
        Floats norm = normal(random, {s.H}, 0.3);
        for (const int64_t T : {0, 1, 2, 30}) {
            Floats x = normal(random, {T, s.H}), residual = normal(random, {T, s.H}), y = poisoned({T, s.H});
            const bool add = T != 2;
            const std::string what = "E=" + std::to_string(s.E) + " format " +
                                     std::to_string(static_cast<int>(s.format)) + " T=" + std::to_string(T);
            apply(t, experts, x.view(), norm, s.top_k, add ? residual.view() : View{}, y.view());
            t.close(y, expected_output(experts, wide(x), norm, s.top_k, add ? &residual : nullptr), 1e-5, what);
            Floats alone = poisoned({T, s.H});  // one token at a time
            for (int64_t i = 0; i < T; ++i) {
                View row[] = {x.view(), residual.view(), alone.view()};
                for (View& v : row) v.data = v.f32() + i * s.H, v.shape[0] = 1;
                apply(t, experts, row[0], norm, s.top_k, add ? row[1] : View{}, row[2]);
            }
            t.same_bits(alone, y, what + " token by token");
        }
    }

    // Equal logits: the experts of lowest index, all with the same share.
    Experts tied = make_experts(t, random, 5, 16, 8, 8, Format::f32);
    for (uint8_t& b : tied.router.bytes[0].data) b = 0;
    for (double& v : tied.router.values) v = 0.0;
    Floats x = normal(random, {1, 16}), norm = normal(random, {16}), y = poisoned({1, 16});
    apply(t, tied, x.view(), norm, 2, View{}, y.view());
    t.close(y, expected_output(tied, wide(x), norm, 2, nullptr), 1e-5, "equal logits");

    for (const int64_t top_k : {0, 6}) {
        t.refuses("top_k " + std::to_string(top_k) + " of 5",
                  [&] { apply(t, tied, x.view(), norm, top_k, View{}, y.view()); });
    }
    tied.gate_up.weight.glu = false;
    t.refuses("gate and up that are not interleaved", [&] { apply(t, tied, x.view(), norm, 2, View{}, y.view()); });
}

}  // namespace deltaic::test
