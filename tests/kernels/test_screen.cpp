// pack_screen, linear_top
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace deltaic::test {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Screened {
    Packed head;
    Bytes sketch;
    Floats dither, bounds;
    Integers history{{2}};
    Weight weight;  // of the sketch
};

Screened screened(Suite& t, Random& random, Packed head) {
    const int64_t K = head.weight.columns, blocks = head.weight.segment[0].blocks;
    Screened s{std::move(head), Bytes({blocks * block_bytes(Format::int4, K)}),
               Floats({K}),     poisoned({blocks, 2}),
               Integers({2}),   Weight{}};
    for (float& u : s.dither.data) u = static_cast<float>(random.uniform() - 0.5);
    std::fill(s.sketch.data.begin(), s.sketch.data.end(), uint8_t{0xff});
    std::fill(s.history.data.begin(), s.history.data.end(), 0);
    t.call([&] { t.ops.pack_screen(s.head.weight, s.dither.view(), s.sketch.view(), s.bounds.view()); });
    s.weight.rows = s.head.weight.rows, s.weight.columns = K, s.weight.segments = 1;
    s.weight.segment[0] = {Format::int4, s.head.weight.rows, blocks, s.sketch.data.data()};
    return s;
}

// The step of row n in the group of column k, and the nibble there.
std::pair<double, int> entry(const Screened& s, int64_t n, int64_t k) {
    const int64_t K = s.weight.columns, runs = (K + 127) / 128, run = k / 128, group = k % 128 / 16, r = n % 16;
    const uint8_t* const block = s.sketch.data.data() + n / 16 * block_bytes(Format::int4, K);
    const int scales = block[runs * 32 + run * 64 + group / 2 * 16 + r];
    const int scale = (group % 2 ? scales >> 4 : scales & 15) + 1;
    const int64_t column = k % 16;
    const int byte = block[runs * 96 + run * 1024 + group * 128 + column / 8 * 64 + r * 4 + column % 4];
    return {from_half(block + (run * 16 + r) * 2) * scale, column / 4 % 2 ? byte >> 4 : byte & 15};
}

struct Request {
    int64_t k = 1, limit = 0;
    double presence = 0.0, frequency = 0.0, repetition = 1.0;
};

Floats top(Suite& t, Screened& s, Floats& x, Floats& norm, const Request& r, Integers& unused, Views seen,
           Integers& cuts, Integers& fed) {
    Floats y = poisoned({x.shape[0], s.weight.rows});
    t.call([&] {
        t.ops.linear_top(x.view(), s.head.weight, s.weight, s.dither.view(), s.bounds.view(), s.history.view(),
                         norm.view(), 1e-6f, r.k, r.presence, r.frequency, r.repetition, r.limit, unused.view(), seen,
                         cuts.view(), fed.view(), y.view());
    });
    return y;
}

Floats all_logits(Suite& t, Screened& s, Floats& x, Floats& norm) {
    Floats y = poisoned({x.shape[0], s.weight.rows});
    t.call([&] { t.ops.linear(x.view(), s.head.weight, norm.view(), 1e-6f, View{}, 0, View{}, y.view()); });
    return y;
}

// Whether `found` holds what may be chosen from `all`, and nothing else but -inf.
bool holds_top(const Floats& found, const Floats& all, int64_t row, const Request& r, const Integers& unused,
               const std::vector<int64_t>& times) {
    const int64_t N = all.shape[1];
    std::vector<double> values;
    std::vector<double> of_id(static_cast<size_t>(N), -kInfinity);
    for (int64_t id = 0; id < r.limit; ++id) {
        if (std::find(unused.data.begin(), unused.data.end(), id) != unused.data.end()) continue;
        double value = all[row * N + id];
        const int64_t count = times.empty() ? -1 : times[static_cast<size_t>(id)];
        if (count >= 0) value = value > 0 ? value / r.repetition : value * r.repetition;
        if (count > 0) value -= r.frequency * static_cast<double>(count) + r.presence;
        of_id[static_cast<size_t>(id)] = value;
        values.push_back(value);
    }
    const auto place = values.begin() + std::min<int64_t>(r.k, static_cast<int64_t>(values.size())) - 1;
    std::nth_element(values.begin(), place, values.end(), std::greater<>());
    for (int64_t id = 0; id < N; ++id) {
        const float value = found[row * N + id];
        if (value != all[row * N + id] && (value != -kInfinity || of_id[static_cast<size_t>(id)] >= *place))
            return false;
    }
    return true;
}

int64_t count_left_out(const Floats& y) { return std::count(y.data.begin(), y.data.end(), -kInfinity); }

void test_texts(Suite& t) {
    Random random(52);
    for (const Format format : {Format::f32, Format::bf16, Format::int8})
        for (const int64_t T : {1, 2, 3, 9})
            for (const int64_t k : {1, 6}) {
                const int64_t N = 5003, K = 160, words = (N + 63) / 64;
                Screened s = screened(t, random, pack(t, random, {{N, format}}, K));
                Floats x = normal(random, {T, K}), norm = normal(random, {K}, 0.3);
                const Floats all = all_logits(t, s, x, norm);
                for (const bool penalised : {false, true}) {
                    Request r{k, N - 40};
                    Integers unused({2}), cuts = offsets({1, T}), fed({1 + T}),
                                          seen[2] = {Integers({65, words}), Integers({65, words})};
                    // What is likely is what is not to be chosen, or what the text holds.
                    std::vector<int64_t> order(static_cast<size_t>(N));
                    for (int64_t i = 0; i < N; ++i) order[static_cast<size_t>(i)] = i;
                    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return all[a] > all[b]; });
                    unused[0] = order[0], unused[1] = order[7];
                    std::fill(fed.data.begin(), fed.data.end(), order[2]);
                    std::vector<int64_t> times;
                    for (Integers& text : seen) std::fill(text.data.begin(), text.data.end(), 0);
                    if (penalised) {
                        r.presence = 1.5, r.frequency = 0.2, r.repetition = 1.1;
                        times.assign(static_cast<size_t>(N), -1);
                        for (size_t i = 1; i < 5; ++i) {
                            const int64_t id = order[i];
                            seen[1][id / 64] |= static_cast<int64_t>(uint64_t{1} << (id % 64));
                            seen[1][words + id] = times[static_cast<size_t>(id)] = static_cast<int64_t>(i % 3);
                        }
                    }
                    const View views[2] = {seen[0].view(), seen[1].view()};
                    std::fill(s.history.data.begin(), s.history.data.end(), 0);
                    const Floats y = top(t, s, x, norm, r, unused, Views{views, penalised ? 2 : 0}, cuts, fed);
                    bool right = true;
                    for (int64_t row = 0; row < T; ++row) {
                        if (penalised && row > 0) ++times[static_cast<size_t>(fed[1 + row])];  // a draft
                        right = right && holds_top(y, all, row, r, unused, times);
                    }
                    const std::string what = "format " + std::to_string(static_cast<int>(format)) +
                                             " T=" + std::to_string(T) + " k=" + std::to_string(k) +
                                             (penalised ? " with penalties" : "");
                    t.check(right, what);
                    if (T == 1) t.check(count_left_out(y) > N / 8, what + " leaves out some");
                    if (T == 9) t.check(count_left_out(y) == 0, what + " leaves out none");
                }
            }
}

