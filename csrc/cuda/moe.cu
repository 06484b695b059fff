// moe: routing, and the experts' products for a few tokens (matrix-vector) or for many (tokens gathered by expert,
// tensor cores).
//
// Logits [T, E + 1] come from `linear` with the router and the shared expert's gate as two parts. `moe_route` chooses.
// Slot j < top_k of a token is its j-th expert, slot top_k the shared expert. Every output is a sum over the slots of
// its token in slot order, so a token gets the same bits whoever shares its batch.
#include "cuda/common.cuh"
#include "cuda/gemv_mma.cuh"
#include "cuda/ops.h"
#include "cuda/weight.cuh"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// One warp per token: the top_k largest logits (equal ones: lower index first), their softmax, and the sigmoid of the
// gate.
__global__ void route_kernel(const float* logits, int64_t E, int64_t top_k, int64_t* experts, float* coefficients,
                             int64_t tokens) {
    grid_begin();
    const int lane = threadIdx.x % kWarp;
    const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (t >= tokens) return;
    const float* row = logits + t * (E + 1);
    float* c = coefficients + t * (top_k + 1);
    float last = 0, first = 0, total = 0;
    int last_expert = -1;
    for (int64_t j = 0; j < top_k; ++j) {
        // The best of those after the last chosen one in the order (logit descending, index ascending).
        float best = 0;
        int best_expert = -1;
        for (int e = lane; e < E; e += kWarp) {
            const float v = row[e];
            const bool later = j == 0 || v < last || (v == last && e > last_expert);
            if (later && (best_expert < 0 || v > best)) best = v, best_expert = e;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float v = __shfl_xor_sync(kAllLanes, best, offset);
            const int e = __shfl_xor_sync(kAllLanes, best_expert, offset);
            if (e >= 0 && (best_expert < 0 || v > best || (v == best && e < best_expert))) best = v, best_expert = e;
        }
        // NaN logits choose nothing: expert 0 keeps every index valid, and the NaN goes on in the coefficient.
        last = best_expert < 0 ? row[0] : best, last_expert = best_expert < 0 ? 0 : best_expert;
        if (j == 0) first = last;
        const float weight = expf(last - first);
        total += weight;
        if (lane == 0) experts[t * top_k + j] = last_expert, c[j] = weight;
    }
    __syncwarp();
    for (int64_t j = lane; j < top_k; j += kWarp) c[j] /= total;
    if (lane == 0) c[top_k] = sigmoid(row[E]);
}

// Block (rows, slot, token): activation [token][slot][pitch] = silu(gate) * up of one expert.
template <class T>
__global__ void __launch_bounds__(kThreads)
    expert_up_kernel(const T* x, const float* norm, float eps, Matrix routed, Matrix shared, const int64_t* experts,
                     int64_t top_k, float* activation, int64_t pitch) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    DELTAIC_SHARED(float, scratch, 32);
    const int64_t slot = blockIdx.y, t = blockIdx.z;
    const bool is_shared = slot == top_k;
    const Matrix m = is_shared ? shared : routed;
    const int64_t I = m.rows / 2, first = is_shared ? 0 : experts[t * top_k + slot] * m.rows;
    if (static_cast<int64_t>(blockIdx.x) * kWarps >= I) return;
    const Shared<float> h = carve<float>(base, 0, staged_columns(m.stride, 1));
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t row[2] = {first + n, first + I + n};
    const bool valid[2] = {n < I, n < I};
    float sum[2][1];
    block_dot<1>(x + t * m.columns, norm, eps, 0, 1, m, row, valid, h, scratch, sum);
    if (threadIdx.x % kWarp == 0 && n < I)
        activation[(t * (top_k + 1) + slot) * pitch + n] = silu(sum[0][0]) * sum[1][0];
}

