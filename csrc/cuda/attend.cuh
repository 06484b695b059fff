// Softmax attention of 16 rows with a run of keys by one warp on tensor cores, all operands in registers.
//
// A row is any (token, query head) pair that reads the key-value head at hand: in decoding the heads of one group, in a
// prompt consecutive tokens times heads. The products are mma_bf16 on tiles of 16 rows x 16 keys. Which columns a
// register stands for is chosen so that every load is 16 bytes of one K or V row:
//   q k^T   step s (32 columns), lane (g, t): the eight columns 32 s + 8 t ..+7 of row g, the same of key g
//   p v     group s (64 columns), lane (g, t): the eight columns 64 s + 8 g ..+7 of keys 2t, 2t+1, 2t+8, 2t+9; product
//   j takes
//           column 8 g + j of them, so c[8 s + j] of lane (g, t) holds columns 64 s + 16 t + j and 64 s + 16 t + 8 + j
#pragma once

#include "cuda/common.cuh"

namespace deltaic {
namespace cuda {

__device__ __forceinline__ uint4 zero_or_load(const bf16* row, int chunk, bool valid) {
    return valid ? load_as<uint4>(row + chunk * 8) : uint4{0, 0, 0, 0};
}

__device__ __forceinline__ uint32_t lane_register(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// D: padded head width, 64, 128 or 256; `chunks` = real width / 8. HALF: only rows 0..7 exist, which halves the
// registers. Where the registers do not suffice for both, q is read again for every 16 keys.
template <int D, bool HALF>
struct Attend {
    static constexpr bool kHoldQ = D < 256;
    static constexpr int kUnroll = kHoldQ ? D / 32 : HALF ? 4 : 2;  // more at once, and ptxas runs out of registers
    static constexpr int kSteps = kHoldQ ? D / 32 : 1, kRows = HALF ? 1 : 2;
    uint32_t q[kSteps][4 * kRows];  // per step: four registers of row g, four of row g + 8
    float o[D / 8][2 * kRows];
    float largest[2], total[2];  // of rows g and g + 8
    const bf16* source[2];

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2 * kRows; ++e) o[i][e] = 0;
        largest[0] = largest[1] = kNegativeInfinity, total[0] = total[1] = 0;
    }

    __device__ __forceinline__ void load_step(int s, int held, int chunks) {
        const int chunk = s * 4 + threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint4 v = zero_or_load(source[r], chunk, source[r] && chunk < chunks);
            q[held][4 * r] = v.x, q[held][4 * r + 1] = v.y, q[held][4 * r + 2] = v.z, q[held][4 * r + 3] = v.w;
        }
    }

    // Rows g and g + 8 of q (bfloat16, already scaled by 1 / sqrt(width)); a null row is zero.
    __device__ __forceinline__ void load_q(const bf16* top, const bf16* bottom, int chunks) {
        source[0] = top, source[1] = bottom;
        if constexpr (kHoldQ)
#pragma unroll
            for (int s = 0; s < kSteps; ++s) load_step(s, s, chunks);
    }

    // c += a b, of which only the upper rows are kept with HALF.
    __device__ __forceinline__ void multiply(float (&c)[2 * kRows], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        if constexpr (HALF) {
            float whole[4] = {c[0], c[1], 0, 0};
            mma_bf16(whole, a, b);
            c[0] = whole[0], c[1] = whole[1];
        } else {
            mma_bf16(c, a, b);
        }
    }

    // Keys first .. first+15 of which those below `end` exist; row g sees keys below see[0], row g + 8 below see[1].
    // key(i) and value(i) give the rows of key i.
    template <class Rows>
    __device__ __forceinline__ void step(const Rows& rows, int64_t first, int64_t end, const int64_t (&see)[2],
                                         int chunks) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
        float p[2][4] = {};
        const bf16* key[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            key[half] = first + half * 8 + g < end ? rows.key(first + half * 8 + g) : nullptr;
#pragma unroll kUnroll
        for (int s = 0; s < D / 32; ++s) {
            const int held = kHoldQ ? s : 0;
            if constexpr (!kHoldQ) load_step(s, 0, chunks);
            const uint32_t (&h)[4 * kRows] = q[held];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 k = zero_or_load(key[half], s * 4 + t, key[half] && s * 4 + t < chunks);
                mma_bf16(p[half], {h[0], HALF ? 0u : h[4 % (4 * kRows)], h[1], HALF ? 0u : h[5 % (4 * kRows)]},
                         {k.x, k.y});
                mma_bf16(p[half], {h[2], HALF ? 0u : h[6 % (4 * kRows)], h[3], HALF ? 0u : h[7 % (4 * kRows)]},
                         {k.z, k.w});
            }
        }
        float peak[2] = {largest[0], largest[1]};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64_t i = first + half * 8 + 2 * t + e % 2;
                if (i >= see[e / 2]) p[half][e] = kNegativeInfinity;
                peak[e / 2] = fmaxf(peak[e / 2], p[half][e]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 1));
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 2));
        }
        const float shrink[2] = {expf(largest[0] - peak[0]), expf(largest[1] - peak[1])};
