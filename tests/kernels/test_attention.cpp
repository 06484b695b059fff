// gated_attention, vision_attention
#include <algorithm>
#include <cmath>

#include "check.h"

namespace deltaic::test {

namespace {

// x [D] with its first 2 R dimensions rotated in pairs (f, f + R).
Numbers rotate(Numbers x, const Floats& cosine, const Floats& sine, int64_t t, int64_t R) {
    for (int64_t f = 0; f < R; ++f) {
        const double a = x[static_cast<size_t>(f)], b = x[static_cast<size_t>(f + R)], c = cosine[t * R + f],
                     s = sine[t * R + f];
        x[static_cast<size_t>(f)] = a * c - b * s;
        x[static_cast<size_t>(f + R)] = b * c + a * s;
    }
    return x;
}

void draw_angles(Random& random, Floats& cosine, Floats& sine) {
    for (int64_t i = 0; i < cosine.size(); ++i) {
        const double angle = 6.28 * random.uniform();
        cosine[i] = static_cast<float>(std::cos(angle)), sine[i] = static_cast<float>(std::sin(angle));
    }
}

// softmax(q . keys / sqrt(D)) values
Numbers attend(const Numbers& q, const std::vector<Numbers>& keys, const std::vector<Numbers>& values) {
    const size_t D = q.size();
    Numbers scores, o(D);
    double largest = -INFINITY, sum = 0.0;
    for (const Numbers& k : keys) {
        double score = 0.0;
        for (size_t d = 0; d < D; ++d) score += q[d] * k[d] / std::sqrt(static_cast<double>(D));
        scores.push_back(score);
        largest = std::max(largest, score);
    }
    for (double& s : scores) sum += s = std::exp(s - largest);
    for (size_t i = 0; i < keys.size(); ++i)
        for (size_t d = 0; d < D; ++d) o[d] += scores[i] / sum * values[i][d];
    return o;
}

// A sequence's blocks, [layers][2][heads][tokens][D], all elements poisoned at first.
struct Cache {
    static constexpr int64_t kLayers = 2, kLayer = 1, kTokens = 8;
    Dtype dtype;
    int64_t heads, D, width;
    std::vector<Floats> floats;
    std::vector<Array<uint16_t>> halves;
    std::vector<Bytes> bytes;
    std::vector<void*> pointers;
    BlockTable table;