// Block (rows, token): y = sum over slots of coefficient * (down . activation), plus the residual.
template <class T>
__global__ void __launch_bounds__(kThreads)
    expert_down_kernel(const float* activation, int64_t pitch, Matrix routed, Matrix shared, const int64_t* experts,
                       const float* coefficients, int64_t top_k, const T* residual, T* y) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    const int64_t t = blockIdx.y, H = routed.rows;
    const int64_t n = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * 2;
    const bool valid[2] = {n < H, n + 1 < H};
    float total[2] = {0, 0};
    for (int64_t slot = 0; slot <= top_k; ++slot) {
        const bool is_shared = slot == top_k;
        const Matrix m = is_shared ? shared : routed;
        const int64_t first = is_shared ? 0 : experts[t * top_k + slot] * H;
        const Shared<float> h = carve<float>(base, 0, staged_columns(m.stride, 1));
        const int64_t row[2] = {first + n, first + n + 1};
        float sum[2][1];
        block_dot<1>(activation + (t * (top_k + 1) + slot) * pitch, nullptr, 0, 0, 1, m, row, valid, h, h, sum);
        const float c = coefficients[t * (top_k + 1) + slot];
        total[0] = fmaf(c, sum[0][0], total[0]), total[1] = fmaf(c, sum[1][0], total[1]);
    }
    if (threadIdx.x % kWarp != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (valid[r]) {
            const int64_t i = t * H + n + r;
            y[i] = from_float<T>(total[r] + (residual ? to_float(residual[i]) : 0.0f));
        }
}

// --- a few tokens of bfloat16 on tensor cores, see gemv_mma.cuh

__host__ __device__ inline int64_t runs_of(const Matrix& m) { return (m.stride + kRunColumns - 1) / kRunColumns; }

// As expert_up_kernel; block (tiles of 8 gate rows and 8 up rows, slot, token).
template <Format F>
__global__ void __launch_bounds__(kMmaThreads, Run<F>::kBlocks)
    expert_up_mma_kernel(const bf16* x, const float* norm, float eps, Matrix routed, Matrix shared,
                         const int64_t* experts, int64_t top_k, int splits, float* activation, int64_t pitch) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    DELTAIC_SHARED(float, partial, kMmaWarps * kMmaTokens * kPartialPitch);
    DELTAIC_SHARED(float, scales, kMmaTokens);
    const int64_t slot = blockIdx.y, t = blockIdx.z;
    const bool is_shared = slot == top_k;
    const Matrix m = is_shared ? shared : routed;
    if (static_cast<int64_t>(blockIdx.x) * (kMmaWarps / splits) * (kMmaRows / 2) >= m.rows / 2) return;
    const int64_t skipped = is_shared ? 0 : experts[t * top_k + slot] * m.rows;
    const Shared<uint4> units = carve<uint4>(base, 0, static_cast<size_t>(staged_units(runs_of(m), norm ? 2 : 1)));
    float* out = activation + (t * (top_k + 1) + slot) * pitch;
    gemv_mma<F>(x, norm, eps, m, true, skipped, blockIdx.x, splits, t, t + 1, units, partial, scales,
                [&](int64_t, int64_t n, float v) { out[n] = v; });
}

