// linear and swiglu for a few tokens (products that read every weight once, dequantised in registers, with norm, bias,
// activation, residual and the gated product fused), and dequantisation for the products of many tokens, which cuBLAS
// computes. bfloat16 activations go through tensor cores (gemv_mma.cuh) where the card has them for bfloat16; floats,
// float matrices and parts of unlike formats through sums of floats (weight.cuh).
#include "cuda/common.cuh"
#include "cuda/gemv_mma.cuh"
#include "cuda/ops.h"
#include "cuda/weight.cuh"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct Epilogue {
    const float* bias;
    int64_t activation;
    const void* residual;
    void* y;
    int64_t outputs;  // columns of y
    bool float_output;
};

template <class T>
__device__ __forceinline__ void write_output(const Epilogue& e, int64_t t, int64_t n, float v) {
    const int64_t i = t * e.outputs + n;
    if (e.bias) v += e.bias[n];
    v = activate(static_cast<Activation>(e.activation), v);
    if (e.residual) v += to_float(static_cast<const T*>(e.residual)[i]);
    if (e.float_output)
        static_cast<float*>(e.y)[i] = v;
    else
        static_cast<T*>(e.y)[i] = from_float<T>(v);
}

// The part that a block works on: `outputs` are those of the parts before, `blocks` has the blocks of a part.
struct Place {
    int part = 0;
    int64_t block = 0, outputs = 0;
};

template <class Blocks>
__device__ __forceinline__ Place place_of(const Matrices& w, Blocks blocks) {
    Place place;
    place.block = blockIdx.x;
    while (place.block >= blocks(w.part[place.part])) {
        place.block -= blocks(w.part[place.part]);
        place.outputs += w.part[place.part].rows;
        ++place.part;
    }
    return place;
}

// Blocks of a part, of which each warp computes a pair of rows.
__host__ __device__ inline int64_t pair_blocks(const Matrix& m) { return ((m.rows + 1) / 2 + kWarps - 1) / kWarps; }

// A warp computes two rows of a part for NT tokens: rows 2i and 2i+1, or, with glu, gate row i and up row i.
template <class T, int NT>
__global__ void __launch_bounds__(kThreads,
                                  NT == 4 ? 2 : 1)  // without the 2, ptxas 13.0 spills three registers at NT = 4
    gemv_kernel(const T* x, const float* norm, float eps, Matrices w, Epilogue e, int64_t tokens) {
    grid_begin();
    DELTAIC_DYNAMIC_SHARED(base);
    DELTAIC_SHARED(float, scratch, 32);
    const Place place = place_of(w, pair_blocks);
    const Matrix m = w.part[place.part];
    const int64_t t0 = static_cast<int64_t>(blockIdx.y) * NT;
    const Shared<float> h = carve<float>(base, 0, NT * staged_columns(m.stride, NT));

    const int lane = threadIdx.x % kWarp;
    const int64_t pair = place.block * kWarps + threadIdx.x / kWarp, pairs = (m.rows + 1) / 2;
    const int64_t row[2] = {w.glu ? pair : 2 * pair, w.glu ? pairs + pair : 2 * pair + 1};
    const bool valid[2] = {pair < pairs, pair < pairs && row[1] < m.rows};
    float sum[2][NT];
    block_dot<NT>(x, norm, eps, t0, tokens, m, row, valid, h, scratch, sum);
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        if (lane != t || t0 + t >= tokens) continue;
        if (w.glu) {
            if (valid[0]) write_output<T>(e, t0 + t, pair, silu(sum[0][t]) * sum[1][t]);
        } else {
            if (valid[0]) write_output<T>(e, t0 + t, place.outputs + row[0], sum[0][t]);
            if (valid[1]) write_output<T>(e, t0 + t, place.outputs + row[1], sum[1][t]);
        }
    }
}

// Tiles of a part, see gemv_mma.
__host__ __device__ inline int64_t tiles_of(const Matrix& m) { return (m.rows + kMmaRows - 1) / kMmaRows; }

template <Format F>
__global__ void __launch_bounds__(kMmaThreads, Run<F>::kBlocks)
    gemv_mma_kernel(const bf16* x, const float* norm, float eps, Matrices w, Epilogue e, int splits, int64_t tokens) {
    grid_trigger();
    DELTAIC_DYNAMIC_SHARED(base);
    DELTAIC_SHARED(float, partial, kMmaWarps * kMmaTokens * kPartialPitch);
    DELTAIC_SHARED(float, scales, kMmaTokens);
    const int tiles = kMmaWarps / splits;
    const Place place = place_of(w, [&](const Matrix& m) { return (tiles_of(m) + tiles - 1) / tiles; });
    const Matrix m = w.part[place.part];
    const int64_t t0 = static_cast<int64_t>(blockIdx.y) * kMmaTokens, left = tokens - t0;
    const int64_t count = left < kMmaTokens ? left : kMmaTokens, runs = (m.stride + kRunColumns - 1) / kRunColumns;
    const Shared<uint4> units =
        carve<uint4>(base, 0, static_cast<size_t>(staged_units(runs, norm ? 2 * count : count)));
    gemv_mma<F>(x, norm, eps, m, w.glu != 0, 0, place.block, splits, t0, tokens, units, partial, scales,
                [&](int64_t t, int64_t n, float v) { write_output<bf16>(e, t, place.outputs + n, v); });
}

