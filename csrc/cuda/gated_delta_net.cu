// gated_delta_net: convolution, gates, the delta rule and the gated norm of one layer, for ragged sequences.
//
// All forms start with `conv` (convolution and SiLU of the q, k, v channels, in float). Then
//   a few tokens    `recurrent`: a block owns 32 columns of one head's state, kept in registers over the tokens
//   many tokens     `chunk_prepare` for all chunks of 64 tokens in parallel, then `chunk_scan` over the chunks of a
//   sequence in order
// and `gated_norm`. The chunked form is reference.delta_rule_chunked: with T = (I + A)^-1,
//   W = T beta V - (T beta e^G K) S,   O = e^G Q S + P W,   S <- e^(G_last) S + (e^(G_last - G) K)^T W
// The products run on tensor cores with nearly float accuracy (mma_float); G, A, T and S are floats.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kTaps = 4;
constexpr int kColumns = 32;  // columns of the state that one block owns
constexpr int kMaxWidth = 128;
constexpr int kChunk = 64;

struct Shape {
    int64_t Hk, Hv, Dk, Dv, C;                                                // C = 2 Hk Dk + Hv Dv
    __host__ __device__ int64_t row() const { return C + Hv * Dv + 2 * Hv; }  // columns of proj
    // Columns of trace: u (C) | k (Hk Dk) | w (Hv Dv) | decay (Hv).
    __host__ __device__ int64_t trace() const { return C + Hk * Dk + Hv * Dv + Hv; }
};

// Addresses of one array per sequence, in device memory, so that a captured graph can serve any sequence; `offset`
// elements in.
struct Pointers {
    const int64_t* address;
    int64_t offset;
    __device__ __forceinline__ float* of(int64_t b) const { return reinterpret_cast<float*>(address[b]) + offset; }
    __device__ __forceinline__ float* one() const { return address ? of(0) : nullptr; }
};

// One thread per channel and up to kConvTile tokens of a sequence; the last three rows of u become the new state where
// one block has seen all tokens (`update`), otherwise conv_state_kernel does that afterwards. With a trace they do not.
constexpr int kConvTile = 16;

template <class T>
__global__ void conv_kernel(const T* proj, const float* weight, Pointers states, const int64_t* cu_seqlens, Shape s,
                            float* c, Pointers traces, int64_t update) {
    grid_begin();
    float* trace = traces.one();
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = blockIdx.z;
    const int64_t begin = cu_seqlens[b] + static_cast<int64_t>(blockIdx.y) * kConvTile, end = cu_seqlens[b + 1];
    if (channel >= s.C || begin >= end) return;
    float* state = states.of(b);
    float w[kTaps], past[kTaps - 1];
    for (int j = 0; j < kTaps; ++j) w[j] = weight[j * s.C + channel];
    for (int j = 0; j < kTaps - 1; ++j) {
        const int64_t t = begin - (kTaps - 1) + j;
        past[j] = t >= cu_seqlens[b] ? to_float(proj[t * s.row() + channel])
                                     : state[(t - cu_seqlens[b] + kTaps - 1) * s.C + channel];
    }
    const int64_t last = begin + kConvTile < end ? begin + kConvTile : end;
    for (int64_t t = begin; t < last; ++t) {
        const float u = to_float(proj[t * s.row() + channel]);
        if (trace) trace[t * s.trace() + channel] = u;
        c[t * s.C + channel] = silu(w[0] * past[0] + w[1] * past[1] + w[2] * past[2] + w[3] * u);
        past[0] = past[1], past[1] = past[2], past[2] = u;
    }
    if (update)
        for (int j = 0; j < kTaps - 1; ++j) state[j * s.C + channel] = past[j];
}

template <class T>
__global__ void conv_state_kernel(const T* proj, Pointers states, const int64_t* cu_seqlens, Shape s) {
    grid_begin();
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = blockIdx.y;
    const int64_t n = cu_seqlens[b + 1] - cu_seqlens[b];
    if (channel >= s.C) return;
    float* state = states.of(b);
    float rows[kTaps - 1];
    for (int j = 0; j < kTaps - 1; ++j) {
        const int64_t t = n - (kTaps - 1) + j;
        rows[j] =
            t >= 0 ? to_float(proj[(cu_seqlens[b] + t) * s.row() + channel]) : state[(t + kTaps - 1) * s.C + channel];
    }
    for (int j = 0; j < kTaps - 1; ++j) state[j * s.C + channel] = rows[j];
}

