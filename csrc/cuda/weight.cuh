// Packed matrices on the GPU, and how a lane reads eight columns of a row.
//
// A part is a matrix [rows, columns] (or `count` of them, one after another) in one format, rows contiguous, columns
// padded with zeros to `stride` (a multiple of 8; of 128 for int8 and int4):
//   f32, bf16  q: the numbers, so that cuBLAS can read them too
//   int8       q [rows][stride] uint8 (value + 128); d [rows][stride / 128] half.  w = d * value
//   int4       q [rows][stride / 8] 32-bit words: byte j holds column j in its low and column 4 + j in its high nibble
//   (value + 8);
//              s [rows][stride / 32] uint8: two 4-bit scales - 1 for columns 32i..+16 (low) and the next 16 (high);
//              d [rows][stride / 128] half.  w = d * s * value
// int8 and int4 hold the same numbers as the CPU's blocks of 16 rows (core/view.h): the four bytes of a row in a line
// there are a word here.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/weight.h"

namespace deltaic {
namespace cuda {

// Column k of row n.
__device__ __forceinline__ float element(const Matrix& m, int64_t n, int64_t k) {
    switch (static_cast<Format>(m.format)) {
        case Format::f32:
            return reinterpret_cast<const float*>(m.q)[n * m.stride + k];
        case Format::bf16:
            return to_float(reinterpret_cast<const bf16*>(m.q)[n * m.stride + k]);
        case Format::int8:
            return half_to_float(m.d[n * (m.stride / 128) + k / 128]) * static_cast<float>(m.q[n * m.stride + k] - 128);
        default: {
            const int byte = m.q[n * (m.stride / 2) + k / 8 * 4 + k % 4], scales = m.s[n * (m.stride / 32) + k / 32];
            const int value = (k / 4 % 2 ? byte >> 4 : byte & 15) - 8,
                      scale = (k / 16 % 2 ? scales >> 4 : scales & 15) + 1;
            return half_to_float(m.d[n * (m.stride / 128) + k / 128]) * static_cast<float>(value * scale);
        }
    }
}

// Byte i of x as the float 2^23 + byte: one instruction, and the caller subtracts the offset.
__device__ __forceinline__ float biased_byte(uint32_t x, int i) {
#if defined(__CUDACC__)
    return __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7650u | static_cast<uint32_t>(i)));
#else
    return __uint_as_float(0x4b000000u | (x >> (8 * i) & 0xffu));
#endif
}

// Columns 8*chunk .. 8*chunk+7 of one row as loaded, so that several loads can be under way before the first is used.
template <Format F>
struct Chunk;

template <>
struct Chunk<Format::f32> {
    float4 a = {}, b = {};
    __device__ __forceinline__ void load(const Matrix& m, int64_t row, int64_t chunk) {
        const float* p = reinterpret_cast<const float*>(m.q) + row * m.stride + chunk * 8;
        a = load_as<float4>(p), b = load_as<float4>(p + 4);
    }
    __device__ __forceinline__ float decode(float (&w)[8]) const {
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
        return 1.0f;
    }
};

template <>
struct Chunk<Format::bf16> {
    uint4 v = {};
    __device__ __forceinline__ void load(const Matrix& m, int64_t row, int64_t chunk) {
        v = load_as<uint4>(reinterpret_cast<const bf16*>(m.q) + row * m.stride + chunk * 8);
    }
    __device__ __forceinline__ float decode(float (&w)[8]) const {
        unpack8(v, w);
        return 1.0f;
    }
};

template <>
struct Chunk<Format::int8> {
    uint2 v = {};
    uint16_t d = 0;
    __device__ __forceinline__ void load(const Matrix& m, int64_t row, int64_t chunk) {
        v = load_as<uint2>(m.q + row * m.stride + chunk * 8);
        d = m.d[row * (m.stride / 128) + chunk / 16];
    }
    __device__ __forceinline__ float decode(float (&w)[8]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[i] = biased_byte(v.x, i) - 8388736.0f, w[4 + i] = biased_byte(v.y, i) - 8388736.0f;
        return half_to_float(d);
    }
};

template <>
struct Chunk<Format::int4> {
    uint32_t v = 0;
    uint16_t d = 0;
    uint8_t s = 0;
    __device__ __forceinline__ void load(const Matrix& m, int64_t row, int64_t chunk) {
        v = load_as<uint32_t>(m.q + row * (m.stride / 2) + chunk * 4);
        s = static_cast<uint8_t>(m.s[row * (m.stride / 32) + chunk / 4] >> (chunk / 2 % 2 * 4) & 15);
        d = m.d[row * (m.stride / 128) + chunk / 16];
    }
    __device__ __forceinline__ float decode(float (&w)[8]) const {
        const uint32_t low = v & 0x0f0f0f0fu, high = v >> 4 & 0x0f0f0f0fu;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[i] = biased_byte(low, i) - 8388616.0f, w[4 + i] = biased_byte(high, i) - 8388616.0f;
        return half_to_float(d) * static_cast<float>(s + 1);
    }
};

