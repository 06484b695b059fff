// What this machine can do at best, for the benchmarks: reading memory in order, and multiply-adds out of registers.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {
constexpr int64_t kPortion = 1 << 16;  // floats that a thread reads at a time
constexpr int64_t kRounds = 1 << 11;   // rounds that it computes at a time
constexpr int kChains = kTileTokens >= 12 ? 24 : kTileTokens >= 2 ? 6 : 3;  // accumulators that fit the registers

constexpr int kDots = 12;  // independent native registers: more than latency times issue rate

// One step of the fastest int8 dot product of this instruction set; kDotLanes products of int8 are added up in it.
#if defined(__AVX512VNNI__)
constexpr int64_t kDotLanes = 64;
DELTAIC_INLINE ivec dot_int8(ivec acc, ivec w, ivec a) { return _mm512_dpbusd_epi32(acc, w, a); }
#elif defined(__AVX2__)
constexpr int64_t kDotLanes = 32;
DELTAIC_INLINE ivec dot_int8(ivec acc, ivec& w, ivec a) {
    asm volatile("" : "+x"(w));  // else the product, always the same, would leave the loop
    return i_add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(DELTAIC_PORTABLE)
constexpr int64_t kDotLanes = 16;
DELTAIC_INLINE ivec dot_int8(ivec acc, ivec w, ivec a) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
}
#else
constexpr int64_t kDotLanes = 0;
DELTAIC_INLINE ivec dot_int8(ivec acc, ivec, ivec) { return acc; }
#endif
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

// The same for int8 dot products; fails where the instruction set has none.
void probe_int8(View results, View operations) {
    if (kDotLanes == 0) fail("probe_int8", "this instruction set has no int8 dot product");
    parallel_for(results.shape[0], 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; ++p) {
            ivec chain[kDots], w = i_set1(0x01010101), a = i_set1(0x01020101);
            for (int c = 0; c < kDots; ++c) chain[c] = i_set1(c);
            for (int64_t i = 0; i < kRounds; ++i)
                for (int c = 0; c < kDots; ++c) chain[c] = dot_int8(chain[c], w, a);
            for (int c = 1; c < kDots; ++c) chain[0] = i_add(chain[0], chain[c]);
            float lanes[kWidth];
            v_store(lanes, i_to_float(chain[0]));
            results.f32()[p] = lanes[0];
        }
    });
    operations.f32()[0] = static_cast<float>(results.shape[0]) * kRounds * kDots * kDotLanes * 2;
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