// beta and log_decay of value head h at token t.
template <class T>
__device__ __forceinline__ void gates(const T* proj, const float* A_log, const float* dt_bias, Shape s, int64_t t,
                                      int64_t h, float* beta, float* log_decay) {
    const T* row = proj + t * s.row() + s.C + s.Hv * s.Dv;
    *beta = sigmoid(to_float(row[h]));
    *log_decay = -expf(A_log[h]) * softplus(to_float(row[s.Hv + h]) + dt_bias[h]);
}

// 1 / sqrt(sum x^2 + 1e-6) of Dk numbers, by one warp.
__device__ __forceinline__ float l2_scale(const float* x, int64_t Dk) {
    float sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < Dk; i += kWarp) sum += x[i] * x[i];
    return rsqrtf(warp_sum(sum) + 1e-6f);
}

// Block (column group, head, sequence) of 4 warps; lane = column, warp w owns rows w, w+4, w+8... of Dk. ROWS = rows
// per thread. With a trace the state is not written, and the trace takes what commit_kernel needs to do it later.
template <class T, int ROWS>
__global__ void __launch_bounds__(128, 2)
    recurrent_kernel(const T* proj, const float* c, const float* A_log, const float* dt_bias, Pointers states,
                     const int64_t* cu_seqlens, Shape s, Pointers traces, float* o) {
    grid_begin();
    float* trace = traces.one();
    DELTAIC_SHARED(float, q, kMaxWidth);
    DELTAIC_SHARED(float, k, kMaxWidth);
    DELTAIC_SHARED(float, parts, 4 * 2 * kColumns);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane, h = blockIdx.y, b = blockIdx.z;
    const int64_t key_head = h / (s.Hv / s.Hk);
    const bool inside = column < s.Dv;
    float* state = states.of(b) + h * s.Dk * s.Dv + column;
    float S[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = warp + 4 * r;
        S[r] = inside && row < s.Dk ? state[row * s.Dv] : 0.0f;
    }
    for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
        const float* cq = c + t * s.C + key_head * s.Dk;
        const float* ck = cq + s.Hk * s.Dk;
        float* traced = trace ? trace + t * s.trace() + s.C : nullptr;
        // Loaded before the barriers, so that it is on its way together with q and k.
        float beta, log_decay;
        gates(proj, A_log, dt_bias, s, t, h, &beta, &log_decay);
        const float decay = expf(log_decay), v = inside ? c[t * s.C + 2 * s.Hk * s.Dk + h * s.Dv + column] : 0.0f;
        __syncthreads();  // the last token's q, k and parts have been read
        if (warp < 2) {
            const float* x = warp ? ck : cq;
            const float scale = l2_scale(x, s.Dk) * (warp ? 1.0f : rsqrtf(static_cast<float>(s.Dk)));
            for (int64_t i = lane; i < kMaxWidth; i += kWarp) {
                const float v = i < s.Dk ? x[i] * scale : 0.0f;
                if (warp)
                    k[i] = v;
                else
                    q[i] = v;
                if (warp && traced && i < s.Dk && blockIdx.x == 0 && h % (s.Hv / s.Hk) == 0)
                    traced[key_head * s.Dk + i] = v;
            }
        }
        __syncthreads();
        // One pass gives S^T k and S^T q of the decayed state; the output of the updated one is S^T q + (k . q) w.
        float Sk = 0, Sq = 0, kq = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float kr = k[warp + 4 * r], qr = q[warp + 4 * r];
            S[r] *= decay;
            Sk = fmaf(S[r], kr, Sk), Sq = fmaf(S[r], qr, Sq);
        }
        for (int64_t i = lane; i < s.Dk; i += kWarp) kq = fmaf(k[i], q[i], kq);
        kq = warp_sum(kq);
        parts[(warp * 2 + 0) * kColumns + lane] = Sk;
        parts[(warp * 2 + 1) * kColumns + lane] = Sq;
        __syncthreads();
        Sk = Sq = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w)
            Sk += parts[(w * 2 + 0) * kColumns + lane], Sq += parts[(w * 2 + 1) * kColumns + lane];
        const float error = beta * (v - Sk);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) S[r] = fmaf(k[warp + 4 * r], error, S[r]);
        if (warp == 0 && inside) o[(t * s.Hv + h) * s.Dv + column] = fmaf(kq, error, Sq);
        if (!traced) continue;
        if (warp == 1 && inside) traced[s.Hk * s.Dk + h * s.Dv + column] = error;
        if (threadIdx.x == 0 && blockIdx.x == 0) traced[s.Hk * s.Dk + s.Hv * s.Dv + h] = decay;
    }
    if (trace) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = warp + 4 * r;
        if (inside && row < s.Dk) state[row * s.Dv] = S[r];
    }
}

