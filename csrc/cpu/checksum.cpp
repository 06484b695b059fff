// The checksum of packed files (definition: python/deltaic/ops/quantise.py), as fast as memory can be read.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int64_t kLine = 64, kChunk = 1024 * kLine;

DELTAIC_INLINE uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint64_t chunk_sum(const uint8_t* data, int64_t bytes, uint64_t number) {
    u64x8 a = {}, b = {};
    for (int64_t i = 0; i < bytes; i += kLine) {
        u64x8 words;
        memcpy(&words, data + i, kLine);
        a += words;
        b += a;
    }
    uint64_t state = number;
    for (int i = 0; i < 8; ++i) state = splitmix64(state ^ a[i]);
    for (int i = 0; i < 8; ++i) state = splitmix64(state ^ b[i]);
    return state;
}

}  // namespace

// `first`: the number of the first chunk of `data`.
void checksum(View data, int64_t first, View sum) {
    const int64_t bytes = data.shape[0], chunks = ceil_div(bytes, kChunk);
    if (bytes % kLine != 0) fail("checksum", "data is not a multiple of 64 bytes");
    uint64_t* totals = static_cast<uint64_t*>(scratch(static_cast<size_t>(thread_count()) * kLine));
    for (int t = 0; t < thread_count(); ++t) totals[t * 8] = 0;
    parallel_for(chunks, 16, [&](int64_t begin, int64_t end, int thread) {
        uint64_t total = 0;
        for (int64_t c = begin; c < end; ++c)
            total +=
                chunk_sum(data.u8() + c * kChunk, min64(kChunk, bytes - c * kChunk), static_cast<uint64_t>(first + c));
        totals[thread * 8] += total;
    });
    uint64_t total = 0;
    for (int t = 0; t < thread_count(); ++t) total += totals[t * 8];
    memcpy(sum.data, &total, sizeof total);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
