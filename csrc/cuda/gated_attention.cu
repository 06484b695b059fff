// gated_attention: q/k norm, rope, K/V append, causal attention on paged K/V, output gate, for ragged sequences.
//
// `prepare` norms and rotates, stores K and V, and writes q scaled by 1/sqrt(D). `attend` computes partial results: the
// keys of a sequence are dealt to `splits` blocks in runs of 64; `combine` joins the partial results of a row and
// applies the gate. The split of the keys depends on nothing but their index, so a row gets the same bits whoever
// shares its batch.
#include "cuda/attend.cuh"
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace deltaic {
namespace cuda {
namespace {

struct Shape {
    int64_t Hq, Hkv, D, half;  // half: rotary pairs
    __host__ __device__ int64_t row() const { return 2 * (Hq + Hkv) * D; }
};

// K/V blocks [layers][2][Hkv][tokens][D]; `blocks` holds B rows of `pitch` addresses, in device memory.
template <class KV>
struct Cache {
    const int64_t* blocks;
    int64_t pitch, layer, Hkv, tokens, D;
    __device__ __forceinline__ KV* row(int64_t b, int64_t which, int64_t head, int64_t i) const {
        // 32 bits: a card divides 64 by a subroutine.
        const uint32_t block = static_cast<uint32_t>(i) / static_cast<uint32_t>(tokens),
                       inside = static_cast<uint32_t>(i) % static_cast<uint32_t>(tokens);
        return reinterpret_cast<KV*>(blocks[b * pitch + block]) +
               (((layer * 2 + which) * Hkv + head) * tokens + inside) * D;
    }
};

template <class KV>
struct CacheRows {
    Cache<KV> cache;
    int64_t b, head;
    __device__ __forceinline__ const KV* key(int64_t i) const { return cache.row(b, 0, head, i); }
    __device__ __forceinline__ const KV* value(int64_t i) const { return cache.row(b, 1, head, i); }
};

__device__ __forceinline__ int64_t sequence_of(const int64_t* cu_seqlens, int64_t t) {
    int64_t b = 0;
    while (t >= cu_seqlens[b + 1]) ++b;
    return b;
}

// One warp per token and head; heads 0..Hq-1 are queries, then Hkv keys (with their values).
template <class T, class KV>
__global__ void prepare_kernel(const T* proj, const float* q_norm, const float* k_norm, const float* cosine,
                               const float* sine, float eps, Shape s, const int64_t* cu_seqlens, const int64_t* starts,
                               Cache<KV> cache, KV* q, int64_t tokens) {
    grid_begin();
    const int lane = threadIdx.x % kWarp;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp,
                  heads = s.Hq + s.Hkv;
    if (item >= tokens * heads) return;
    const int64_t t = item / heads, h = item % heads;
    const bool is_query = h < s.Hq;
    const T* x = proj + t * s.row() + (is_query ? h * 2 * s.D : s.Hq * 2 * s.D + (h - s.Hq) * s.D);
    const float* norm = is_query ? q_norm : k_norm;
    float sum = 0;
    for (int64_t i = lane; i < s.D; i += kWarp) {
        const float v = to_float(x[i]);
        sum += v * v;
    }
    const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(s.D) + eps);
    const int64_t b = sequence_of(cu_seqlens, t), index = starts[b] + t - cu_seqlens[b];
    KV* out = is_query ? q + (t * s.Hq + h) * s.D : cache.row(b, 0, h - s.Hq, index);
    const float last = is_query ? rsqrtf(static_cast<float>(s.D)) : 1.0f;
    const auto normed = [&](int64_t i) { return (1.0f + norm[i]) * to_float(x[i]) * scale; };
    for (int64_t i = lane; i < s.D; i += kWarp) {
        float v = normed(i);
        if (i < 2 * s.half) {
            const int64_t f = i % s.half;
            const float c = cosine[t * s.half + f], n = sine[t * s.half + f];
            v = i < s.half ? v * c - normed(i + s.half) * n : v * c + normed(i - s.half) * n;
        }
        out[i] = from_float<KV>(v * last);
    }
    if (is_query) return;
    const T* v = x + s.Hkv * s.D;
    KV* stored = cache.row(b, 1, h - s.Hq, index);
    for (int64_t i = lane; i < s.D; i += kWarp) stored[i] = from_float<KV>(to_float(v[i]));
}

// Tensor-core form, bfloat16 K/V. Block (token, key head, split): rows are the query heads of the group, at most eight.
template <int D>
__global__ void __launch_bounds__(kJoined* kWarp)
    attend_token_kernel(const bf16* q, Shape s, const int64_t* cu_seqlens, const int64_t* starts, Cache<bf16> cache,
                        Partial out) {
    grid_begin();
    DELTAIC_SHARED(float, sums, kJoinedFloats<D>);
    DELTAIC_SHARED(float, stats, 2 * 8 * kJoined);
    const int64_t t = blockIdx.x, head = blockIdx.y, split = blockIdx.z, group = s.Hq / s.Hkv;
    const int64_t b = sequence_of(cu_seqlens, t), end = starts[b] + t - cu_seqlens[b] + 1;
    if (split * kRun >= end) return;  // `combine` does not read it
    const auto id = [&](int r) { return t * s.Hq + head * group + r; };
    attend_joined<D>(
        CacheRows<bf16>{cache, b, head}, static_cast<int>(group), end, split, out, sums, stats,
        [&](int r) { return q + id(r) * s.D; }, id);
}

// The same for many tokens: 4 warps that read the same keys, each with 16 rows of (token, head) of a sequence.
template <int D>
__global__ void __launch_bounds__(128) attend_kernel(const bf16* q, Shape s, const int64_t* cu_seqlens,
                                                     const int64_t* starts, Cache<bf16> cache, Partial out) {
    grid_begin();
    const int64_t group = s.Hq / s.Hkv, head = blockIdx.y, b = blockIdx.z / out.splits, split = blockIdx.z % out.splits;
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarp) * 16;
    const int64_t left = (cu_seqlens[b + 1] - cu_seqlens[b]) * group - first_row;
    const int count = static_cast<int>(left < 16 ? left : 16);
    if (count <= 0) return;
    const int64_t begin = cu_seqlens[b], start = starts[b];
    const auto token = [&](int r) { return (first_row + r) / group; };
    const auto id = [&](int r) { return (begin + token(r)) * s.Hq + head * group + (first_row + r) % group; };
    const auto see = [&](int r) { return start + token(r) + 1; };
    const int64_t end = see(count - 1);
    if (split * kRun >= end) return;
    attend_tile<D>(
        CacheRows<bf16>{cache, b, head}, count, end, split, out, [&](int r) { return q + id(r) * s.D; }, see, id);
}

// One warp per row and split.
template <class KV>
__global__ void attend_row_kernel(const KV* q, Shape s, const int64_t* cu_seqlens, const int64_t* starts,
                                  Cache<KV> cache, Partial out) {
    grid_begin();
    const int64_t t = blockIdx.x, h = blockIdx.y, split = static_cast<int64_t>(blockIdx.z) * 4 + threadIdx.x / kWarp;
    const int64_t b = sequence_of(cu_seqlens, t), see = starts[b] + t - cu_seqlens[b] + 1, row = t * s.Hq + h;
    if (split >= out.splits || split * kRun >= see) return;
    attend_row(CacheRows<KV>{cache, b, h / (s.Hq / s.Hkv)}, q + row * s.D, see, split, out, row);
}

// Block (token, head, columns): `groups` of threads take the splits of a row by turns of 32, a thread has one column.
constexpr int kCombineThreads = 256;

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(Partial partial, const T* proj, Shape s, const int64_t* cu_seqlens, const int64_t* starts,
                   int groups, T* y) {
    grid_begin();
    DELTAIC_SHARED(float, parts, kCombineThreads);
    const int lane = threadIdx.x % kWarp, columns = kCombineThreads / groups, group = threadIdx.x / columns;
    const int64_t t = blockIdx.x, h = blockIdx.y, row = t * s.Hq + h, b = sequence_of(cu_seqlens, t);
    const int64_t i = static_cast<int64_t>(blockIdx.z) * columns + threadIdx.x % columns, column = i < s.D ? i : 0;
    const int active = static_cast<int>(active_splits(starts[b] + t - cu_seqlens[b] + 1, partial.splits));
    float largest = kNegativeInfinity;
    for (int split = lane; split < active; split += kWarp) largest = fmaxf(largest, partial.stat(row, split)[0]);
    largest = warp_max(largest);
    float sum = 0, total = 0;
    for (int first = 0; first < active; first += kWarp) {
        float weight = 0;
        if (first + lane < active) {
            const float* stat = partial.stat(row, first + lane);
            weight = expf(stat[0] - largest);
            total = fmaf(weight, stat[1], total);
        }
        if (first / kWarp % groups != group) continue;
        const float* from = partial.sum(row, first) + column;
        const int here = active - first < kWarp ? active - first : kWarp;
#pragma unroll 8
        for (int j = 0; j < here; ++j) sum = fmaf(__shfl_sync(kAllLanes, weight, j), from[j * s.D], sum);
    }
    total = warp_sum(total);
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0 || i >= s.D) return;
    for (int other = 1; other < groups; ++other) sum += parts[other * columns + threadIdx.x];
    const float gate = to_float(proj[t * s.row() + (2 * h + 1) * s.D + i]);
    y[row * s.D + i] = from_float<T>((total > 0 ? sum / total : 0.0f) * sigmoid(gate));
}

