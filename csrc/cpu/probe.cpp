// What can this machine do at most? Read streams and arithmetic peaks, measured by the benchmarks in the same run as
// the model.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int kChains = 12;  // independent accumulators: more than latency times issue rate, fewer than registers

DELTAIC_INLINE vec peak_f32(const float* operands, int64_t rounds) {
    const vec x = v_load(operands), y = v_load(operands + 16);
    vec acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = v_set1(static_cast<float>(i));
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < kChains; ++i) acc[i] = v_fma(x, y, acc[i]);
    for (int i = 1; i < kChains; ++i) acc[0] = v_add(acc[0], acc[i]);
    return acc[0];
}

#if defined(__AVX512VNNI__) || defined(__AVX2__) || (defined(__ARM_FEATURE_DOTPROD) && !defined(DELTAIC_PORTABLE))
#define DELTAIC_INT8_PEAK
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int64_t kInt8Operations = 16;  // of a lane: smmla adds eight products
#else
constexpr int64_t kInt8Operations = 8;
#endif
DELTAIC_INLINE ivec peak_int8(const void* operands, int64_t rounds) {
    ivec x = i_load(operands);
    const ivec y = i_load(static_cast<const uint8_t*>(operands) + 64);
    ivec acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = i_set1(i);
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < kChains; ++i) {
#if defined(__AVX512VNNI__)
            acc[i] = _mm512_dpbusd_epi32(acc[i], x, y);
#elif defined(__AVXVNNI__)
            acc[i] = dot_bytes(acc[i], x, y);
#elif defined(__AVX2__)
            asm volatile("" : "+x"(x));  // else the product, always the same, would leave the loop
            acc[i] = i_add(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
            acc[i] = vmmlaq_s32(acc[i], vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
#else
            acc[i] = vdotq_s32(acc[i], vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
#endif
        }
    for (int i = 1; i < kChains; ++i) acc[0] = i_add(acc[0], acc[i]);
    return acc[0];
}
#else
constexpr int64_t kInt8Operations = 0;
#endif

}  // namespace

// Reads every byte once, on all threads, in portions of 1 MiB; adds the words up so that no read can be left out.
void probe_read(View data, View sum) {
    const int64_t lines = data.shape[0] / 64;
    uint64_t* totals = static_cast<uint64_t*>(scratch(static_cast<size_t>(thread_count()) * 64));
    for (int t = 0; t < thread_count(); ++t) totals[t * 8] = 0;
    parallel_for(lines, 16384, [&](int64_t begin, int64_t end, int thread) {
        u64x8 sums[4] = {};
        const uint8_t* p = data.u8();
        int64_t line = begin;
        for (; line + 4 <= end; line += 4)
            for (int i = 0; i < 4; ++i) {
                u64x8 words;
                memcpy(&words, p + (line + i) * 64, 64);
                sums[i] += words;
            }
        for (; line < end; ++line) {
            u64x8 words;
            memcpy(&words, p + line * 64, 64);
            sums[0] += words;
        }
        sums[0] += sums[1] + sums[2] + sums[3];
        for (int i = 0; i < 8; ++i) totals[thread * 8] += sums[0][i];
    });
    uint64_t total = 0;
    for (int t = 0; t < thread_count(); ++t) total += totals[t * 8];
    memcpy(sum.data, &total, sizeof total);
}

// kind 0: float32 multiply-adds; 1: int8 dot products. All threads, operands in registers. `operations` gets how many
// additions and multiplications were done: for each lane and chain 2 in float32, 8 in int8 (16 of smmla).
void probe_peak(int64_t kind, int64_t rounds, View operations) {
    if (rounds < 1 || kind < 0 || kind > 1) fail("probe_peak", "kind must be 0 or 1, rounds at least 1");
#if !defined(DELTAIC_INT8_PEAK)
    if (kind == 1) fail("probe_peak", "this instruction set has no int8 dot product");
#endif
    const int64_t portions = 8 * thread_count();
    float* memory = scratch_f32(32 * (portions + 1));
    float* operands = memory + 32 * portions;
    for (int i = 0; i < 32; ++i) operands[i] = bits_to_float(0x01010101u);  // small as a float, 1 in every byte
    parallel_for(portions, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; ++p) {
            if (kind == 0) {
                v_store(memory + 32 * p, peak_f32(operands, rounds));
            } else {
#if defined(DELTAIC_INT8_PEAK)
                const ivec result = peak_int8(operands, rounds);
                memcpy(memory + 32 * p, &result, sizeof result);
#endif
            }
        }
    });
    *operations.i64() = portions * rounds * kChains * kWidth * (kind == 0 ? 2 : kInt8Operations);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