// Weights whose lowest bits lean with the hidden row: what is lost by plain rounding adds up there.
void test_leaning(Suite& t) {
    Random random(53);
    const int64_t N = 4096, K = 256;
    Packed head = pack(t, random, {{N, Format::f32}}, K);
    Floats x = normal(random, {1, K}), norm({K});
    std::fill(norm.data.begin(), norm.data.end(), 0.0f);
    float* const w = reinterpret_cast<float*>(head.bytes[0].data.data());
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) {
            const double step = 1.0 / 7, lean = (n % 64 == 5 ? 0.45 : -0.45) * (x[k] > 0 ? 1 : -1);
            w[(n / 16 * K + k) * 16 + n % 16] =
                static_cast<float>(k % 16 == 0 ? 1.0 : step * (static_cast<double>(random.below(9)) - 4 + lean));
        }
    Integers none({0}), cuts({0}), fed({0});
    Request r{20, N};
    bool right = true;
    int64_t left_out = 0;
    for (int draw = 0; draw < 20; ++draw) {
        Screened s = screened(t, random, head);
        const Floats all = all_logits(t, s, x, norm), y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
        right = right && holds_top(y, all, 0, r, none, {});
        left_out += count_left_out(y);
    }
    t.check(right && left_out > 0, "weights that lean with the row");
}

}  // namespace