template <int D>
void launch_attend(const bf16* q, Shape s, const int64_t* cu_seqlens, const int64_t* starts, Cache<bf16> cache,
                   Partial partial, int64_t tokens, int64_t B, int64_t longest, bool per_token, Stream stream) {
    const unsigned heads = static_cast<unsigned>(s.Hkv);
    if (per_token) {
        launch("gated_attention attend", attend_token_kernel<D>,
               dim3(static_cast<unsigned>(tokens), heads, static_cast<unsigned>(partial.splits)), kJoined * kWarp, 0,
               stream, q, s, cu_seqlens, starts, cache, partial);
    } else {
        launch("gated_attention attend", attend_kernel<D>,
               dim3(blocks_for(longest * (s.Hq / s.Hkv), 64), heads, static_cast<unsigned>(B * partial.splits)), 128, 0,
               stream, q, s, cu_seqlens, starts, cache, partial);
    }
}

template <class T, class KV>
void run(const T* proj, const float* q_norm, const float* k_norm, const float* cosine, const float* sine, float eps,
         Shape s, const int64_t* cu_seqlens, const int64_t* starts, Cache<KV> cache, KV* q, Partial partial, T* y,
         int64_t tokens, int64_t B, int64_t longest, bool per_token, Stream stream) {
    launch("gated_attention prepare", prepare_kernel<T, KV>, blocks_for(tokens * (s.Hq + s.Hkv), 4), 128, 0, stream,
           proj, q_norm, k_norm, cosine, sine, eps, s, cu_seqlens, starts, cache, q, tokens);
    bool done = false;
    if constexpr (std::is_same_v<KV, bf16>) {
        done = s.D % 8 == 0 && (!per_token || s.Hq / s.Hkv <= 8);
        if (done && s.D <= 64)
            launch_attend<64>(q, s, cu_seqlens, starts, cache, partial, tokens, B, longest, per_token, stream);
        else if (done && s.D <= 128)
            launch_attend<128>(q, s, cu_seqlens, starts, cache, partial, tokens, B, longest, per_token, stream);
        else if (done)
            launch_attend<256>(q, s, cu_seqlens, starts, cache, partial, tokens, B, longest, per_token, stream);
    }
    if (!done)
        launch("gated_attention attend_row", attend_row_kernel<KV>,
               dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(s.Hq), blocks_for(partial.splits, 4)), 128, 0,
               stream, static_cast<const KV*>(q), s, cu_seqlens, starts, cache, partial);
    const int groups = per_token ? 4 : 1;  // many splits and few blocks, or few splits and many blocks
    launch("gated_attention combine", combine_kernel<T>,
           dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(s.Hq), blocks_for(s.D * groups, kCombineThreads)),
           kCombineThreads, 0, stream, partial, proj, s, cu_seqlens, starts, groups, y);
}

}  // namespace

