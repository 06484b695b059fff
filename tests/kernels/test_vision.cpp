// patch_embed
#include <cmath>

#include "check.h"

namespace deltaic::test {

void test_patch_embed(Suite& t) {
    Random random(11);
    for (const Shape& s : {Shape{1, 1, 1, 1}, Shape{2, 3, 2, 2}, Shape{4, 2, 6, 3}}) {
        const int64_t p = s[0], m = 2, grid_h = m * s[1], grid_w = m * s[2], side = s[3] + 1, V = 37, K = 3 * p * p,
                      P = grid_h * grid_w;
        const Packed weight = pack(t, random, {{V, Format::f32}}, K);
        Floats bias = normal(random, {V}), table = normal(random, {side * side, V}), y = poisoned({P, V}), mean({3}),
               std({3});
        for (int64_t c = 0; c < 3; ++c)
            mean[c] = 0.4f + 0.1f * static_cast<float>(c), std[c] = 0.3f - 0.05f * static_cast<float>(c);
        Bytes image({grid_h * p, grid_w * p, 3});
        for (uint8_t& v : image.data) v = static_cast<uint8_t>(random.below(256));
        t.call([&] {
            t.ops.patch_embed(image.view(), weight.weight, bias.view(), table.view(), p, m, mean.view(), std.view(),
                              y.view());
        });

        const auto place = [&](int64_t i, int64_t n) {
            return n > 1 ? static_cast<double>(i * (side - 1)) / static_cast<double>(n - 1) : 0.0;
        };
        Numbers expected;
        for (int64_t i = 0; i < P; ++i) {
            // Rows come in blocks of m x m patches.
            const int64_t block = i / (m * m), row = block / (grid_w / m) * m + i % (m * m) / m,
                          column = block % (grid_w / m) * m + i % m;
            const double r = place(row, grid_h), c = place(column, grid_w);
            for (int64_t n = 0; n < V; ++n) {
                double sum = bias[n];
                for (int64_t k = 0; k < K; ++k) {
                    const int64_t channel = k / (p * p), y0 = row * p + k / p % p, x0 = column * p + k % p;
                    sum += weight.at(0, n, k) * (image[(y0 * grid_w * p + x0) * 3 + channel] / 255.0 - mean[channel]) /
                           std[channel];
                }
                for (int64_t dr = 0; dr < 2; ++dr)
                    for (int64_t dc = 0; dc < 2; ++dc) {
                        const int64_t r0 = static_cast<int64_t>(r), c0 = static_cast<int64_t>(c);
                        const double share = (dr ? r - static_cast<double>(r0) : 1.0 - (r - static_cast<double>(r0))) *
                                             (dc ? c - static_cast<double>(c0) : 1.0 - (c - static_cast<double>(c0)));
                        sum +=
                            share * table[(std::min(r0 + dr, side - 1) * side + std::min(c0 + dc, side - 1)) * V + n];
                    }
                expected.push_back(sum);
            }
        }
        t.close(y, expected, 1e-5, "patches of " + std::to_string(p));

        Bytes odd({grid_h * p + 1, grid_w * p, 3});
        t.refuses("an image that is no multiple of the patches", [&] {
            t.call([&] {
                t.ops.patch_embed(odd.view(), weight.weight, bias.view(), table.view(), p, m, mean.view(), std.view(),
                                  y.view());
            });
        });
    }
}

}  // namespace deltaic::test