// As expert_down_kernel; block (16 rows, token). The runs of all slots are dealt to the warps, and a slot's activations
// are staged times its coefficient, as two bfloat16 each.
template <Format F>
__global__ void __launch_bounds__(kMmaThreads, Run<F>::kBlocks)
    expert_down_mma_kernel(const float* activation, int64_t pitch, Matrix routed, Matrix shared, const int64_t* experts,
                           const float* coefficients, int64_t top_k, const bf16* residual, bf16* y) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    DELTAIC_SHARED(float, partial, kMmaWarps* kMmaRows);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t4 = lane % 4;
    const int64_t t = blockIdx.y, H = routed.rows, n0 = static_cast<int64_t>(blockIdx.x) * kMmaRows;
    const int64_t top = n0 + g < H ? n0 + g : 0, bottom = n0 + g + 8 < H ? n0 + g + 8 : 0;
    const int slots = static_cast<int>(top_k), each = static_cast<int>(runs_of(routed)),
              runs = slots * each + static_cast<int>(runs_of(shared)), staged = runs * kRunUnits;
    const Shared<uint4> units = carve<uint4>(base, 0, static_cast<size_t>(2 * staged));
    const auto slot_of = [&](int run) { return run / each < slots ? run / each : slots; };

    Run<F> ahead[Run<F>::kBatch];
    const auto fetch = [&](int first) {
#pragma unroll
        for (int b = 0; b < Run<F>::kBatch; ++b) {
            const int run = first + b * kMmaWarps, slot = slot_of(run);
            if (run >= runs) break;
            const Matrix m = slot == slots ? shared : routed;
            const int64_t skipped = slot == slots ? 0 : experts[t * top_k + slot] * H;
            const int64_t row[2] = {skipped + top, skipped + bottom};
            ahead[b].load(Run<F>::source(m, row, t4), run - slot * each, t4, static_cast<int>(m.stride / 8));
        }
    };
    fetch(warp);
    for (int u = threadIdx.x; u < staged; u += kMmaThreads) {
        const int run = u / kRunUnits, slot = slot_of(run), column = (u - slot * each * kRunUnits) * 8;
        const int64_t entry = t * (top_k + 1) + slot;
        float v[8] = {};
        if (column < (slot == slots ? shared.columns : routed.columns)) {
            load8(activation + entry * pitch + column, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] *= coefficients[entry];
        }
        stage_unit<F>(units, 0, u, staged, 1, true, v);
    }
    __syncthreads();
    float total[4] = {};
    for (int first = warp; first < runs; first += Run<F>::kBatch * kMmaWarps) {
        if (first != warp) fetch(first);
#pragma unroll
        for (int b = 0; b < Run<F>::kBatch; ++b) {
            const int run = first + b * kMmaWarps;
            if (run >= runs) break;
            run_product(ahead[b], units, run * kRunUnits, staged, 1, true, total);
        }
    }
    if (t4 == 0) partial[warp * kMmaRows + g] = total[0], partial[warp * kMmaRows + g + 8] = total[2];
    __syncthreads();
    const int64_t n = n0 + threadIdx.x, i = t * H + n;
    if (threadIdx.x >= kMmaRows || n >= H) return;
    float sum = 0;
    for (int w = 0; w < kMmaWarps; ++w) sum += partial[w * kMmaRows + threadIdx.x];
    y[i] = from_float<bf16>(sum + (residual ? to_float(residual[i]) : 0.0f));
}

// --- many tokens
// -------------------------------------------------------------------------------------------------------------------

constexpr int kTile = 32;  // entries (token, slot) of one expert that a block multiplies at once
constexpr int kGroupThreads = 1024;

// Entries t * top_k + slot sorted by expert, each expert's in ascending order, and the tiles that cover them: tile i
// has entries [tiles[3i+1], tiles[3i+2]) of `sorted` and expert tiles[3i], -1 after the last. Every block counts all
// entries, and then a warp places those of one expert. Shared memory: 3 * E numbers.
__global__ void __launch_bounds__(kGroupThreads, 1) group_kernel(const int64_t* experts, int64_t entries, int64_t E,
                                                                 int64_t* sorted, int64_t* tiles, int64_t max_tiles) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all = static_cast<int>(E);
    const size_t each = static_cast<size_t>(E), bytes = each * sizeof(int);
    const Shared<int> count = carve<int>(base, 0, each);
    // Entries and tiles of the experts before.
    const Shared<int> entry = carve<int>(base, bytes, each), tile = carve<int>(base, 2 * bytes, each);
    for (int e = threadIdx.x; e < all; e += kGroupThreads) count[e] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < entries; i += kGroupThreads) atomicAdd(shared_atomic(count, experts[i]), 1);
    __syncthreads();
    if (warp == 0) {  // a lane adds up a run of experts, and the runs are added across lanes
        const int run = (all + kWarp - 1) / kWarp, first = lane * run, end = first + run < all ? first + run : all;
        int own_entries = 0, own_tiles = 0;
        for (int e = first; e < end; ++e) {
            const int here = count[e];
            own_entries += here, own_tiles += (here + kTile - 1) / kTile;
        }
        int through_entries = own_entries, through_tiles = own_tiles;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const int a = __shfl_up_sync(kAllLanes, through_entries, offset),
                      b = __shfl_up_sync(kAllLanes, through_tiles, offset);
            if (lane >= offset) through_entries += a, through_tiles += b;
        }
        int before = through_entries - own_entries, tiles_before = through_tiles - own_tiles;
        for (int e = first; e < end; ++e) {
            const int here = count[e];
            entry[e] = before, tile[e] = tiles_before;
            before += here, tiles_before += (here + kTile - 1) / kTile;
        }
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        const int used = tile[all - 1] + (count[all - 1] + kTile - 1) / kTile;
        for (int64_t i = used + threadIdx.x; i < max_tiles; i += kGroupThreads) tiles[3 * i] = -1;
    }
    const int e = static_cast<int>(blockIdx.x) * (kGroupThreads / kWarp) + warp;
    if (e >= all) return;
    const int64_t first = entry[e], end = first + count[e];
    for (int64_t i = lane; first + i * kTile < end; i += kWarp) {
        int64_t* to = tiles + 3 * (tile[e] + i);
        to[0] = e, to[1] = first + i * kTile, to[2] = to[1] + kTile < end ? to[1] + kTile : end;
    }
    int64_t place = first;
    for (int64_t i = 0; i < entries && place < end; i += kWarp) {
        const bool mine = i + lane < entries && experts[i + lane] == e;
        const uint32_t mask = __ballot_sync(kAllLanes, mine);
        if (mine) sorted[place + __popc(mask & ((1u << lane) - 1u))] = i + lane;
        place += __popc(mask);
    }
}

