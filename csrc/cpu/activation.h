// Element-wise activations that are fused behind a matrix product.
#pragma once

#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

enum class Activation : int64_t { none, gelu_tanh, gelu_erf };  // order fixed by python/deltaic/ops/cpu.py

// 0.5 x (1 + tanh(u)) = x * sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3)
DELTAIC_INLINE f32x16 gelu_tanh(f32x16 x) {
    const f32x16 cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return mul(x, sigmoid(mul(cubic, set1(1.5957691216057308f))));
}

// 0.5 x (1 + erf(x / sqrt 2)) with the C library's erf: only the vision merger uses it.
DELTAIC_INLINE f32x16 gelu_erf(f32x16 x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678118654752f));
    return load(lanes);
}

DELTAIC_INLINE f32x16 activate(Activation kind, f32x16 x) {
    switch (kind) {
        case Activation::gelu_tanh:
            return gelu_tanh(x);
        case Activation::gelu_erf:
            return gelu_erf(x);
        default:
            return x;
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
