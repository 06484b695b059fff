// The register tiles of every weight format, and what turns one format into another on the way.
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

template <int NB, int NT>
void multiply_tile(Format format, const uint8_t* w, int64_t stride, const Activations& a, float* out) {
    f32x16 acc[NB][NT];
    for (int b = 0; b < NB; ++b)
        for (int t = 0; t < NT; ++t) acc[b][t] = zero();
    switch (format) {
        case Format::f32:
            tile_f32<NB, NT>(reinterpret_cast<const float*>(w), stride / 4, 16, a.x, a.K, a.K, acc);
            break;
        case Format::bf16:
            tile_bf16<NB, NT>(w, stride, a.x, a.K, a.K, acc);
            break;
        case Format::int8:
            tile_int8<NB, NT>(w, stride, a, acc);
            break;
        case Format::int4:
            tile_int4<NB, NT>(w, stride, a, acc);
            break;
    }
    for (int t = 0; t < NT; ++t)
        for (int b = 0; b < 2; ++b) store(out + t * 32 + b * 16, b < NB ? acc[b < NB ? b : 0][t] : zero());
}

template <int NB>
void multiply(Format format, const uint8_t* w, int64_t stride, const Activations& a, float* out) {
    int64_t t = 0;
    if constexpr (kTileTokens >= 12) {
        for (; t + 12 <= a.T; t += 12) multiply_tile<NB, 12>(format, w, stride, a.rows(t, 12), out + t * 32);
        for (; t + 6 <= a.T; t += 6) multiply_tile<NB, 6>(format, w, stride, a.rows(t, 6), out + t * 32);
    }
    if constexpr (kTileTokens >= 2) {
        for (; t + 2 <= a.T; t += 2) multiply_tile<NB, 2>(format, w, stride, a.rows(t, 2), out + t * 32);
    }
    for (; t < a.T; ++t) multiply_tile<NB, 1>(format, w, stride, a.rows(t, 1), out + t * 32);
}

}  // namespace

void multiply_blocks(Format format, int blocks, const uint8_t* w, int64_t stride, const Activations& a, float* out) {
    if (blocks == 2) {
        multiply<2>(format, w, stride, a, out);
    } else {
        multiply<1>(format, w, stride, a, out);
    }
}

void expand_block(Format stored, Format working, const uint8_t* w, int64_t K, uint8_t* out) {
    const int64_t runs = ceil_div(K, kRun);
    if (working == Format::int8) return expand_int4(w, runs, out);
    float* y = reinterpret_cast<float*>(out);
    for (int64_t k = 0; k < K; ++k)
        for (int64_t lane = 0; lane < 16; ++lane)
            y[k * 16 + lane] = stored == Format::int8 ? element_int8(w, runs, k, lane) : element_int4(w, runs, k, lane);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
