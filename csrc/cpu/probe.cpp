// What this machine can do at best, for bench/bench_ops.py: reading memory in order, and multiply-adds out of registers.
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {
constexpr int64_t kPortion = 1 << 16;  // floats that a thread reads at a time
constexpr int64_t kRounds = 1 << 11;   // rounds that it computes at a time
constexpr int kChains = kTileTokens >= 12 ? 24 : kTileTokens >= 2 ? 6 : 3;  // accumulators that fit the registers
}  // namespace

// sum[0] = the sum of `source`; all threads read it once from beginning to end.
void probe_read(View source, View sum) {
    const int64_t N = source.shape[0], portions = ceil_div(N, kPortion);
    float* sums = scratch_f32(portions);
    parallel_for(portions, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t last = min64((p + 1) * kPortion, N);
            f32x16 s[4] = {zero(), zero(), zero(), zero()};
            int64_t i = p * kPortion;
            for (; i + 64 <= last; i += 64)
                for (int j = 0; j < 4; ++j) s[j] = add(s[j], load(source.f32() + i + j * 16));
            for (; i < last; i += 16) s[0] = add(s[0], load_n(source.f32() + i, last - i));
            sums[p] = reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
        }
    });
    sum.f32()[0] = 0.0f;
    for (int64_t p = 0; p < portions; ++p) sum.f32()[0] += sums[p];
}

// One portion of multiply-adds for each element of `results`; flops[0] = operations done (a multiply-add is two).
void probe_fma(View results, View flops) {
    parallel_for(results.shape[0], 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; ++p) {
            f32x16 chain[kChains], factor = set1(0.999f), term = set1(1e-3f);
            for (int c = 0; c < kChains; ++c) chain[c] = set1(static_cast<float>(c));
            for (int64_t i = 0; i < kRounds; ++i)
                for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], factor, term);
            f32x16 total = chain[0];
            for (int c = 1; c < kChains; ++c) total = add(total, chain[c]);
            results.f32()[p] = reduce_add(total);
        }
    });
    flops.f32()[0] = static_cast<float>(results.shape[0]) * kRounds * kChains * 16 * 2;
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