// The eight columns as four registers of two bfloat16 each (a tensor-core operand), zero where `valid` is false.
template <Format F>
__device__ __forceinline__ void load_bf16(const Matrix& m, int64_t row, int64_t chunk, bool valid, uint32_t (&r)[4]) {
    Chunk<F> c;
    if (valid) c.load(m, row, chunk);
    if constexpr (F == Format::bf16) {
        r[0] = c.v.x, r[1] = c.v.y, r[2] = c.v.z, r[3] = c.v.w;
    } else {
        float w[8];
        const float scale = c.decode(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = valid ? pack_bf16(scale * w[2 * i], scale * w[2 * i + 1]) : 0u;
    }
}

// Calls `function` with the format as a constant.
template <class F>
__device__ __forceinline__ void with_format(int64_t format, F function) {
    switch (static_cast<Format>(format)) {
        case Format::f32:
            return function(std::integral_constant<Format, Format::f32>{});
        case Format::bf16:
            return function(std::integral_constant<Format, Format::bf16>{});
        case Format::int8:
            return function(std::integral_constant<Format, Format::int8>{});
        default:
            return function(std::integral_constant<Format, Format::int4>{});
    }
}

// --- vectors in shared memory
// ---------------------------------------------------------------------------------------------------- Element k of a
// staged vector of `stride` floats lies at staged(k, stride): the first and the last four of every eight columns are
// kept apart, so that 16-byte reads of neighbouring lanes fall into different banks.

__device__ __forceinline__ int64_t staged(int64_t k, int64_t stride) {
    return k / 4 % 2 * (stride / 2) + k / 8 * 4 + k % 4;
}

// What a block stages at once: whole rows of x, or as many columns as leave room for several blocks on a
// multiprocessor. A multiple of what the lanes of a warp_dot read in one turn, so that the order of additions does not
// depend on it.
constexpr int64_t kStagedFloats = 8192;

__host__ __device__ inline int64_t staged_columns(int64_t stride, int rows) {
    const int64_t most = kStagedFloats / rows;
    return stride < most ? stride : most;
}

inline size_t staged_bytes(int64_t stride, int rows) {
    return static_cast<size_t>(rows * staged_columns(stride, rows)) * sizeof(float);
}

// Columns first .. first+span of NT rows of x to shared memory, times scale[t] * (1 + norm) where `norm` is given;
// zeros past the last column and token.
template <int NT, class T>
__device__ __forceinline__ void stage_rows(const T* x, const float* norm, const float (&scale)[NT], int64_t t0,
                                           int64_t tokens, int64_t columns, int64_t first, int64_t span,
                                           Shared<float> h) {
    for (int t = 0; t < NT; ++t) {
        const T* row = x + (t0 + t) * columns + first;
        for (int64_t k = threadIdx.x; k < span; k += blockDim.x) {
            float v = first + k < columns && t0 + t < tokens ? to_float(row[k]) : 0.0f;
            if (norm && first + k < columns) v *= scale[t] * (1.0f + norm[first + k]);
            h[t * span + staged(k, span)] = v;
        }
    }
    __syncthreads();
}

// sum[r][t] += this lane's share of W[row r] . h[t] over the staged columns first .. first+span; the order of additions
// is the same for every NT.
template <Format F, int NT>
__device__ __forceinline__ void warp_dot(const Matrix& m, const int64_t (&row)[2], const bool (&valid)[2],
                                         Shared<float> h, int64_t first, int64_t span, float (&sum)[2][NT]) {
    constexpr int kAhead = NT == 4 ? 2 : 4;  // loads under way; with four, ptxas spills at NT = 4
    const int lane = threadIdx.x % kWarp;
    const int64_t skipped = first / 8, chunks = span / 8;
    for (int64_t c0 = lane; c0 < chunks; c0 += kWarp * kAhead) {
        Chunk<F> chunk[kAhead][2];
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (valid[r] && c0 + u * kWarp < chunks) chunk[u][r].load(m, row[r], skipped + c0 + u * kWarp);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int64_t c = c0 + u * kWarp;
            if (c >= chunks) break;
            float w[2][8], scale[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) scale[r] = chunk[u][r].decode(w[r]);
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                const float4 a = load_as<float4>(shared_read(h, t * span + c * 4, 4));
                const float4 b = load_as<float4>(shared_read(h, t * span + span / 2 + c * 4, 4));
                const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float part = w[r][0] * v[0];
#pragma unroll
                    for (int j = 1; j < 8; ++j) part = fmaf(w[r][j], v[j], part);
                    sum[r][t] = fmaf(scale[r], part, sum[r][t]);
                }
            }
        }
    }
}

// sum[r][t] = W[row r] . x[t0 + t], x normed where `norm` is given; in every lane of the warp whose rows they are. All
// threads of the block call it; rows that are not valid give 0. `h` has staged_bytes; `scratch` 32 floats.
template <int NT, class T>
__device__ __forceinline__ void block_dot(const T* x, const float* norm, float eps, int64_t t0, int64_t tokens,
                                          const Matrix& m, const int64_t (&row)[2], const bool (&valid)[2],
                                          Shared<float> h, Shared<float> scratch, float (&sum)[2][NT]) {
    float scale[NT];
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        scale[t] = 1.0f, sum[0][t] = 0, sum[1][t] = 0;
        if (!norm || t0 + t >= tokens) continue;
        const T* from = x + (t0 + t) * m.columns;
        float squares = 0;
        for (int64_t k = threadIdx.x; k < m.columns; k += blockDim.x) {
            const float v = to_float(from[k]);
            squares += v * v;
        }
        scale[t] = rsqrtf(block_sum(squares, scratch) / static_cast<float>(m.columns) + eps);
    }
    const int64_t most = staged_columns(m.stride, NT);
    for (int64_t first = 0; first < m.stride; first += most) {
        const int64_t span = m.stride - first < most ? m.stride - first : most;
        __syncthreads();  // what was staged before has been read
        stage_rows<NT>(x, norm, scale, t0, tokens, m.columns, first, span, h);
        with_format(m.format,
                    [&](auto format) { warp_dot<decltype(format)::value, NT>(m, row, valid, h, first, span, sum); });
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int t = 0; t < NT; ++t) sum[r][t] = warp_sum(valid[r] ? sum[r][t] : 0.0f);
}

}  // namespace cuda
}  // namespace deltaic