void gated_attention(const void* proj, const float* q_norm, const float* k_norm, const float* cosine, const float* sine,
                     float eps, int64_t Hq, int64_t Hkv, int64_t D, int64_t half, const int64_t* cu_seqlens,
                     const int64_t* starts, const int64_t* blocks, int64_t pitch, int64_t layer, int64_t block_tokens,
                     void* q, float* sums, float* stats, int64_t splits, int64_t per_token, void* y, int64_t T,
                     int64_t B, int64_t longest, int64_t type, int64_t kv_type, Stream stream) {
    if (Hkv < 1 || Hq < 1 || Hq % Hkv || D < 1 || D > 256 || 2 * half > D || splits < 1 || splits > 1024 ||
        (per_token && splits % 4))
        fail("gated_attention", "expected query heads in multiples of key heads, and heads of 1 to 256 channels");
    if (T == 0 || B == 0) return;
    const Shape s{Hq, Hkv, D, half};
    const Partial partial{sums, stats, splits, D};
    with_type("gated_attention", type, [&](auto element) {
        using E = decltype(element);
        with_type("gated_attention", kv_type, [&](auto stored) {
            using KV = decltype(stored);
            run<E, KV>(static_cast<const E*>(proj), q_norm, k_norm, cosine, sine, eps, s, cu_seqlens, starts,
                       Cache<KV>{blocks, pitch, layer, Hkv, block_tokens, D}, static_cast<KV*>(q), partial,
                       static_cast<E*>(y), T, B, longest, per_token != 0, stream);
        });
    });
}

}  // namespace cuda
}  // namespace deltaic
