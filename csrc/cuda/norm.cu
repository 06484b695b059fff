// rms_norm, rms_norm_pair, layer_norm, embed, and the element-wise tails of products that cuBLAS computes.
#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "cuda/weight.cuh"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kRowThreads = 256;

// One row, by the whole block.
template <class T>
__device__ __forceinline__ void rms_norm_row(const T* x, const float* weight, T* y, int64_t D, float eps,
                                             Shared<float> scratch) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
        const float v = to_float(x[i]);
        sum += v * v;
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / static_cast<float>(D) + eps);
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x)
        y[i] = from_float<T>((1.0f + weight[i]) * to_float(x[i]) * scale);
}

template <class T>
__global__ void rms_norm_kernel(const T* x, const float* weight, T* y, int64_t D, float eps) {
    grid_begin();
    DELTAIC_SHARED(float, scratch, 32);
    rms_norm_row(x + blockIdx.x * D, weight, y + blockIdx.x * D, D, eps, scratch);
}

// y [T, 2*D]: rows of a beside rows of b, each normalised for itself. Block (token, which of the two).
template <class T>
__global__ void rms_norm_pair_kernel(const T* a, const float* a_weight, const T* b, const float* b_weight, T* y,
                                     int64_t D, float eps) {
    grid_begin();
    DELTAIC_SHARED(float, scratch, 32);
    const bool second = blockIdx.y;
    rms_norm_row((second ? b : a) + blockIdx.x * D, second ? b_weight : a_weight, y + (2 * blockIdx.x + blockIdx.y) * D,
                 D, eps, scratch);
}

template <class T>
__global__ void layer_norm_kernel(const T* x, const float* weight, const float* bias, T* y, int64_t D, float eps) {
    grid_begin();
    DELTAIC_SHARED(float, scratch, 32);
    const T* row = x + blockIdx.x * D;
    float sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) sum += to_float(row[i]);
    const float mean = block_sum(sum, scratch) / static_cast<float>(D);
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
        const float d = to_float(row[i]) - mean;
        squares += d * d;
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(D) + eps);
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x)
        y[blockIdx.x * D + i] = from_float<T>((to_float(row[i]) - mean) * scale * weight[i] + bias[i]);
}

// ids outside the table read as row 0: the caller has checked ids that come from the host, and sampled ids lie inside.
template <class T>
__global__ void embed_kernel(const int64_t* ids, Matrix table, T* y) {
    grid_begin();
    const int64_t id = ids[blockIdx.x], n = id < 0 || id >= table.rows ? 0 : id;
    for (int64_t k = threadIdx.x; k < table.columns; k += blockDim.x)
        y[blockIdx.x * table.columns + k] = from_float<T>(element(table, n, k));
}

template <class T>
__global__ void epilogue_kernel(const T* product, const float* bias, int64_t activation, const T* residual, T* y,
                                int64_t T_, int64_t N) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= T_ * N) return;
    float v = to_float(product[i]);
    if (bias) v += bias[i % N];
    v = activate(static_cast<Activation>(activation), v);
    if (residual) v += to_float(residual[i]);
    y[i] = from_float<T>(v);
}

template <class T>
__global__ void glu_kernel(const T* product, T* y, int64_t T_, int64_t I) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= T_ * I) return;
    const int64_t t = i / I, n = i % I;
    y[i] = from_float<T>(silu(to_float(product[t * 2 * I + n])) * to_float(product[t * 2 * I + I + n]));
}

}  // namespace

void rms_norm(const void* x, const float* weight, void* y, int64_t T, int64_t D, float eps, int64_t type,
              Stream stream) {
    if (T == 0) return;
    with_type("rms_norm", type, [&](auto e) {
        using E = decltype(e);
        launch("rms_norm", rms_norm_kernel<E>, dim3(static_cast<unsigned>(T)), kRowThreads, 0, stream,
               static_cast<const E*>(x), weight, static_cast<E*>(y), D, eps);
    });
}

void rms_norm_pair(const void* a, const float* a_weight, const void* b, const float* b_weight, void* y, int64_t T,
                   int64_t D, float eps, int64_t type, Stream stream) {
    if (T == 0) return;
    with_type("rms_norm_pair", type, [&](auto e) {
        using E = decltype(e);
        launch("rms_norm_pair", rms_norm_pair_kernel<E>, dim3(static_cast<unsigned>(T), 2), kRowThreads, 0, stream,
               static_cast<const E*>(a), a_weight, static_cast<const E*>(b), b_weight, static_cast<E*>(y), D, eps);
    });
}

void layer_norm(const void* x, const float* weight, const float* bias, void* y, int64_t T, int64_t D, float eps,
                int64_t type, Stream stream) {
    if (T == 0) return;
    with_type("layer_norm", type, [&](auto e) {
        using E = decltype(e);
        launch("layer_norm", layer_norm_kernel<E>, dim3(static_cast<unsigned>(T)), kRowThreads, 0, stream,
               static_cast<const E*>(x), weight, bias, static_cast<E*>(y), D, eps);
    });
}

void embed(const int64_t* ids, const Matrices& table, void* y, int64_t T, int64_t type, Stream stream) {
    if (T == 0) return;
    if (table.count != 1) fail("embed", "the table must be packed from one matrix");
    with_type("embed", type, [&](auto e) {
        using E = decltype(e);
        launch("embed", embed_kernel<E>, dim3(static_cast<unsigned>(T)), kRowThreads, 0, stream, ids, table.part[0],
               static_cast<E*>(y));
    });
}

void epilogue(const void* product, const float* bias, int64_t activation, const void* residual, void* y, int64_t T,
              int64_t N, int64_t type, Stream stream) {
    if (T * N == 0) return;
    with_type("epilogue", type, [&](auto e) {
        using E = decltype(e);
        launch("epilogue", epilogue_kernel<E>, blocks_for(T * N, 256), 256, 0, stream, static_cast<const E*>(product),
               bias, activation, static_cast<const E*>(residual), static_cast<E*>(y), T, N);
    });
}

void glu(const void* product, void* y, int64_t T, int64_t I, int64_t type, Stream stream) {
    if (T * I == 0) return;
    with_type("glu", type, [&](auto e) {
        using E = decltype(e);
        launch("glu", glu_kernel<E>, blocks_for(T * I, 256), 256, 0, stream, static_cast<const E*>(product),
               static_cast<E*>(y), T, I);
    });
}

}  // namespace cuda
}  // namespace deltaic
