// Products of up to eight rows of bfloat16 activations with a packed matrix on tensor cores: every weight is read once
// and unpacked once, whatever the number of rows.
//
// A warp multiplies 16 rows of W (with glu: 8 gate rows and their 8 up rows) with the tokens, run by run of 128
// columns; `splits` warps share the runs of a tile, run r going to split r % splits, and their sums are added in order.
// Nothing of that depends on how many tokens there are, so a token gets the same bits in any batch. A lane (g, t) loads
// 16 bytes of rows g and g + 8 at a time; which columns these are depends on the format, and the activations are staged
// in units of eight columns so that lane t finds those of its i-th unit at unit 4 i + t of the run:
//   bf16  unit 4 i + t        int8  unit 8 (i / 2) + 2 t + i % 2        int4  unit 4 t + i
// Activations that a norm has made floats are staged as two bfloat16, x = high + low, and take two products: the error
// is 2^-17 then, that of a sum of floats.
// int4 unpacks to even columns first: a masked word holds columns 0 and 2, 4 and 6, 1 and 3, 5 and 7 of eight.
#pragma once

#include "cuda/common.cuh"
#include "cuda/weight.cuh"

namespace deltaic {
namespace cuda {

constexpr int kMmaTokens = 8, kMmaRows = 16, kPartialPitch = kMmaRows + 4;  // what a warp stores meets no bank twice
constexpr int kRunColumns = 128, kRunUnits = kRunColumns / 8;
constexpr int kMmaThreads = 256, kMmaWarps = kMmaThreads / kWarp;
constexpr int64_t kMmaUnits = 2048;  // units (16 bytes) of activations that a block stages at once, 32 KB

// v * s + c of two bfloat16 in a register.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t v, uint32_t s, uint32_t c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(s), "r"(c));
    return r;
#else
    const float low = fmaf(__uint_as_float(v << 16), __uint_as_float(s << 16), __uint_as_float(c << 16));
    const float high =
        fmaf(__uint_as_float(v & 0xffff0000u), __uint_as_float(s & 0xffff0000u), __uint_as_float(c & 0xffff0000u));
    return pack_bf16(low, high);
#endif
}

// x & mask | bits, which the compiler makes two instructions of where both are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
    return r;
#else
    return (x & mask) | bits;
#endif
}

// Two floats that are bfloat16 already.
__device__ __forceinline__ uint32_t pack_exact(float low, float high) {
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}

// Where a lane reads of its two rows: its first 16 bytes, and the scales.
struct Source {
    const uint8_t* q[2];
    const uint8_t* s[2];
    const uint16_t* d[2];
};

// What a lane holds of a run: units 0..3 of two rows. `unit(r, i, a)` gives unit i of row r as four registers, to be
// multiplied with scale(r).
template <Format F>
struct Run;

template <>
struct Run<Format::bf16> {
    static constexpr int kBatch = 1, kBlocks = 2;  // runs under way, blocks on a multiprocessor
    uint4 v[2][4];
    static __device__ __forceinline__ Source source(const Matrix& m, const int64_t (&row)[2], int t) {
        Source from;
#pragma unroll
        for (int r = 0; r < 2; ++r)
            from.q[r] = m.q + row[r] * m.stride * 2 + t * 16, from.s[r] = nullptr, from.d[r] = nullptr;
        return from;
    }
    // Of the last run only the units before `units` exist.
    __device__ __forceinline__ void load(const Source& from, int run, int t, int units) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[r][i] = run * kRunUnits + i * 4 + t < units
                              ? load_as<uint4>(from.q[r] + run * (kRunColumns * 2) + i * 64)
                              : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void unit(int r, int i, uint32_t (&a)[4]) const {
        a[0] = v[r][i].x, a[1] = v[r][i].y, a[2] = v[r][i].z, a[3] = v[r][i].w;
    }
    __device__ __forceinline__ float scale(int) const { return 1.0f; }
};