// Rows first .. first+count of one part as numbers [count][columns].
template <class T>
__global__ void dequantise_kernel(Matrix m, int64_t first, int64_t count, T* y) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, chunks = m.stride / 8;
    if (i >= count * chunks) return;
    const int64_t row = i / chunks, c = i % chunks;
    with_format(m.format, [&](auto format) {
        Chunk<decltype(format)::value> chunk;
        chunk.load(m, first + row, c);
        float v[8];
        const float scale = chunk.decode(v);
        for (int j = 0; j < 8; ++j) v[j] *= scale;
        T* to = y + row * m.columns + c * 8;
        if (m.columns % 8 == 0) {
            if (c * 8 < m.columns) store8(to, v);
        } else {
            for (int j = 0; j < 8; ++j)
                if (c * 8 + j < m.columns) to[j] = from_float<T>(v[j]);
        }
    });
}

template <class T, int NT>
void launch_gemv(const void* x, const float* norm, float eps, const Matrices& w, const Epilogue& e, int64_t tokens,
                 int64_t stride, Stream stream) {
    int64_t blocks = 0;
    for (int64_t p = 0; p < w.parts; ++p) blocks += pair_blocks(w.part[p]);
    const dim3 grid(static_cast<unsigned>(blocks), blocks_for(tokens, NT));
    launch("linear", gemv_kernel<T, NT>, grid, kThreads, staged_bytes(stride, NT), stream, static_cast<const T*>(x),
           norm, eps, w, e, tokens);
}

void launch_mma(const bf16* x, const float* norm, float eps, const Matrices& w, const Epilogue& e, int64_t tokens,
                int64_t stride, Stream stream) {
    int64_t tiles = 0, blocks = 0;
    for (int64_t p = 0; p < w.parts; ++p) tiles += tiles_of(w.part[p]);
    const int splits = mma_splits(tiles), each = kMmaWarps / splits;
    for (int64_t p = 0; p < w.parts; ++p) blocks += (tiles_of(w.part[p]) + each - 1) / each;
    const auto format = static_cast<Format>(w.part[0].format);
    const auto kernel = format == Format::bf16   ? gemv_mma_kernel<Format::bf16>
                        : format == Format::int8 ? gemv_mma_kernel<Format::int8>
                                                 : gemv_mma_kernel<Format::int4>;
    launch("linear", kernel, dim3(static_cast<unsigned>(blocks), blocks_for(tokens, kMmaTokens)), kMmaThreads,
           mma_shared_bytes((stride + kRunColumns - 1) / kRunColumns, tokens, norm != nullptr), stream, x, norm, eps, w,
           e, splits, tokens);
}

bool takes_mma(const void* x, const float* norm, const Matrices& w, int64_t type) {
    bool takes = static_cast<Type>(type) == Type::bf16;
    for (int64_t p = 0; p < w.parts; ++p)
        takes = takes && w.part[p].format == w.part[0].format && mma_takes(x, norm, w.part[p]);
    return takes;
}

}  // namespace

bool tensor_cores = true;

void use_tensor_cores(bool use) { tensor_cores = use; }

void linear(const void* x, const Matrices& w, const float* norm, float eps, const float* bias, int64_t activation,
            const void* residual, void* y, int64_t tokens, int64_t type, int64_t float_output, Stream stream) {
    if (w.count != 1) fail("linear", "the weight holds several experts, expected one matrix");
    if (tokens == 0) return;
    Epilogue e{bias, activation, residual, y, 0, float_output != 0};
    int64_t stride = 0;
    for (int64_t p = 0; p < w.parts; ++p) {
        e.outputs += w.part[p].rows;
        stride = w.part[p].stride > stride ? w.part[p].stride : stride;
    }
    if (w.glu) e.outputs /= 2;
    if (e.outputs == 0) return;
    if (takes_mma(x, norm, w, type))
        return launch_mma(static_cast<const bf16*>(x), norm, eps, w, e, tokens, stride, stream);
    int64_t at_once = 1;  // tokens per block
    while (at_once < 8 && at_once < tokens) at_once *= 2;
    with_type("linear", type, [&](auto element) {
        using T = decltype(element);
        switch (at_once) {
            case 1:
                return launch_gemv<T, 1>(x, norm, eps, w, e, tokens, stride, stream);
            case 2:
                return launch_gemv<T, 2>(x, norm, eps, w, e, tokens, stride, stream);
            case 4:
                return launch_gemv<T, 4>(x, norm, eps, w, e, tokens, stride, stream);
            default:
                return launch_gemv<T, 8>(x, norm, eps, w, e, tokens, stride, stream);
        }
    });
}

void dequantise(const Matrices& w, int64_t part, int64_t first, int64_t count, void* y, int64_t type, Stream stream) {
    if (part < 0 || part >= w.parts || first < 0 || count < 0 || first + count > w.part[part].rows * w.count)
        fail("dequantise", "no such rows in this weight");
    if (count == 0) return;
    with_type("dequantise", type, [&](auto element) {
        using T = decltype(element);
        const int64_t chunks = count * (w.part[part].stride / 8);
        launch("dequantise", dequantise_kernel<T>, blocks_for(chunks, 256), 256, 0, stream, w.part[part], first, count,
               static_cast<T*>(y));
    });
}

}  // namespace cuda
}  // namespace deltaic
