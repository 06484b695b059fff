// THE list of CUDA entry points. Declarations and the Python binding follow from these lines; what an operator means is
// python/deltaic/ops/reference.py, and python/deltaic/ops/cuda.py says how operators are made of these.
//
// All pointers are device memory. `type` is enum Type of the activations x, y (f32 or bf16); T tokens. No entry point allocates,
// waits for the device, or reads device memory from the host: all can be captured into a graph.
#pragma once

#include "cuda/weight.h"

#define DELTAIC_CUDA_OPS(X)                                                                                                             \
    X(rms_norm, (const void* x, const float* weight, void* y, int64_t T, int64_t D, float eps, int64_t type, Stream stream))            \
    X(layer_norm, (const void* x, const float* weight, const float* bias, void* y, int64_t T, int64_t D, float eps, int64_t type,       \
                   Stream stream))                                                                                                      \
    X(embed, (const int64_t* ids, const Matrices& table, void* y, int64_t T, int64_t type, Stream stream))                              \
    X(rope_table, (const int64_t* positions, const float* frequencies, const int64_t* axes, float scale, float* cosine, float* sine,    \
                   int64_t T, int64_t F, Stream stream))                                                                                \
    X(epilogue, (const void* product, const float* bias, int64_t activation, const void* residual, void* y, int64_t T, int64_t N,       \
                 int64_t type, Stream stream))                                                                                          \
    X(glu, (const void* product, void* y, int64_t T, int64_t I, int64_t type, Stream stream))                                           \
    X(linear, (const void* x, const Matrices& w, const float* norm, float eps, const float* bias, int64_t activation,                   \
               const void* residual, void* y, int64_t T, int64_t type, int64_t float_output, Stream stream))                            \
    X(dequantise, (const Matrices& w, int64_t part, int64_t first, int64_t count, void* y, int64_t type, Stream stream))

namespace deltaic {
namespace cuda {

#define X(name, arguments) void name arguments;
DELTAIC_CUDA_OPS(X)
#undef X

}  // namespace cuda
}  // namespace deltaic