template <>
struct Run<Format::int8> {
    static constexpr int kBatch = 2, kBlocks = 2;
    uint4 v[2][2];
    uint16_t d[2];
    static __device__ __forceinline__ Source source(const Matrix& m, const int64_t (&row)[2], int t) {
        Source from;
#pragma unroll
        for (int r = 0; r < 2; ++r)
            from.q[r] = m.q + row[r] * m.stride + t * 16, from.d[r] = m.d + row[r] * (m.stride / kRunColumns),
            from.s[r] = nullptr;
        return from;
    }
    __device__ __forceinline__ void load(const Source& from, int run, int, int) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            v[r][0] = load_as<uint4>(from.q[r] + run * kRunColumns),
            v[r][1] = load_as<uint4>(from.q[r] + run * kRunColumns + 64);
            d[r] = from.d[r][run];
        }
    }
    __device__ __forceinline__ void unit(int r, int i, uint32_t (&a)[4]) const {
        const uint4& four = v[r][i / 2];
        const uint32_t word[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            a[j] = pack_exact(biased_byte(word[j / 2], j % 2 * 2) - 8388736.0f,
                              biased_byte(word[j / 2], j % 2 * 2 + 1) - 8388736.0f);
    }
    __device__ __forceinline__ float scale(int r) const { return half_to_float(d[r]); }
};

template <>
struct Run<Format::int4> {
    static constexpr int kBatch = 4, kBlocks = 2;
    uint4 v[2];
    uint8_t s[2];
    uint16_t d[2];
    static __device__ __forceinline__ Source source(const Matrix& m, const int64_t (&row)[2], int t) {
        Source from;
#pragma unroll
        for (int r = 0; r < 2; ++r)
            from.q[r] = m.q + row[r] * (m.stride / 2) + t * 16, from.s[r] = m.s + row[r] * (m.stride / 32) + t,
            from.d[r] = m.d + row[r] * (m.stride / kRunColumns);
        return from;
    }
    __device__ __forceinline__ void load(const Source& from, int run, int, int) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            v[r] = load_as<uint4>(from.q[r] + run * (kRunColumns / 2));
            s[r] = from.s[r][run * (kRunColumns / 32)], d[r] = from.d[r][run];
        }
    }
    // Nibbles as the bfloat16 128 + n; with the scale s of sixteen columns, (128 + n) s - 136 s is the integer (n - 8)
    // s. All of it is exact: s is 1 to 16, and s, 136 s and the result have no more than eight significant bits.
    __device__ __forceinline__ void unit(int r, int i, uint32_t (&a)[4]) const {
        const uint32_t word = i == 0 ? v[r].x : i == 1 ? v[r].y : i == 2 ? v[r].z : v[r].w;
        const float factor = static_cast<float>((i < 2 ? s[r] & 15 : s[r] >> 4) + 1), offset = -136.0f * factor;
        const uint32_t factors = pack_exact(factor, factor), offsets = pack_exact(offset, offset);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            a[j] = fma_bf16x2(and_or(word >> (4 * j), 0x000f000fu, 0x43004300u), factors, offsets);
    }
    __device__ __forceinline__ float scale(int r) const { return half_to_float(d[r]); }
};

// Where unit u of a run is staged.
template <Format F>
__device__ __forceinline__ int staged_unit(int u) {
    const int in = u % kRunUnits;
    if (F == Format::int8) return u - in + (in / 8 * 2 + in % 2) * 4 + in % 8 / 2;
    if (F == Format::int4) return u - in + in % 4 * 4 + in / 4;
    return u;
}