// A warp multiplies the 32 entries of a tile by 8 rows of W (gate and up rows with GLU) over all K. Lane (g, t) loads
// eight columns 32 s + 8 t of row g of both operands: which K a register stands for is the same in A and B.
template <Format F, bool GLU>
__device__ __forceinline__ void tile_rows(const Matrix& m, int64_t row0, int64_t rows, int64_t up,
                                          const bf16* const (&x)[4], float (&c)[2][GLU ? 2 : 1][4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t chunks = (m.columns + 7) / 8;
    for (int64_t s = 0; s * 4 < chunks; ++s) {
        const int64_t chunk = s * 4 + t;
        uint32_t b[GLU ? 2 : 1][4];
#pragma unroll
        for (int w = 0; w < (GLU ? 2 : 1); ++w)
            load_bf16<F>(m, row0 + w * up + g, chunk, g < rows && chunk < chunks, b[w]);
        uint4 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[i] = x[i] && chunk < chunks ? load_as<uint4>(x[i] + chunk * 8) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int w = 0; w < (GLU ? 2 : 1); ++w) {
                const uint4 &top = a[2 * half], &bottom = a[2 * half + 1];
                mma_bf16(c[half][w], {top.x, bottom.x, top.y, bottom.y}, {b[w][0], b[w][1]});
                mma_bf16(c[half][w], {top.z, bottom.z, top.w, bottom.w}, {b[w][2], b[w][3]});
            }
    }
}

// Block (8 * warps rows of the expert's matrix, tile). x has one row per token (entry / per_row), `pitch` numbers
// apart.
template <bool GLU>
__global__ void __launch_bounds__(128)
    grouped_kernel(const bf16* x, int64_t pitch, int64_t per_row, Matrix m, int64_t outputs, const int64_t* sorted,
                   const int64_t* tiles, bf16* y, int64_t y_pitch) {
    grid_begin();
    const int64_t* tile = tiles + 3 * static_cast<int64_t>(blockIdx.y);
    const int64_t expert = tile[0], n0 = (static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarp) * 8;
    if (expert < 0 || n0 >= outputs) return;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const bf16* rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        rows[i] = tile[1] + i * 8 + g < tile[2] ? x + sorted[tile[1] + i * 8 + g] / per_row * pitch : nullptr;
    float c[2][GLU ? 2 : 1][4] = {};
    const int64_t left = outputs - n0 < 8 ? outputs - n0 : 8;
    with_format(m.format, [&](auto format) {
        tile_rows<decltype(format)::value, GLU>(m, expert * m.rows + n0, left, outputs, rows, c);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t i = tile[1] + half * 16 + g + e / 2 * 8, n = n0 + 2 * t + e % 2;
            if (i >= tile[2] || n >= outputs) continue;
            float v = c[half][0][e];
            if constexpr (GLU) v = silu(v) * c[half][1][e];
            y[sorted[i] * y_pitch + n] = from_float<bf16>(v);
        }
}

// y = sum over slots of coefficient * routed [T * top_k, H] + gate * shared [T, H] (+ residual).
__global__ void scatter_kernel(const bf16* routed, const bf16* shared, const float* coefficients, int64_t top_k,
                               const bf16* residual, bf16* y, int64_t tokens, int64_t H) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= tokens * H) return;
    const int64_t t = i / H, n = i % H;
    const float* c = coefficients + t * (top_k + 1);
    float v = 0;
    for (int64_t j = 0; j < top_k; ++j) v = fmaf(c[j], to_float(routed[(t * top_k + j) * H + n]), v);
    v = fmaf(c[top_k], to_float(shared[i]), v);
    y[i] = from_float<bf16>(residual ? v + to_float(residual[i]) : v);
}