#pragma unroll
        for (int r = 0; r < 2; ++r) largest[r] = peak[r], total[r] *= shrink[r];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64_t i = first + half * 8 + 2 * t + e % 2;
                p[half][e] = i < see[e / 2] ? expf(p[half][e] - largest[e / 2]) : 0.0f;
                total[e / 2] += p[half][e];
            }
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2 * kRows; ++e) o[i][e] *= shrink[e / 2];

        const uint32_t a[4] = {pack_bf16(p[0][0], p[0][1]), HALF ? 0u : pack_bf16(p[0][2], p[0][3]),
                               pack_bf16(p[1][0], p[1][1]), HALF ? 0u : pack_bf16(p[1][2], p[1][3])};
        const bf16* value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t k = first + 2 * t + i % 2 + i / 2 * 8;
            value[i] = k < end ? rows.value(k) : nullptr;
        }
#pragma unroll
        for (int s = 0; s < D / 64; ++s) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = zero_or_load(value[i], s * 8 + g, value[i] && s * 8 + g < chunks);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const uint32_t x0 = lane_register(v[0], w), x1 = lane_register(v[1], w), x2 = lane_register(v[2], w),
                               x3 = lane_register(v[3], w);
                multiply(o[s * 8 + 2 * w], a, {(x0 & 0xffffu) | x1 << 16, (x2 & 0xffffu) | x3 << 16});
                multiply(o[s * 8 + 2 * w + 1], a, {x0 >> 16 | (x1 & 0xffff0000u), x2 >> 16 | (x3 & 0xffff0000u)});
            }
        }
    }

    // Makes `total` the sum over the row; to be called once after the last step.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
            total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
        }
    }

    // Calls f(row 0..15, column, value) for every element that this lane holds.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2 * kRows; ++e) f(g + e / 2 * 8, i / 8 * 64 + 16 * t + e % 2 * 8 + i % 8, o[i][e]);
    }
};

// Partial results of one row: [splits][D] weighted sums of values and [splits][2] (largest logit, total weight).
struct Partial {
    float* sums;
    float* stats;
    int64_t splits, D;
    __device__ __forceinline__ float* sum(int64_t row, int64_t split) const {
        return sums + (row * splits + split) * D;
    }
    __device__ __forceinline__ float* stat(int64_t row, int64_t split) const {
        return stats + (row * splits + split) * 2;
    }
};

constexpr int kRun = 64;  // keys of one turn: run r belongs to split r % splits

// Splits that have any of `keys` keys.
__device__ __forceinline__ int64_t active_splits(int64_t keys, int64_t splits) {
    const int64_t runs = (keys + kRun - 1) / kRun;
    return runs < splits ? runs : splits;
}

// One warp: `count` rows (at most 16) and one split of the keys 0..end. q(r) is the address of row r, see(r) the number
// of keys that it sees, id(r) its place in `out`.
template <int D, class Rows, class Q, class See, class Id>
__device__ __forceinline__ void attend_tile(const Rows& rows, int count, int64_t end, int64_t split, const Partial& out,
                                            Q q, See see, Id id) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, chunks = static_cast<int>(out.D / 8);
    Attend<D, false> attend;
    attend.start();
    attend.load_q(g < count ? q(g) : nullptr, g + 8 < count ? q(g + 8) : nullptr, chunks);
    const int64_t visible[2] = {g < count ? see(g) : 0, g + 8 < count ? see(g + 8) : 0};
    for (int64_t first = split * kRun; first < end; first += out.splits * kRun)