// Eight activations, as the tensor cores take them against a unit of format F.
template <Format F>
__device__ __forceinline__ uint4 packed_unit(const float (&x)[8]) {
    if (F == Format::int4)
        return uint4{pack_bf16(x[0], x[2]), pack_bf16(x[4], x[6]), pack_bf16(x[1], x[3]), pack_bf16(x[5], x[7])};
    return uint4{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

// Units that a staged token takes: the tokens of one step lie in different banks.
__host__ __device__ inline int64_t staged_pitch(int64_t units) { return units + 4; }

// Runs that are staged at once for `rows` rows, two of each token with a norm; a multiple of the largest number of
// splits.
__host__ __device__ inline int64_t staged_runs(int64_t runs, int64_t rows) {
    const int64_t most = kMmaUnits / kRunUnits / rows / kMmaWarps * kMmaWarps;
    return runs < most ? runs : most;
}

// Units that they take.
__host__ __device__ inline int64_t staged_units(int64_t runs, int64_t rows) {
    return rows * staged_pitch(staged_runs(runs, rows) * kRunUnits);
}

// For `tokens` tokens, of which the last block has what is left.
inline size_t mma_shared_bytes(int64_t runs, int64_t tokens, bool norm) {
    const int64_t whole = tokens < kMmaTokens ? tokens : kMmaTokens, rest = (tokens - 1) % kMmaTokens + 1;
    const int64_t a = staged_units(runs, norm ? 2 * whole : whole), b = staged_units(runs, norm ? 2 * rest : rest);
    return static_cast<size_t>(a > b ? a : b) * sizeof(uint4);
}

// Warps that share a tile: so many that the card is full, as far as that goes. A function of the shape alone.
inline int mma_splits(int64_t tiles) {
    int splits = 1;
    while (splits < kMmaWarps && tiles * splits < 1536) splits *= 2;
    return splits;
}

// total += a run of 16 rows x the staged activations of `count` tokens, those of token i from units[i * pitch + place]
// on; with `low`, what rounding took from them is at token count + i.
template <Format F>
__device__ __forceinline__ void run_product(const Run<F>& run, Shared<uint4> units, int place, int pitch, int count,
                                            bool low, float (&total)[4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t upper[4], lower[4];
        run.unit(0, i, upper), run.unit(1, i, lower);
        const uint32_t a[2][4] = {{upper[0], lower[0], upper[1], lower[1]}, {upper[2], lower[2], upper[3], lower[3]}};
        const int at = place + i * 4 + t;
        uint4 h = {0, 0, 0, 0};
        if (g < count) h = units[g * pitch + at];
        mma_bf16(c, a[0], {h.x, h.y});
        mma_bf16(c, a[1], {h.z, h.w});
        if (!low) continue;
        if (g < count) h = units[(count + g) * pitch + at];
        mma_bf16(c, a[0], {h.x, h.y});
        mma_bf16(c, a[1], {h.z, h.w});
    }
    const float scale[2] = {run.scale(0), run.scale(1)};
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] = fmaf(scale[e / 2], c[e], total[e]);
}

// Stages eight activations as unit u of a token, and with `low` what rounding takes from them.
template <Format F>
__device__ __forceinline__ void stage_unit(Shared<uint4> units, int token, int u, int pitch, int count, bool low,
                                           float (&v)[8]) {
    units[token * pitch + staged_unit<F>(u)] = packed_unit<F>(v);
    if (!low) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] -= to_float(from_float<bf16>(v[j]));
    units[(count + token) * pitch + staged_unit<F>(u)] = packed_unit<F>(v);
}

extern bool tensor_cores;  // whether they are used, see ops.h

// Whether gemv_mma takes a matrix.
inline bool mma_takes(const void* x, const float* norm, const Matrix& m) {
    return tensor_cores && m.columns % 8 == 0 && static_cast<Format>(m.format) != Format::f32 &&
           reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(norm) % 16 == 0;
}