void check(const char* op, const Matrices& routed, const Matrices& shared) {
    if (routed.parts != 1 || shared.parts != 1 || shared.count != 1 || routed.part[0].columns < 1)
        fail(op, "expected one routed and one shared matrix");
}

// Bytes of shared memory of expert_down_mma_kernel.
size_t down_mma_bytes(const Matrix& routed, const Matrix& shared, int64_t top_k) {
    return static_cast<size_t>(2 * (top_k * runs_of(routed) + runs_of(shared)) * kRunUnits) * sizeof(uint4);
}

bool few_take_mma(const void* x, const float* norm, const Matrix& up, const Matrix& shared_up, const Matrix& out,
                  const Matrix& shared_out, int64_t top_k, int64_t pitch) {
    return up.format == shared_up.format && out.format == shared_out.format && mma_takes(x, norm, up) &&
           mma_takes(x, norm, shared_up) && mma_takes(x, nullptr, out) && mma_takes(x, nullptr, shared_out) &&
           pitch % 4 == 0 && down_mma_bytes(out, shared_out, top_k) <= 40 * 1024;
}

template <Format F>
void launch_up(const bf16* x, const float* norm, float eps, const Matrix& up, const Matrix& shared_up,
               const int64_t* experts, int64_t top_k, float* activation, int64_t pitch, int64_t T, Stream stream) {
    const int64_t I = (up.rows > shared_up.rows ? up.rows : shared_up.rows) / 2, tiles = (I + 7) / 8;
    const int splits = mma_splits(tiles * (top_k + 1));
    const size_t a = mma_shared_bytes(runs_of(up), 1, norm), b = mma_shared_bytes(runs_of(shared_up), 1, norm);
    launch("moe_few up", expert_up_mma_kernel<F>,
           dim3(blocks_for(tiles, kMmaWarps / splits), static_cast<unsigned>(top_k + 1), static_cast<unsigned>(T)),
           kMmaThreads, a > b ? a : b, stream, x, norm, eps, up, shared_up, experts, top_k, splits, activation, pitch);
}

template <Format F>
void launch_down(const float* activation, int64_t pitch, const Matrix& out, const Matrix& shared_out,
                 const int64_t* experts, const float* coefficients, int64_t top_k, const bf16* residual, bf16* y,
                 int64_t T, Stream stream) {
    launch("moe_few down", expert_down_mma_kernel<F>, dim3(blocks_for(out.rows, kMmaRows), static_cast<unsigned>(T)),
           kMmaThreads, down_mma_bytes(out, shared_out, top_k), stream, activation, pitch, out, shared_out, experts,
           coefficients, top_k, residual, y);
}

template <class Function>
void with_mma_format(const Matrix& m, Function function) {
    const auto format = static_cast<Format>(m.format);
    if (format == Format::bf16) return function(std::integral_constant<Format, Format::bf16>{});
    if (format == Format::int8) return function(std::integral_constant<Format, Format::int8>{});
    return function(std::integral_constant<Format, Format::int4>{});
}

}  // namespace

void moe_route(const float* logits, int64_t E, int64_t top_k, int64_t* experts, float* coefficients, int64_t T,
               Stream stream) {
    if (top_k < 1 || top_k > E) fail("moe_route", "top_k must be 1 to the number of experts");
    if (T == 0) return;
    launch("moe_route", route_kernel, blocks_for(T, 4), 128, 0, stream, logits, E, top_k, experts, coefficients, T);
}

