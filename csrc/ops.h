// THE list of operators. Declarations, the table of each instruction set, the Python binding and the argument checks
// all follow from these lines. The meaning of each operator is python/deltaic/ops/reference.py.
//
// Contract: one entry per argument, separated by ';'. `name type[dims]`, where type is
//   f32, u8, u16, i64      an array; `kv` is f32 or u16 (bfloat16 bits)
//   weight                 a packed matrix [N,K] or [E,N,K]
//   table                  a BlockTable
//   int, float, double     a number; an int may be used as a size
// After the type: `?` may be None, `!` is written to, `*B` is a list of B of them.  Equal names mean equal sizes; sums
// of products are allowed once every name in them is known; `_` is any size.
#pragma once

#include "core/view.h"

#define DELTAIC_OPS(X)                                                                                                 \
    X(pack, "source kv[N,K]; format int; first int; step int; packed u8![_]",                                          \
      (View source, int64_t format, int64_t first, int64_t step, View packed))                                         \
    X(embed, "ids i64[T]; table weight[V,H]; y f32![T,H]", (View ids, const Weight& table, View y))                    \
    X(rms_norm, "x f32[T,D]; weight f32[D]; eps float; y f32![T,D]", (View x, View weight, float eps, View y))         \
    X(rms_norm_pair, "a f32[T,D]; a_weight f32[D]; b f32[T,D]; b_weight f32[D]; eps float; y f32![T,2*D]",             \
      (View a, View a_weight, View b, View b_weight, float eps, View y))                                               \
    X(layer_norm, "x f32[T,D]; weight f32[D]; bias f32[D]; eps float; y f32![T,D]",                                    \
      (View x, View weight, View bias, float eps, View y))                                                             \
    X(linear,                                                                                                          \
      "x f32[T,K]; w weight[N,K]; norm f32?[K]; eps float; bias f32?[N]; activation int; residual f32?[T,N]; "         \
      "y f32![T,N]",                                                                                                   \
      (View x, const Weight& w, View norm, float eps, View bias, int64_t activation, View residual, View y))           \
    X(swiglu, "x f32[T,K]; w weight[2*I,K]; norm f32?[K]; eps float; y f32![T,I]",                                     \
      (View x, const Weight& w, View norm, float eps, View y))                                                         \
    X(gated_attention,                                                                                                 \
      "proj f32[T,2*num_heads*D+2*num_kv_heads*D]; q_norm f32[D]; k_norm f32[D]; cos f32[T,F]; sin f32[T,F]; "         \
      "eps float; num_heads int; num_kv_heads int; layer int; cu_seqlens i64[B+1]; starts i64[B]; tables table*B; "    \
      "prefill int; y f32![T,num_heads*D]",                                                                            \
      (View proj, View q_norm, View k_norm, View cos, View sin, float eps, int64_t num_heads, int64_t num_kv_heads,    \
       int64_t layer, View cu_seqlens, View starts, Tables tables, int64_t prefill, View y))                           \
    X(patch_embed,                                                                                                     \
      "image u8[h,w,3]; weight weight[V,K]; bias f32[V]; pos_embed f32[S,V]; patch_size int; merge_size int; "         \
      "mean f32[3]; std f32[3]; y f32![P,V]",                                                                          \
      (View image, const Weight& weight, View bias, View pos_embed, int64_t patch_size, int64_t merge_size, View mean, \
       View std, View y))                                                                                              \
    X(vision_attention,                                                                                                \
      "qkv f32[P,3*V]; cos f32[P,F]; sin f32[P,F]; num_heads int; cu_seqlens i64[_]; rounded int; y f32![P,V]",        \
      (View qkv, View cos, View sin, int64_t num_heads, View cu_seqlens, int64_t rounded, View y))                     \
    X(gated_delta_net,                                                                                                 \
      "proj f32[T,2*Hk*Dk+2*Hv*Dv+2*Hv]; conv_weight f32[4,2*Hk*Dk+Hv*Dv]; A_log f32[Hv]; dt_bias f32[Hv]; "           \
      "norm f32[Dv]; eps float; Hk int; Dk int; cu_seqlens i64[B+1]; conv_states f32!*B[3,2*Hk*Dk+Hv*Dv]; "            \
      "states f32!*B[Hv,Dk,Dv]; trace f32?![T,3*Hk*Dk+2*Hv*Dv+Hv]; y f32![T,Hv*Dv]",                                   \
      (View proj, View conv_weight, View A_log, View dt_bias, View norm, float eps, int64_t Hk, int64_t Dk,            \
       View cu_seqlens, Views conv_states, Views states, View trace, View y))                                          \
    X(gated_delta_net_commit,                                                                                          \
      "trace f32[L,T,3*Hk*Dk+2*Hv*Dv+Hv]; Hk int; cu_seqlens i64[B+1]; counts i64[B]; "                                \
      "conv_states f32!*B[L,3,2*Hk*Dk+Hv*Dv]; states f32!*B[L,Hv,Dk,Dv]",                                              \
      (View trace, int64_t Hk, View cu_seqlens, View counts, Views conv_states, Views states))                         \
    X(moe,                                                                                                             \
      "x f32[T,H]; router weight[E,H]; gate_up weight[E,2*I,H]; down weight[E,H,I]; shared_gate_up weight[2*Is,H]; "   \
      "shared_down weight[H,Is]; shared_gate weight[1,H]; norm f32[H]; eps float; top_k int; residual f32?[T,H]; "     \
      "y f32![T,H]",                                                                                                   \
      (View x, const Weight& router, const Weight& gate_up, const Weight& down, const Weight& shared_gate_up,          \
       const Weight& shared_down, const Weight& shared_gate, View norm, float eps, int64_t top_k, View residual,       \
       View y))                                                                                                        \
    X(pack_screen, "head weight[N,K]; dither f32[K]; sketch u8![_]; bounds f32![_,2]",                                 \
      (const Weight& head, View dither, View sketch, View bounds))                                                     \
    X(linear_top,                                                                                                      \
      "x f32[T,K]; head weight[N,K]; sketch weight[N,K]; dither f32[K]; bounds f32[_,2]; history i64![2]; "            \
      "norm f32?[K]; eps float; k int; presence_penalty double; frequency_penalty double; repetition_penalty double; " \
      "limit int; unused i64[u]; seen i64*B[65,R]; cu_seqlens i64[_]; fed i64[_]; y f32![T,N]",                        \
      (View x, const Weight& head, const Weight& sketch, View dither, View bounds, View history, View norm, float eps, \
       int64_t k, double presence_penalty, double frequency_penalty, double repetition_penalty, int64_t limit,         \
       View unused, Views seen, View cu_seqlens, View fed, View y))                                                    \
    X(count_tokens, "ids i64[B,S]; seen i64!*B[65,R]", (View ids, Views seen))                                         \
    X(sample_rows,                                                                                                     \
      "logits f32![T,V]; temperature double; top_k int; top_p double; min_p double; presence_penalty double; "         \
      "frequency_penalty double; repetition_penalty double; limit int; unused i64[u]; draws i64[T]; "                  \
      "seen i64*B[65,R]; cu_seqlens i64[_]; fed i64[_]; tokens i64![T]",                                               \
      (View logits, double temperature, int64_t top_k, double top_p, double min_p, double presence_penalty,            \
       double frequency_penalty, double repetition_penalty, int64_t limit, View unused, View draws, Views seen,        \
       View cu_seqlens, View fed, View tokens))                                                                        \
    X(log_softmax_top,                                                                                                 \
      "logits f32[V]; limit int; k int; token int; logprob f32![1]; top_ids i64![k]; top_logprobs f32![k]",            \
      (View logits, int64_t limit, int64_t k, int64_t token, View logprob, View top_ids, View top_logprobs))           \
    X(bpe_merge, "ids i64[n]; begins i64[p]; slots i64[s]; pairs i64[m]; merged i64[m]; out i64![n]; count i64![1]",   \
      (View ids, View begins, View slots, View pairs, View merged, View out, View count))                              \
    X(checksum, "data u8[_]; first int; sum i64![1]", (View data, int64_t first, View sum))                            \
    X(probe_read, "data u8[_]; sum i64![1]", (View data, View sum))                                                    \
    X(probe_peak, "kind int; rounds int; operations i64![1]", (int64_t kind, int64_t rounds, View operations))

namespace deltaic {

struct Ops {
#define X(name, contract, arguments) void(*name) arguments;
    DELTAIC_OPS(X)
#undef X
};

}  // namespace deltaic