// S <- decay S + k w^T for the first counts[b] rows of each sequence, as recurrent_kernel does it. Block (column group,
// head, layer and sequence); warps and lanes as there.
template <int ROWS>
__global__ void __launch_bounds__(128) commit_kernel(Pointers traces, Pointers states, const int64_t* cu_seqlens,
                                                     const int64_t* counts, Shape s, int64_t layers, int64_t tokens) {
    grid_begin();
    const float* trace = traces.one();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane, h = blockIdx.y;
    const int64_t b = blockIdx.z / layers, layer = blockIdx.z % layers, n = counts[b];
    if (column >= s.Dv || n == 0) return;
    float* state = states.of(b) + (layer * s.Hv + h) * s.Dk * s.Dv + column;
    float S[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) S[r] = warp + 4 * r < s.Dk ? state[(warp + 4 * r) * s.Dv] : 0.0f;
    for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b] + n; ++t) {
        const float* traced = trace + (layer * tokens + t) * s.trace() + s.C;
        const float* k = traced + h / (s.Hv / s.Hk) * s.Dk;
        const float error = traced[s.Hk * s.Dk + h * s.Dv + column], decay = traced[s.Hk * s.Dk + s.Hv * s.Dv + h];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            S[r] *= decay;
            S[r] = fmaf(warp + 4 * r < s.Dk ? k[warp + 4 * r] : 0.0f, error, S[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        if (warp + 4 * r < s.Dk) state[(warp + 4 * r) * s.Dv] = S[r];
}

// The last three rows of (old rows, first counts[b] rows of u). Block (channels, layer, sequence).
__global__ void commit_conv_kernel(Pointers traces, Pointers states, const int64_t* cu_seqlens, const int64_t* counts,
                                   Shape s, int64_t tokens) {
    grid_begin();
    const float* trace = traces.one();
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, layer = blockIdx.y,
                  b = blockIdx.z, n = counts[b];
    if (channel >= s.C || n == 0) return;
    float* state = states.of(b) + layer * (kTaps - 1) * s.C + channel;
    float rows[kTaps - 1];
    for (int j = 0; j < kTaps - 1; ++j) {
        const int64_t t = n - (kTaps - 1) + j;
        rows[j] =
            t >= 0 ? trace[(layer * tokens + cu_seqlens[b] + t) * s.trace() + channel] : state[(t + kTaps - 1) * s.C];
    }
    for (int j = 0; j < kTaps - 1; ++j) state[j * s.C] = rows[j];
}

// y = norm * o / sqrt(mean o^2 + eps) * silu(z): one warp per token and head.
template <class T>
__global__ void gated_norm_kernel(const float* o, const T* proj, const float* norm, float eps, Shape s, T* y,
                                  int64_t heads) {
    grid_begin();
    const int lane = threadIdx.x % kWarp;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (i >= heads) return;
    const int64_t t = i / s.Hv, h = i % s.Hv;
    const float* row = o + i * s.Dv;
    const T* z = proj + t * s.row() + s.C + h * s.Dv;
    float sum = 0;
    for (int64_t j = lane; j < s.Dv; j += kWarp) sum += row[j] * row[j];
    const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(s.Dv) + eps);
    for (int64_t j = lane; j < s.Dv; j += kWarp)
        y[i * s.Dv + j] = from_float<T>(norm[j] * row[j] * scale * silu(to_float(z[j])));
}

// --- chunked form
// ------------------------------------------------------------------------------------------------------------------

// Padded matrices in shared memory: one more float per row keeps columns of neighbouring rows in different banks.
constexpr int kPitch = kMaxWidth + 4, kSquare = kChunk + 4;

// c[j] (16 x 8 tiles at rows r0, columns n0 + 8 j) += A B with A(i, k) = a(r0 + i, k), B(k, n) = b(k, n0 + n), k <
// depth (a multiple of 8); A is read once for all tiles.
constexpr int kTiles = 4;

template <class A, class B>
__device__ __forceinline__ void tile_products(float (&c)[kTiles][4], int depth, int r0, int n0, A a, B b) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    for (int k = 0; k < depth; k += 8) {
        const float fa[4] = {a(r0 + g, k + t), a(r0 + g + 8, k + t), a(r0 + g, k + t + 4), a(r0 + g + 8, k + t + 4)};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const float fb[2] = {b(k + t, n0 + j * 8 + g), b(k + t + 4, n0 + j * 8 + g)};
            mma_float(c[j], fa, fb);
        }
    }
}