#pragma unroll 1
        for (int64_t k = first; k < first + kRun && k < end; k += 16) attend.step(rows, k, end, visible, chunks);
    attend.finish();
    attend.each([&](int r, int column, float v) {
        if (r < count && column < out.D) out.sum(id(r), split)[column] = v;
    });
    if (lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (g + 8 * r < count) {
                float* stat = out.stat(id(g + 8 * r), split);
                stat[0] = attend.largest[r], stat[1] = attend.total[r];
            }
}

constexpr int kJoined = kRun / 16;  // warps that share a split in attend_joined

// Floats of its shared memory: all that its warps have of eight rows. The two more per row keep lanes apart.
template <int D>
constexpr int kJoinedFloats = kJoined * 8 * (D + 2);

// The same by a block of kJoined warps for at most eight rows that see all keys: each warp takes 16 keys of a turn, and
// what they have is joined. `stats` has 2 * 8 * kJoined floats.
template <int D, class Rows, class Q, class Id>
__device__ __forceinline__ void attend_joined(const Rows& rows, int count, int64_t end, int64_t split,
                                              const Partial& out, Shared<float> sums, Shared<float> stats, Q q, Id id) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4,
              chunks = static_cast<int>(out.D / 8);
    Attend<D, true> attend;
    attend.start();
    attend.load_q(g < count ? q(g) : nullptr, nullptr, chunks);
    const int64_t visible[2] = {g < count ? end : 0, 0};
#pragma unroll 1
    for (int64_t k = split * kRun + warp * 16; k < end; k += out.splits * kRun)
        attend.step(rows, k, end, visible, chunks);
    attend.finish();
    attend.each([&](int r, int column, float v) { sums[(warp * 8 + r) * (D + 2) + column] = v; });
    if (lane % 4 == 0) stats[(warp * 8 + g) * 2] = attend.largest[0], stats[(warp * 8 + g) * 2 + 1] = attend.total[0];
    __syncthreads();
    const int width = static_cast<int>(out.D);
    for (int item = threadIdx.x; item < count * width; item += kJoined * kWarp) {
        const int r = item / width, column = item % width;
        float largest = kNegativeInfinity, sum = 0, total = 0;
#pragma unroll
        for (int w = 0; w < kJoined; ++w) largest = fmaxf(largest, stats[(w * 8 + r) * 2]);
#pragma unroll
        for (int w = 0; w < kJoined; ++w) {
            const float weight = expf(stats[(w * 8 + r) * 2] - largest);
            total = fmaf(weight, stats[(w * 8 + r) * 2 + 1], total);
            sum = fmaf(weight, sums[(w * 8 + r) * (D + 2) + column], sum);
        }
        out.sum(id(r), split)[column] = sum;
        if (column == 0) out.stat(id(r), split)[0] = largest, out.stat(id(r), split)[1] = total;
    }
}

// The same for one row without tensor cores: any element type, any width up to 256.
template <class KV, class Rows>
__device__ __forceinline__ void attend_row(const Rows& rows, const KV* q, int64_t see, int64_t split,
                                           const Partial& out, int64_t id) {
    const int lane = threadIdx.x % kWarp;
    float query[8], o[8], largest = kNegativeInfinity, total = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        query[j] = lane + j * kWarp < out.D ? to_float(q[lane + j * kWarp]) : 0.0f;
        o[j] = 0;
    }
    for (int64_t first = split * kRun; first < see; first += out.splits * kRun)
        for (int64_t k = first; k < first + kRun && k < see; ++k) {
            const KV* key = rows.key(k);
            const KV* value = rows.value(k);
            float dot = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (lane + j * kWarp < out.D) dot = fmaf(query[j], to_float(key[lane + j * kWarp]), dot);
            dot = warp_sum(dot);
            const float peak = fmaxf(largest, dot), shrink = expf(largest - peak), weight = expf(dot - peak);
            largest = peak;
            total = fmaf(total, shrink, weight);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (lane + j * kWarp < out.D) o[j] = fmaf(o[j], shrink, weight * to_float(value[lane + j * kWarp]));
        }
#pragma unroll
    for (int j = 0; j < 8; ++j)
        if (lane + j * kWarp < out.D) out.sum(id, split)[lane + j * kWarp] = o[j];
    if (lane == 0) out.stat(id, split)[0] = largest, out.stat(id, split)[1] = total;
}

}  // namespace cuda
}  // namespace deltaic