    Cache(Dtype stored, int64_t kv_heads, int64_t head_dim, int64_t tokens)
        : dtype(stored), heads(kv_heads), D(head_dim), width(kv_width(stored, head_dim)) {
        const Shape shape = {kLayers, 2, heads, kTokens, width};
        for (int64_t i = 0; i * kTokens < tokens; ++i) {
            if (dtype == Dtype::u16) {
                halves.emplace_back(shape);
                for (uint16_t& v : halves.back().data) v = 0x7fc0;
            } else if (dtype == Dtype::u8) {
                bytes.emplace_back(shape);
                for (uint8_t& v : bytes.back().data)
                    v = 0xff;  // as a scale: NaN; as a number: 127, which may be stored
            } else {
                floats.push_back(poisoned(shape));
            }
        }
        for (Floats& b : floats) pointers.push_back(b.data.data());
        for (auto& b : halves) pointers.push_back(b.data.data());
        for (auto& b : bytes) pointers.push_back(b.data.data());
        table.blocks = pointers.data(), table.size = static_cast<int64_t>(pointers.size());
        table.dtype = dtype;
        table.layers = kLayers, table.kv_heads = heads, table.tokens = kTokens, table.width = width;
    }
    int64_t place(int64_t which, int64_t head, int64_t token, int64_t d) const {
        return (((kLayer * 2 + which) * heads + head) * kTokens + token % kTokens) * width + d;
    }
    Numbers read(int64_t which, int64_t head, int64_t token) const {
        const size_t block = static_cast<size_t>(token / kTokens);
        Numbers x;
        for (int64_t d = 0; d < D; ++d) {
            const int64_t i = place(which, head, token, d);
            if (dtype == Dtype::u8) {
                const int64_t group = place(which, head, token, d / kKvGroup * (kKvGroup + 2));
                x.push_back(from_half(&bytes[block][group]) * (bytes[block][group + 2 + d % kKvGroup] - 128));
            } else {
                x.push_back(dtype == Dtype::u16 ? from_bf16(halves[block][i]) : floats[block][i]);
            }
        }
        return x;
    }
    // How many elements were written.
    int64_t written() const {
        int64_t n = 0;
        for (const Floats& b : floats)
            for (const float v : b.data) n += v == v;
        for (const auto& b : halves)
            for (const uint16_t v : b.data) n += v != 0x7fc0;
        for (const auto& b : bytes)  // rows whose first scale was written
            for (size_t i = 0; i < b.data.size(); i += static_cast<size_t>(width))
                n += (b.data[i] != 0xff || b.data[i + 1] != 0xff) ? D : 0;
        return n;
    }
};

struct Attention {
    int64_t Hq, Hkv, D, R;
    Floats q_norm, k_norm;
    int64_t columns() const { return 2 * Hq * D + 2 * Hkv * D; }
    int64_t prefill = 0;  // rows of a prompt: another order of additions
};

Floats apply(Suite& t, Attention& a, Floats& proj, Floats& cosine, Floats& sine, const Shape& lengths,
             const Shape& starts, std::vector<Cache>& caches) {
    Integers cuts = offsets(lengths), first({static_cast<int64_t>(starts.size())});
    first.data = starts;
    std::vector<const BlockTable*> tables;
    for (Cache& c : caches) tables.push_back(&c.table);
    Floats y = poisoned({proj.shape[0], a.Hq * a.D});
    t.call([&] {
        t.ops.gated_attention(proj.view(), a.q_norm.view(), a.k_norm.view(), cosine.view(), sine.view(), 1e-6f, a.Hq,
                              a.Hkv, Cache::kLayer, cuts.view(), first.view(),
                              Tables{tables.data(), static_cast<int64_t>(tables.size())}, a.prefill, y.view());
    });
    return y;
}

Numbers head_of(const Floats& proj, int64_t t, int64_t column, int64_t D) {
    const float* p = proj.data.data() + t * proj.shape[1] + column;
    return Numbers(p, p + D);
}

// Tokens arrive in two calls, of first and then second tokens for each sequence; everything is compared.
void compare(Suite& t, Random& random, Attention& a, Dtype dtype, const Shape& first, const Shape& second) {
    std::vector<Cache> caches;
    Shape starts(first.size(), 0);
    for (size_t b = 0; b < first.size(); ++b) caches.emplace_back(dtype, a.Hkv, a.D, first[b] + second[b] + 3);
    for (const Shape& lengths : {first, second}) {
        const Integers cuts = offsets(lengths);
        const int64_t T = cuts[cuts.size() - 1];
        const std::string what = std::string(dtype == Dtype::f32   ? "f32"
                                             : dtype == Dtype::u16 ? "bf16"
                                                                   : "int8") +
                                 " cache, D=" + std::to_string(a.D) + " T=" + std::to_string(T);
        Floats proj = normal(random, {T, a.columns()}), cosine({T, a.R}), sine({T, a.R});
        draw_angles(random, cosine, sine);
        const Floats y = apply(t, a, proj, cosine, sine, lengths, starts, caches);
        Numbers expected;
        bool stored = true;
        for (size_t b = 0; b < lengths.size(); ++b) {
            for (int64_t i = 0; i < lengths[b]; ++i) {
                const int64_t row = cuts[static_cast<int64_t>(b)] + i, last = starts[b] + i;
                for (int64_t h = 0; h < a.Hkv; ++h) {
                    const Numbers k =
                        rotate(rms_norm(head_of(proj, row, (2 * a.Hq + h) * a.D, a.D).data(), a.k_norm, 1e-6), cosine,
                               sine, row, a.R);
                    const Numbers v = head_of(proj, row, (2 * a.Hq + a.Hkv + h) * a.D, a.D),
                                  k_found = caches[b].read(0, h, last), v_found = caches[b].read(1, h, last);
                    for (size_t d = 0; d < k.size(); ++d) {
                        const auto largest = [&](const Numbers& x) {  // of the group
                            double most = 0.0;
                            for (size_t i = d / 64 * 64; i < std::min(x.size(), d / 64 * 64 + 64); ++i)
                                most = std::max(most, std::fabs(x[i]));
                            return most;
                        };
                        const double k_error = std::fabs(k_found[d] - k[d]), v_error = std::fabs(v_found[d] - v[d]);
                        if (dtype == Dtype::u8) {  // half a step, and what rounding the step may move the largest
                            stored = stored && k_error <= 0.6 / 127 * largest(k) + 1e-5;
                            stored = stored && v_error <= 0.6 / 127 * largest(v);
                        } else if (dtype == Dtype::u16) {
                            stored = stored && k_error <= std::ldexp(std::fabs(k[d]), -8) + 1e-5;
                            stored = stored && v_found[d] == from_bf16(to_bf16(v[d]));
                        } else {
                            stored = stored && k_error <= 1e-5 && v_error == 0.0;
                        }
                    }
                }
            }
            // On from what is stored: a key on the border between two bfloat16 numbers may be either.
            for (int64_t i = 0; i < lengths[b]; ++i) {
                const int64_t row = cuts[static_cast<int64_t>(b)] + i;
                for (int64_t h = 0; h < a.Hq; ++h) {
                    std::vector<Numbers> keys, values;
                    for (int64_t j = 0; j <= starts[b] + i; ++j) {
                        keys.push_back(caches[b].read(0, h / (a.Hq / a.Hkv), j));
                        values.push_back(caches[b].read(1, h / (a.Hq / a.Hkv), j));
                    }
                    const Numbers q = rotate(rms_norm(head_of(proj, row, 2 * h * a.D, a.D).data(), a.q_norm, 1e-6),
                                             cosine, sine, row, a.R);
                    const Numbers o = attend(q, keys, values), gate = head_of(proj, row, (2 * h + 1) * a.D, a.D);
                    for (size_t d = 0; d < o.size(); ++d) expected.push_back(o[d] * sigmoid(gate[d]));
                }
            }
            starts[b] += lengths[b];
            t.check(caches[b].written() == 2 * a.Hkv * a.D * starts[b],
                    what + ": only the new tokens' places are written");
        }
        t.check(stored, what + ": stored keys and values");
        double tolerance = dtype != Dtype::f32 && t.rounds_to_bf16 ? 2e-2 : 2e-5;
        // Steps of the row's largest number, half of one at most for each; thousands of them mostly cancel.
        if (dtype == Dtype::u8 && t.int8_kv_bits < 24)
            tolerance = std::max(tolerance, 3 * std::ldexp(1.0, 1 - t.int8_kv_bits));
        t.close(y, expected, tolerance, what);
    }
}

}  // namespace

void test_gated_attention(Suite& t) {
    Random random(9);
    for (const Shape& s :
         {Shape{1, 1, 4, 1}, Shape{4, 2, 18, 4}, Shape{8, 1, 32, 8}, Shape{2, 2, 64, 16}, Shape{2, 1, 136, 16}})
        for (const Dtype dtype : {Dtype::f32, Dtype::u16, Dtype::u8}) {
            Attention a{s[0], s[1], s[2], s[3], normal(random, {s[2]}, 0.3), normal(random, {s[2]}, 0.3)};
            for (a.prefill = 0; a.prefill < 2; ++a.prefill) compare(t, random, a, dtype, {3, 1}, {2, 7});
            a.prefill = 0;
            compare(t, random, a, dtype, {1}, {1});
            compare(t, random, a, dtype, {5, 0, 1}, {1, 2, 0});
            compare(t, random, a, dtype, {66}, {1});
            compare(t, random, a, dtype, {9, 3}, {40, 1});
        }
    Attention a{4, 2, 8, 2, normal(random, {8}), normal(random, {8})};
    Floats proj = normal(random, {3, a.columns()}), cosine({3, 2}), sine({3, 2});
    std::vector<Cache> caches;
    caches.emplace_back(Dtype::f32, 2, 8, 8);
    t.refuses("a cache without room", [&] { apply(t, a, proj, cosine, sine, {3}, {6}, caches); });
    t.refuses("a negative start", [&] { apply(t, a, proj, cosine, sine, {3}, {-1}, caches); });
    t.refuses("cu_seqlens beyond the rows", [&] { apply(t, a, proj, cosine, sine, {4}, {0}, caches); });
    a.Hkv = 3;
    t.refuses("heads that are no multiple of key-value heads",
              [&] { apply(t, a, proj, cosine, sine, {3}, {0}, caches); });
}

void test_vision_attention(Suite& t) {
    Random random(10);
    for (const Shape& s : {Shape{1, 2}, Shape{2, 18}, Shape{3, 64}})
        for (const Shape& lengths : {Shape{1}, Shape{4, 0, 37}, Shape{70}}) {
            const int64_t heads = s[0], D = s[1], V = heads * D, R = D / 2;
            Integers cuts = offsets(lengths);
            const int64_t P = cuts[cuts.size() - 1];
            Floats qkv = normal(random, {P, 3 * V}), cosine({P, R}), sine({P, R}), y = poisoned({P, V});
            draw_angles(random, cosine, sine);
            const auto call = [&](int64_t rounded) {
                t.call([&] {
                    t.ops.vision_attention(qkv.view(), cosine.view(), sine.view(), heads, cuts.view(), rounded,
                                           y.view());
                });
            };
            call(0);
            Numbers expected(static_cast<size_t>(P * V));
            for (size_t b = 0; b < lengths.size(); ++b)
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t begin = cuts[static_cast<int64_t>(b)], end = begin + lengths[b];
                    std::vector<Numbers> keys, values;
                    for (int64_t p = begin; p < end; ++p) {
                        keys.push_back(rotate(head_of(qkv, p, V + h * D, D), cosine, sine, p, R));
                        values.push_back(head_of(qkv, p, 2 * V + h * D, D));
                    }
                    for (int64_t p = begin; p < end; ++p) {
                        const Numbers o = attend(rotate(head_of(qkv, p, h * D, D), cosine, sine, p, R), keys, values);
                        for (int64_t d = 0; d < D; ++d)
                            expected[static_cast<size_t>(p * V + h * D + d)] = o[static_cast<size_t>(d)];
                    }
                }
            const std::string what =
                "heads " + std::to_string(heads) + " width " + std::to_string(D) + " P=" + std::to_string(P);
            t.close(y, expected, 2e-5, what);
            call(1);
            t.close(y, expected, t.rounds_to_bf16 ? 2e-2 : 2e-5, what + ", rounded");
        }
}

}  // namespace deltaic::test