// Matrices that are read as A lie in fragments, tile by tile of 16 x 8: the four numbers of lane (g, t) at rows g, g +
// 8 and columns 2t, 2t + 1 follow each other, as a product leaves them. The columns that a register of a product stands
// for are then 2t and 2t + 1, of A and of B.
__device__ __forceinline__ float* fragment(float* a, int steps, int row_tile, int step) {
    return a + ((row_tile * steps + step) * kWarp + threadIdx.x % kWarp) * 4;
}

// Tiles c[j] (16 x 8 at columns 8 j) += A B with the row of tiles `a` and B(k, n) = b(k, n), k < 8 * steps: A is read
// once for all of them.
template <int N, class B>
__device__ __forceinline__ void fragment_products(float (&c)[N][4], float* a, int steps, int row_tile, B b) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 4
    for (int s = 0; s < steps; ++s) {
        const float4 v = load_as<float4>(fragment(a, steps, row_tile, s));
        const float fa[4] = {v.x, v.z, v.y, v.w};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float fb[2] = {b(s * 8 + 2 * t, j * 8 + g), b(s * 8 + 2 * t + 1, j * 8 + g)};
            mma_float(c[j], fa, fb);
        }
    }
}

// What chunk_prepare hands to chunk_scan, per chunk and value head, in floats; rows past the end of the sequence and
// columns past Dk are zero. All but Wv are in fragments, K as its transpose.
struct ChunkBuffers {
    float* Wv;     // [64][Dv]    T beta V
    float* Wk;     // [64][wide]  T beta e^G K
    float* P;      // [64][64]    e^(G_i - G_j) (q_i . k_j), j <= i
    float* Q;      // [64][wide]  e^G Q
    float* K;      // [wide][64]  e^(G_last - G) K
    float* decay;  // [1]         e^(G_last)
    __host__ __device__ static int64_t wide(int64_t Dk) { return (Dk + 15) / 16 * 16; }
    __host__ __device__ static int64_t floats(int64_t Dk, int64_t Dv) {
        return kChunk * (Dv + 3 * wide(Dk) + kChunk) + 4;
    }
    __device__ ChunkBuffers(float* base, int64_t index, int64_t Dk, int64_t Dv) {
        Wv = base + index * floats(Dk, Dv);
        Wk = Wv + kChunk * Dv;
        P = Wk + kChunk * wide(Dk);
        Q = P + kChunk * kChunk;
        K = Q + kChunk * wide(Dk);
        decay = K + kChunk * wide(Dk);
    }
};

constexpr int kPrepareThreads = 128;
constexpr size_t kPrepareShared = sizeof(float) * (kChunk * kPitch + kChunk * kSquare + 5 * kChunk);
static_assert(kPrepareShared <= 64 * 1024, "a block of compute capability 7.5 cannot have more");