void test_pack_screen(Suite& t) {
    Random random(50);
    for (const Format format : {Format::f32, Format::bf16, Format::int8, Format::int4})
        for (const int64_t K : {1, 40, 128, 300})
            for (const int64_t N : {5, 16, 37}) {
                const Screened s = screened(t, random, pack(t, random, {{N, format}}, K));
                bool near = true, bounded = true;
                for (int64_t n = 0; n < N; ++n) {
                    double fourth = 0.0, squares = 0.0;
                    for (int64_t k = 0; k < K; ++k) {
                        const auto [step, nibble] = entry(s, n, k);
                        const double value = s.head.at(0, n, k), found = step * (nibble - 8 - s.dither[k]);
                        near = near && std::fabs(found - value) <= step * (0.5 + 1e-5);
                        squares += value * value;
                        if (k % 16 == 0) fourth += step * step * step * step;
                    }
                    bounded = bounded && std::pow(fourth, 0.25) <= s.bounds[n / 16 * 2] &&
                              std::sqrt(squares) <= s.bounds[n / 16 * 2 + 1];
                }
                const std::string what = "format " + std::to_string(static_cast<int>(format)) +
                                         " K=" + std::to_string(K) + " N=" + std::to_string(N);
                t.check(near, what + ": half a step");
                t.check(bounded, what + ": bounds");
            }
    Screened s = screened(t, random, pack(t, random, {{20, Format::bf16}}, 40));
    Bytes small({100});
    t.refuses("a sketch of another size", [&] {
        t.call([&] { t.ops.pack_screen(s.head.weight, s.dither.view(), small.view(), s.bounds.view()); });
    });
}

void test_linear_top(Suite& t) {
    test_texts(t);
    test_leaning(t);
    Random random(54);
    const int64_t N = 3000, K = 128;
    Packed head = pack(t, random, {{N, Format::f32}}, K);
    float* const w = reinterpret_cast<float*>(head.bytes[0].data.data());
    w[(11 * K + 3) * 16 + 4] = kInfinity, w[(12 * K + 3) * 16 + 4] = std::nanf(""), w[(13 * K) * 16] = 1e30f;
    Screened s = screened(t, random, head);
    Floats x = normal(random, {1, K}), norm = normal(random, {K}, 0.1);
    Integers none({0}), cuts({0}), fed({0});
    Request r{1, N};
    Floats y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
    t.check(!std::isfinite(y[11 * 16 + 4]) && std::isnan(y[12 * 16 + 4]) && std::fabs(y[13 * 16]) > 1e20f &&
                count_left_out(y) > N / 2,
            "rows that no sketch can hold are multiplied");
    x[5] = std::nanf("");
    y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
    t.check(std::count_if(y.data.begin(), y.data.end(), [](float v) { return std::isnan(v); }) == N, "NaN stays NaN");
    x[5] = 0.0f;
    // It was of no use there: so many calls do without, then it is tried again.
    t.check(s.history[0] == 8 && s.history[1] == 8, "a rest");
    for (int i = 0; i < 8; ++i) y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
    t.check(s.history[0] == 0 && count_left_out(y) == 0, "no logit left out meanwhile");
    y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
    t.check(s.history[1] == 4 && count_left_out(y) > 0, "of use again");
    r.presence = -0.5;
    y = top(t, s, x, norm, r, none, Views{}, cuts, fed);
    t.check(count_left_out(y) == 0, "none is left out where a penalty raises logits");
    r.presence = 0.0, r.k = 0;
    t.refuses("no logit", [&] { top(t, s, x, norm, r, none, Views{}, cuts, fed); });
    r.k = 1, r.limit = N + 1;
    t.refuses("ids beyond the head", [&] { top(t, s, x, norm, r, none, Views{}, cuts, fed); });
    r.limit = N;
    Floats bounds({1, 2});
    s.bounds = bounds;
    t.refuses("bounds of another head", [&] { top(t, s, x, norm, r, none, Views{}, cuts, fed); });
}

}  // namespace deltaic::test