void moe_few(const void* x, const float* norm, float eps, const Matrices& gate_up, const Matrices& down,
             const Matrices& shared_gate_up, const Matrices& shared_down, const int64_t* experts,
             const float* coefficients, int64_t top_k, const void* residual, float* activation, int64_t pitch, void* y,
             int64_t T, int64_t type, Stream stream) {
    check("moe_few", gate_up, shared_gate_up);
    check("moe_few", down, shared_down);
    if (T == 0) return;
    const Matrix &up = gate_up.part[0], &shared_up = shared_gate_up.part[0], &out = down.part[0],
                 &shared_out = shared_down.part[0];
    if (static_cast<Type>(type) == Type::bf16 && few_take_mma(x, norm, up, shared_up, out, shared_out, top_k, pitch)) {
        with_mma_format(up, [&](auto format) {
            launch_up<decltype(format)::value>(static_cast<const bf16*>(x), norm, eps, up, shared_up, experts, top_k,
                                               activation, pitch, T, stream);
        });
        with_mma_format(out, [&](auto format) {
            launch_down<decltype(format)::value>(activation, pitch, out, shared_out, experts, coefficients, top_k,
                                                 static_cast<const bf16*>(residual), static_cast<bf16*>(y), T, stream);
        });
        return;
    }
    const int64_t I = (up.rows > shared_up.rows ? up.rows : shared_up.rows) / 2;
    const int64_t up_stride = up.stride > shared_up.stride ? up.stride : shared_up.stride;
    const int64_t down_stride = out.stride > shared_out.stride ? out.stride : shared_out.stride;
    with_type("moe_few", type, [&](auto element) {
        using E = decltype(element);
        launch("moe_few up", expert_up_kernel<E>,
               dim3(blocks_for(I, kWarps), static_cast<unsigned>(top_k + 1), static_cast<unsigned>(T)), kThreads,
               staged_bytes(up_stride, 1), stream, static_cast<const E*>(x), norm, eps, up, shared_up, experts, top_k,
               activation, pitch);
        launch("moe_few down", expert_down_kernel<E>, dim3(blocks_for(out.rows, 2 * kWarps), static_cast<unsigned>(T)),
               kThreads, staged_bytes(down_stride, 1), stream, static_cast<const float*>(activation), pitch, out,
               shared_out, experts, coefficients, top_k, static_cast<const E*>(residual), static_cast<E*>(y));
    });
}

int64_t moe_max_tiles(int64_t entries, int64_t E) { return entries / kTile + (E < entries ? E : entries); }

void moe_group(const int64_t* experts, int64_t entries, int64_t E, int64_t* sorted, int64_t* tiles, int64_t max_tiles,
               Stream stream) {
    if (entries == 0) return;
    if (E > 4096 || entries > 1 << 30) fail("moe_group", "expected up to 4096 experts and 2^30 entries");
    if (max_tiles < moe_max_tiles(entries, E)) fail("moe_group", "too little room for the tiles");
    launch("moe_group", group_kernel, blocks_for(E, kGroupThreads / kWarp), kGroupThreads,
           3 * static_cast<size_t>(E) * sizeof(int), stream, experts, entries, E, sorted, tiles, max_tiles);
}

void moe_grouped(const void* x, int64_t pitch, int64_t per_row, const Matrices& w, const int64_t* sorted,
                 const int64_t* tiles, int64_t max_tiles, void* y, int64_t y_pitch, Stream stream) {
    if (w.parts != 1 || pitch % 8)
        fail("moe_grouped", "expected one matrix per expert and rows of x in multiples of 8 numbers");
    if (max_tiles == 0) return;
    const int64_t outputs = w.glu ? w.part[0].rows / 2 : w.part[0].rows;
    launch("moe_grouped", w.glu ? grouped_kernel<true> : grouped_kernel<false>,
           dim3(blocks_for(outputs, 32), static_cast<unsigned>(max_tiles)), 128, 0, stream, static_cast<const bf16*>(x),
           pitch, per_row, w.part[0], outputs, sorted, tiles, static_cast<bf16*>(y), y_pitch);
}

void moe_scatter(const void* routed, const void* shared, const float* coefficients, int64_t top_k, const void* residual,
                 void* y, int64_t T, int64_t H, Stream stream) {
    if (T * H == 0) return;
    launch("moe_scatter", scatter_kernel, blocks_for(T * H, 256), 256, 0, stream, static_cast<const bf16*>(routed),
           static_cast<const bf16*>(shared), coefficients, top_k, static_cast<const bf16*>(residual),
           static_cast<bf16*>(y), T, H);
}

}  // namespace cuda
}  // namespace deltaic