// Block (chunk of the sequence, head, sequence). A and T share one matrix: A strictly below the diagonal, T (whose
// diagonal is 1) transposed above it.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    chunk_prepare_kernel(const T* proj, const float* c, const float* A_log, const float* dt_bias,
                         const int64_t* cu_seqlens, Shape s, float* buffers, int64_t max_chunks) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    const int64_t h = blockIdx.y, b = blockIdx.z, chunk = blockIdx.x;
    const int64_t begin = cu_seqlens[b] + chunk * kChunk, end = cu_seqlens[b + 1];
    if (begin >= end) return;
    const int n = static_cast<int>(end - begin < kChunk ? end - begin : kChunk);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int Dk = static_cast<int>(s.Dk), Dv = static_cast<int>(s.Dv), depth = (Dk + 7) / 8 * 8,
              wide = static_cast<int>(ChunkBuffers::wide(Dk));
    const int64_t key_head = h / (s.Hv / s.Hk);
    constexpr size_t kMatrix = sizeof(float) * kChunk * kPitch, kVector = sizeof(float) * kChunk,
                     kVectors = kMatrix + sizeof(float) * kChunk * kSquare;
    const Shared<float> K = carve<float>(base, 0, kChunk * kPitch), A = carve<float>(base, kMatrix, kChunk * kSquare);
    const Shared<float> G = carve<float>(base, kVectors, kChunk), beta = carve<float>(base, kVectors + kVector, kChunk);
    const Shared<float> decay = carve<float>(base, kVectors + 2 * kVector, kChunk);
    const Shared<float> q_scale = carve<float>(base, kVectors + 3 * kVector, kChunk);
    const Shared<float> fading = carve<float>(base, kVectors + 4 * kVector, kChunk);  // e^(G_last - G)
    const ChunkBuffers out(buffers, (b * max_chunks + chunk) * s.Hv + h, s.Dk, s.Dv);
    const float* cq = c + begin * s.C + key_head * s.Dk;
    const float* ck = cq + s.Hk * s.Dk;

    for (int i = warp; i < kChunk; i += kPrepareThreads / kWarp) {
        const int64_t row = (i < n ? i : 0) * s.C;
        const float scale = l2_scale(cq + row, s.Dk) * rsqrtf(static_cast<float>(s.Dk)),
                    k_scale = l2_scale(ck + row, s.Dk);
        for (int j = lane; j < kMaxWidth; j += kWarp)
            K[i * kPitch + j] = i < n && j < Dk ? ck[row + j] * k_scale : 0.0f;
        if (lane == 0) {
            float gate = 0, log_decay = 0;
            if (i < n) gates(proj, A_log, dt_bias, s, begin + i, h, &gate, &log_decay);
            beta[i] = gate, G[i] = log_decay, q_scale[i] = scale;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int i = 0; i < kChunk; ++i) {
            sum += G[i];
            G[i] = sum;
        }
        *out.decay = expf(sum);
    }
    __syncthreads();
    if (threadIdx.x < kChunk) {
        const int i = threadIdx.x;
        decay[i] = expf(G[i]), fading[i] = expf(G[kChunk - 1] - G[i]);
    }

    // A (strictly lower) and P (lower): each warp computes 16 rows. The difference G_i - G_j is masked before the
    // exponential.
    const int g = lane / 4, t2 = lane % 4 * 2, r0 = warp * 16;
    const auto query = [&](int i, int k) -> float { return i < n && k < Dk ? cq[i * s.C + k] * q_scale[i] : 0.0f; };
    for (int n0 = 0; n0 < kChunk; n0 += 8 * kTiles) {
        float kk[kTiles][4] = {}, qk[kTiles][4] = {};
        if (n0 < r0 + 16) {
            const auto column = [&](int k, int j) -> float { return K[j * kPitch + k]; };
            tile_products(kk, depth, r0, n0, [&](int i, int k) -> float { return K[i * kPitch + k]; }, column);
            tile_products(qk, depth, r0, n0, query, column);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float (&p)[4] = qk[tile];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = r0 + g + e / 2 * 8, j = n0 + tile * 8 + t2 + e % 2;
                const float fall = j <= i ? expf(G[i] - G[j]) : 0.0f;
                if (j < i) A[i * kSquare + j] = beta[i] * fall * kk[tile][e];
                p[e] *= fall;
            }
            store_as(fragment(out.P, kChunk / 8, warp, n0 / 8 + tile), float4{p[0], p[1], p[2], p[3]});
        }
    }
    __syncthreads();

    // T = (I + A)^-1 by forward substitution, a thread per column: T_ij = [i = j] - sum_{j <= m < i} A_im T_mj.
    if (threadIdx.x < kChunk) {
        const int j = threadIdx.x;
        for (int i = j + 1; i < kChunk; ++i) {
            float v = -A[i * kSquare + j];
            for (int m = j + 1; m < i; ++m) v = fmaf(-A[i * kSquare + m], A[j * kSquare + m], v);
            A[j * kSquare + i] = v;
        }
    }
    __syncthreads();
    const auto inverse = [&](int i, int k) -> float { return k < i ? static_cast<float>(A[k * kSquare + i]) : k == i; };

    const auto q_at = [&](int i, int k) -> float { return decay[i] * query(i, k); };
    const auto k_at = [&](int k, int i) -> float { return fading[i] * K[i * kPitch + k]; };
    for (int step = 0; step < wide / 8; ++step) {
        const int i = r0 + g, k = step * 8 + t2;
        store_as(fragment(out.Q, wide / 8, warp, step),
                 float4{q_at(i, k), q_at(i, k + 1), q_at(i + 8, k), q_at(i + 8, k + 1)});
    }
    for (int tile = warp; tile < wide / 16; tile += kPrepareThreads / kWarp)
        for (int step = 0; step < kChunk / 8; ++step) {
            const int k = tile * 16 + g, i = step * 8 + t2;
            store_as(fragment(out.K, kChunk / 8, tile, step),
                     float4{k_at(k, i), k_at(k, i + 1), k_at(k + 8, i), k_at(k + 8, i + 1)});
        }
    for (int n0 = 0; n0 < wide; n0 += 8 * kTiles) {
        float w[kTiles][4] = {};
        tile_products(w, r0 + 16, r0, n0, inverse,
                      [&](int k, int j) -> float { return beta[k] * decay[k] * K[k * kPitch + j]; });
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            if (n0 + tile * 8 < wide)
                store_as(fragment(out.Wk, wide / 8, warp, n0 / 8 + tile),
                         float4{w[tile][0], w[tile][1], w[tile][2], w[tile][3]});
    }
    const float* v = c + begin * s.C + 2 * s.Hk * s.Dk + h * s.Dv;
    for (int n0 = 0; n0 < Dv; n0 += 8 * kTiles) {
        float w[kTiles][4] = {};
        tile_products(w, r0 + 16, r0, n0, inverse,
                      [&](int k, int j) -> float { return k < n && j < Dv ? beta[k] * v[k * s.C + j] : 0.0f; });
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = r0 + g + e / 2 * 8, j = n0 + tile * 8 + t2 + e % 2;
                if (j < Dv) out.Wv[i * s.Dv + j] = w[tile][e];
            }
    }
}