// Rows of x, and norm, must begin at multiples of 16 bytes. Block (tiles of one part, eight tokens). A tile is 16 rows,
// or with glu 8 gate rows and 8 up rows; `skipped` rows of q come before those of m. `write(t, n, v)` takes output n of
// token t.
template <Format F, class Write>
__device__ __forceinline__ void gemv_mma(const bf16* x, const float* norm, float eps, const Matrix& m, bool glu,
                                         int64_t skipped, int64_t block, int splits, int64_t t0, int64_t tokens,
                                         Shared<uint4> units, Shared<float> partial, Shared<float> scales,
                                         Write write) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int tiles = kMmaWarps / splits, split = warp % splits;
    const int64_t rows_of_tile = glu ? kMmaRows / 2 : kMmaRows, outputs = glu ? m.rows / 2 : m.rows;
    const int64_t n0 = (block * tiles + warp / splits) * rows_of_tile;
    // Rows past the end are read as row 0, and not written.
    const int64_t top = n0 + g, bottom = glu ? n0 + g : n0 + g + 8;
    const int64_t row[2] = {skipped + (top < outputs ? top : 0),
                            skipped + (bottom < outputs ? (glu ? outputs : 0) + bottom : 0)};
    const int64_t left = tokens - t0;
    const int count = static_cast<int>(left < kMmaTokens ? left : kMmaTokens);
    const int stored = static_cast<int>(m.stride / 8), runs = (stored + kRunUnits - 1) / kRunUnits;
    const int span = static_cast<int>(staged_runs(runs, norm ? 2 * count : count)),
              pitch = static_cast<int>(staged_pitch(span * kRunUnits));
    const Source source = Run<F>::source(m, row, t);
    const bf16* from = x + t0 * m.columns;

    // The first weights are on their way while the activations are made ready.
    Run<F> ahead[Run<F>::kBatch];
    const auto fetch = [&](int first, int end) {
#pragma unroll
        for (int b = 0; b < Run<F>::kBatch; ++b)
            if (first + b * splits < end) ahead[b].load(source, first + b * splits, t, stored);
    };
    fetch(split, span);
    grid_wait();

    if (norm && warp < count) {  // a warp for each token
        float sum = 0;
#pragma unroll 4
        for (int64_t k = lane * 8; k < m.columns; k += kWarp * 8) {
            float v[8];
            load8(from + warp * m.columns + k, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) scales[warp] = rsqrtf(sum / static_cast<float>(m.columns) + eps);
    }

    float total[4] = {};
    for (int first = 0; first < runs; first += span) {
        const int end = runs - first < span ? runs : first + span;
        if (first > 0) fetch(first + split, end);
        __syncthreads();  // the scales are there, and what was staged before has been read
        const int here = (end - first) * kRunUnits;
#pragma unroll 1
        for (int item = threadIdx.x; item < here * count; item += kMmaThreads) {
            const int i = item / here, u = item % here, column = first * kRunColumns + u * 8;
            float v[8] = {};
            if (column < m.columns) {
                load8(from + i * m.columns + column, v);
                if (norm) {
                    float weight[8];
                    load8(norm + column, weight);
                    const float scale = scales[i];
#pragma unroll
                    for (int j = 0; j < 8; ++j) v[j] *= scale * (1.0f + weight[j]);
                }
            }
            stage_unit<F>(units, i, u, pitch, count, norm != nullptr, v);
        }
        __syncthreads();
        for (int run = first + split; run < end; run += Run<F>::kBatch * splits) {
            if (run != first + split) fetch(run, end);
#pragma unroll
            for (int b = 0; b < Run<F>::kBatch; ++b) {
                const int at = run + b * splits;
                if (at >= end) break;
                run_product(ahead[b], units, (at - first) * kRunUnits, pitch, count, norm != nullptr, total);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) partial[(warp * kMmaTokens + 2 * t + e % 2) * kPartialPitch + g + e / 2 * 8] = total[e];
    __syncthreads();
    const int rows = static_cast<int>(rows_of_tile), here = tiles * rows;
#pragma unroll 1
    for (int token = 0; token < count; ++token)
#pragma unroll 1
        for (int i = threadIdx.x; i < here; i += kMmaThreads) {
            const int tile = i / rows, r = i % rows;
            const int64_t n = (block * tiles + tile) * rows + r;
            if (n >= outputs) continue;
            float sum[2] = {0, 0};
#pragma unroll 1
            for (int w = 0; w < splits; ++w) {
                const int at = ((tile * splits + w) * kMmaTokens + token) * kPartialPitch + r;
                sum[0] += partial[at];
                if (glu) sum[1] += partial[at + kMmaRows / 2];
            }
            write(t0 + token, n, glu ? silu(sum[0]) * sum[1] : sum[0]);
        }
}

}  // namespace cuda
}  // namespace deltaic
