// THE list of CUDA entry points. Declarations and the Python binding follow from these lines; what an operator means is
// python/deltaic/ops/reference.py, and python/deltaic/ops/cuda.py says how operators are made of these.
//
// All pointers are device memory. `type` is enum Type of the activations x, y (f32 or bf16); T tokens. No entry point
// allocates, waits for the device, or reads device memory from the host: all can be captured into a graph. `states` and
// the like are arrays of addresses, one per sequence; so is `trace`, of one.
#pragma once

#include "cuda/weight.h"

#define DELTAIC_CUDA_OPS(X)                                                                                            \
    X(rms_norm,                                                                                                        \
      (const void* x, const float* weight, void* y, int64_t T, int64_t D, float eps, int64_t type, Stream stream))     \
    X(rms_norm_pair, (const void* a, const float* a_weight, const void* b, const float* b_weight, void* y, int64_t T,  \
                      int64_t D, float eps, int64_t type, Stream stream))                                              \
    X(layer_norm, (const void* x, const float* weight, const float* bias, void* y, int64_t T, int64_t D, float eps,    \
                   int64_t type, Stream stream))                                                                       \
    X(embed, (const int64_t* ids, const Matrices& table, void* y, int64_t T, int64_t type, Stream stream))             \
    X(epilogue, (const void* product, const float* bias, int64_t activation, const void* residual, void* y, int64_t T, \
                 int64_t N, int64_t type, Stream stream))                                                              \
    X(glu, (const void* product, void* y, int64_t T, int64_t I, int64_t type, Stream stream))                          \
    X(linear, (const void* x, const Matrices& w, const float* norm, float eps, const float* bias, int64_t activation,  \
               const void* residual, void* y, int64_t T, int64_t type, int64_t float_output, Stream stream))           \
    X(dequantise,                                                                                                      \
      (const Matrices& w, int64_t part, int64_t first, int64_t count, void* y, int64_t type, Stream stream))           \
    X(gated_delta_net,                                                                                                 \
      (const void* proj, const float* conv_weight, const float* A_log, const float* dt_bias, const float* norm,        \
       float eps, int64_t Hk, int64_t Hv, int64_t Dk, int64_t Dv, const int64_t* cu_seqlens,                           \
       const int64_t* conv_states, int64_t conv_offset, const int64_t* states, int64_t state_offset, float* c,         \
       float* o, float* chunks, const int64_t* trace, int64_t trace_offset, void* y, int64_t T, int64_t B,             \
       int64_t longest, int64_t type, Stream stream))                                                                  \
    X(gated_delta_net_commit, (const int64_t* trace, int64_t Hk, int64_t Hv, int64_t Dk, int64_t Dv,                   \
                               const int64_t* cu_seqlens, const int64_t* counts, const int64_t* conv_states,           \
                               const int64_t* states, int64_t L, int64_t T, int64_t B, Stream stream))                 \
    X(gated_attention,                                                                                                 \
      (const void* proj, const float* q_norm, const float* k_norm, const float* cosine, const float* sine, float eps,  \
       int64_t Hq, int64_t Hkv, int64_t D, int64_t half, const int64_t* cu_seqlens, const int64_t* starts,             \
       const int64_t* blocks, int64_t pitch, int64_t layer, int64_t block_tokens, void* q, float* sums, float* stats,  \
       int64_t splits, int64_t per_token, void* y, int64_t T, int64_t B, int64_t longest, int64_t type,                \
       int64_t kv_type, Stream stream))                                                                                \
    X(moe_route, (const float* logits, int64_t E, int64_t top_k, int64_t* experts, float* coefficients, int64_t T,     \
                  Stream stream))                                                                                      \
    X(moe_few, (const void* x, const float* norm, float eps, const Matrices& gate_up, const Matrices& down,            \
                const Matrices& shared_gate_up, const Matrices& shared_down, const int64_t* experts,                   \
                const float* coefficients, int64_t top_k, const void* residual, float* activation, int64_t pitch,      \
                void* y, int64_t T, int64_t type, Stream stream))                                                      \
    X(moe_group, (const int64_t* experts, int64_t entries, int64_t E, int64_t* sorted, int64_t* tiles,                 \
                  int64_t max_tiles, Stream stream))                                                                   \
    X(moe_grouped, (const void* x, int64_t pitch, int64_t per_row, const Matrices& w, const int64_t* sorted,           \
                    const int64_t* tiles, int64_t max_tiles, void* y, int64_t y_pitch, Stream stream))                 \
    X(moe_scatter, (const void* routed, const void* shared, const float* coefficients, int64_t top_k,                  \
                    const void* residual, void* y, int64_t T, int64_t H, Stream stream))                               \
    X(patches, (const uint8_t* image, int64_t grid_h, int64_t grid_w, int64_t patch, int64_t merge, float mean0,       \
                float mean1, float mean2, float std0, float std1, float std2, void* y, int64_t type, Stream stream))   \
    X(add_positions, (const float* table, int64_t side, int64_t grid_h, int64_t grid_w, int64_t merge, void* y,        \
                      int64_t V, int64_t type, Stream stream))                                                         \
    X(vision_attention, (const void* qkv, const float* cosine, const float* sine, const int64_t* cu_seqlens,           \
                         int64_t segments, int64_t longest, void* rotated, float* sums, float* stats, void* y,         \
                         int64_t P, int64_t heads, int64_t d, int64_t type, Stream stream))                            \
    X(count_tokens,                                                                                                    \
      (const int64_t* ids, int64_t count, const int64_t* seen, int64_t sequences, int64_t words, Stream stream))       \
    X(sample, (float* logits, int64_t rows, int64_t pitch, int64_t limit, const int64_t* unused, int64_t unused_count, \
               const int64_t* seen, int64_t sequences, int64_t words, const int64_t* cu_seqlens, const int64_t* fed,   \
               int64_t skipped, float presence, float frequency, float repetition, float temperature, int64_t top_k,   \
               double top_p, double min_p, const int64_t* draws, float* values, int64_t* ids, int64_t room,            \
               int64_t* tokens, Stream stream))                                                                        \
    X(relocate, (const int64_t* jobs, int64_t count, int64_t longest, Stream stream))

namespace deltaic {
namespace cuda {

#define X(name, arguments) void name arguments;
DELTAIC_CUDA_OPS(X)
#undef X

// Whether products of a few bfloat16 rows use tensor cores, which need compute capability 8.0. True at first.
void use_tensor_cores(bool use);

// How much room the callers must give.
int64_t gated_delta_net_chunk_floats(int64_t Hv, int64_t Dk, int64_t Dv, int64_t B, int64_t longest);
int64_t moe_max_tiles(int64_t entries, int64_t E);

}  // namespace cuda
}  // namespace deltaic