constexpr int kScanThreads = 128, kScanColumns = 16, kScanTiles = kScanColumns / 8, kStatePitch = kScanColumns + 4;

// Block (column group, head, sequence): 16 columns of the state stay in shared memory while the chunks pass.
__global__ void __launch_bounds__(kScanThreads)
    chunk_scan_kernel(float* buffers, Pointers states, const int64_t* cu_seqlens, Shape s, float* o,
                      int64_t max_chunks) {
    grid_begin();
    DELTAIC_SHARED(float, S, kMaxWidth* kStatePitch);
    DELTAIC_SHARED(float, W, kChunk* kStatePitch);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t2 = lane % 4 * 2;
    const int Dk = static_cast<int>(s.Dk), Dv = static_cast<int>(s.Dv),
              steps = static_cast<int>(ChunkBuffers::wide(Dk)) / 8;
    const int64_t h = blockIdx.y, b = blockIdx.z;
    const int first = static_cast<int>(blockIdx.x) * kScanColumns;
    float* state = states.of(b) + h * s.Dk * s.Dv;
    for (int i = threadIdx.x; i < kMaxWidth * kScanColumns; i += kScanThreads) {
        const int row = i / kScanColumns, column = first + i % kScanColumns;
        S[row * kStatePitch + i % kScanColumns] = row < Dk && column < Dv ? state[row * s.Dv + column] : 0.0f;
    }
    const int64_t begin = cu_seqlens[b], tokens = cu_seqlens[b + 1] - begin;
    const auto state_at = [&](int k, int j) -> float { return S[k * kStatePitch + j]; };
    for (int64_t chunk = 0; chunk * kChunk < tokens; ++chunk) {
        const ChunkBuffers in(buffers, (b * max_chunks + chunk) * s.Hv + h, s.Dk, s.Dv);
        const int r0 = warp * 16;
        float w[kScanTiles][4] = {}, out[kScanTiles][4] = {};
        __syncthreads();  // S is complete
        fragment_products(w, in.Wk, steps, warp, state_at);
        fragment_products(out, in.Q, steps, warp, state_at);
#pragma unroll
        for (int tile = 0; tile < kScanTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = r0 + g + e / 2 * 8, j = tile * 8 + t2 + e % 2;
                const float v = first + j < Dv ? in.Wv[i * Dv + first + j] : 0.0f;
                W[i * kStatePitch + j] = v - w[tile][e];
            }
        __syncthreads();  // W is complete, and S has been read
        const auto w_at = [&](int k, int j) -> float { return W[k * kStatePitch + j]; };
        fragment_products(out, in.P, kChunk / 8, warp, w_at);
#pragma unroll
        for (int tile = 0; tile < kScanTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = r0 + g + e / 2 * 8, j = first + tile * 8 + t2 + e % 2;
                const int64_t t = chunk * kChunk + i;
                if (t < tokens && j < Dv) o[((begin + t) * s.Hv + h) * s.Dv + j] = out[tile][e];
            }
        const float decay = *in.decay;
        for (int row = warp * 16; row < Dk; row += 16 * (kScanThreads / kWarp)) {
            float next[kScanTiles][4];
            const auto place = [&](int tile, int e) {
                return (row + g + e / 2 * 8) * kStatePitch + tile * 8 + t2 + e % 2;
            };
#pragma unroll
            for (int tile = 0; tile < kScanTiles; ++tile)
#pragma unroll
                for (int e = 0; e < 4; ++e) next[tile][e] = decay * S[place(tile, e)];
            fragment_products(next, in.K, kChunk / 8, row / 16, w_at);
#pragma unroll
            for (int tile = 0; tile < kScanTiles; ++tile)
#pragma unroll
                for (int e = 0; e < 4; ++e) S[place(tile, e)] = next[tile][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kMaxWidth * kScanColumns; i += kScanThreads) {
        const int row = i / kScanColumns, column = first + i % kScanColumns;
        if (row < Dk && column < Dv) state[row * s.Dv + column] = S[row * kStatePitch + i % kScanColumns];
    }
}

template <class T>
void run(const T* proj, const float* conv_weight, const float* A_log, const float* dt_bias, const float* norm,
         float eps, Shape s, const int64_t* cu_seqlens, Pointers conv_states, Pointers states, float* c, float* o,
         float* chunks, Pointers trace, T* y, int64_t tokens, int64_t sequences, int64_t longest, Stream stream) {
    const unsigned B = static_cast<unsigned>(sequences), Hv = static_cast<unsigned>(s.Hv);
    const bool one_tile = longest <= kConvTile;
    launch("gated_delta_net conv", conv_kernel<T>, dim3(blocks_for(s.C, 128), blocks_for(longest, kConvTile), B), 128,
           0, stream, proj, conv_weight, conv_states, cu_seqlens, s, c, trace, int64_t{one_tile && !trace.address});
    if (!one_tile && !trace.address)
        launch("gated_delta_net conv_state", conv_state_kernel<T>, dim3(blocks_for(s.C, 128), B), 128, 0, stream, proj,
               conv_states, cu_seqlens, s);
    const dim3 columns(blocks_for(s.Dv, kColumns), Hv, B);
    if (chunks) {
        const int64_t max_chunks = (longest + kChunk - 1) / kChunk;
        launch("gated_delta_net chunk_prepare", chunk_prepare_kernel<T>, dim3(static_cast<unsigned>(max_chunks), Hv, B),
               kPrepareThreads, kPrepareShared, stream, proj, static_cast<const float*>(c), A_log, dt_bias, cu_seqlens,
               s, chunks, max_chunks);
        launch("gated_delta_net chunk_scan", chunk_scan_kernel, dim3(blocks_for(s.Dv, kScanColumns), Hv, B),
               kScanThreads, 0, stream, chunks, states, cu_seqlens, s, o, max_chunks);
    } else {
        const auto kernel = s.Dk <= 32   ? recurrent_kernel<T, 8>
                            : s.Dk <= 64 ? recurrent_kernel<T, 16>
                                         : recurrent_kernel<T, 32>;
        launch("gated_delta_net recurrent", kernel, columns, 128, 0, stream, proj, static_cast<const float*>(c), A_log,
               dt_bias, states, cu_seqlens, s, trace, o);
    }
    launch("gated_delta_net gated_norm", gated_norm_kernel<T>, blocks_for(tokens * s.Hv, 4), 128, 0, stream,
           static_cast<const float*>(o), proj, norm, eps, s, y, tokens * s.Hv);
}

}  // namespace

// Floats that `chunks` must have for the chunked form.
int64_t gated_delta_net_chunk_floats(int64_t Hv, int64_t Dk, int64_t Dv, int64_t B, int64_t longest) {
    return B * ((longest + kChunk - 1) / kChunk) * Hv * ChunkBuffers::floats(Dk, Dv);
}

void gated_delta_net(const void* proj, const float* conv_weight, const float* A_log, const float* dt_bias,
                     const float* norm, float eps, int64_t Hk, int64_t Hv, int64_t Dk, int64_t Dv,
                     const int64_t* cu_seqlens, const int64_t* conv_states, int64_t conv_offset, const int64_t* states,
                     int64_t state_offset, float* c, float* o, float* chunks, const int64_t* trace,
                     int64_t trace_offset, void* y, int64_t T, int64_t B, int64_t longest, int64_t type,
                     Stream stream) {
    if (Hk < 1 || Hv < 1 || Hv % Hk || Dk < 1 || Dk > kMaxWidth || Dv < 1 || Dv > kMaxWidth)
        fail("gated_delta_net", "expected value heads in multiples of key heads, and heads of 1 to 128 channels");
    if (trace && chunks) fail("gated_delta_net", "the chunked form makes no trace");
    if (T == 0 || B == 0) return;
    const Shape s{Hk, Hv, Dk, Dv, 2 * Hk * Dk + Hv * Dv};
    with_type("gated_delta_net", type, [&](auto element) {
        using E = decltype(element);
        run(static_cast<const E*>(proj), conv_weight, A_log, dt_bias, norm, eps, s, cu_seqlens,
            Pointers{conv_states, conv_offset}, Pointers{states, state_offset}, c, o, chunks,
            Pointers{trace, trace_offset}, static_cast<E*>(y), T, B, longest, stream);
    });
}

void gated_delta_net_commit(const int64_t* trace, int64_t Hk, int64_t Hv, int64_t Dk, int64_t Dv,
                            const int64_t* cu_seqlens, const int64_t* counts, const int64_t* conv_states,
                            const int64_t* states, int64_t L, int64_t T, int64_t B, Stream stream) {
    if (Hk < 1 || Hv < 1 || Hv % Hk || Dk < 1 || Dk > kMaxWidth || Dv < 1 || Dv > kMaxWidth)
        fail("gated_delta_net_commit",
             "expected value heads in multiples of key heads, and heads of 1 to 128 channels");
    if (L == 0 || T == 0 || B == 0) return;
    const Shape s{Hk, Hv, Dk, Dv, 2 * Hk * Dk + Hv * Dv};
    launch("gated_delta_net_commit conv", commit_conv_kernel,
           dim3(blocks_for(s.C, 128), static_cast<unsigned>(L), static_cast<unsigned>(B)), 128, 0, stream,
           Pointers{trace, 0}, Pointers{conv_states, 0}, cu_seqlens, counts, s, T);
    const auto kernel = Dk <= 32 ? commit_kernel<8> : Dk <= 64 ? commit_kernel<16> : commit_kernel<32>;
    launch("gated_delta_net_commit", kernel,
           dim3(blocks_for(Dv, kColumns), static_cast<unsigned>(Hv), static_cast<unsigned>(B * L)), 128, 0, stream,
           Pointers{trace, 0}, Pointers{states, 0}, cu_seqlens, counts, s, L, T);
}

}  // namespace cuda
}  // namespace deltaic
