// What every kernel file needs: number types, vector loads, warp and block sums, tensor-core products, shared memory,
// launches. Under nvcc these are CUDA's own; under the host compiler they come from simt/simt.h, so a .cu file has no
// #if of its own.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <tuple>

#include "cuda/simt/simt.h"
#endif

#include "core/error.h"
#include "core/view.h"
#include "cuda/weight.h"

namespace deltaic {
namespace cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kNegativeInfinity = -1e30f;  // below every logit, and finite: differences of two of them stay numbers

enum class Type : int64_t { f32, bf16 };                        // element type of activations and K/V
enum class Activation : int64_t { none, gelu_tanh, gelu_erf };  // order fixed by python/deltaic/ops/cuda.py

// --- number types
// ------------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const __nv_bfloat16 y = __float2bfloat16_rn(x);
    return bf16{__bfloat16_as_ushort(y)};
#else
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// Two bfloat16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    return static_cast<uint32_t>(from_float<bf16>(low).bits) | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float x = __uint_as_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent bias, exactly
    return sign ? -x : x;
#endif
}

// --- loads and stores
// --------------------------------------------------------------------------------------------------------

// A vector access of sizeof(V) bytes at an address that must be a multiple of it.
template <class V, class T>
__device__ __forceinline__ V load_as(const T* p) {
#if !defined(__CUDACC__)
    simt::check_aligned(p, sizeof(V));
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
#else
    return *reinterpret_cast<const V*>(p);
#endif
}

// Eight neighbouring numbers as floats; T* must be aligned to 8 elements (16 bytes at most).
__device__ __forceinline__ void load8(const float* p, float (&x)[8]) {
    const float4 a = load_as<float4>(p), b = load_as<float4>(p + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void unpack8(uint4 v, float (&x)[8]) {
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
    x[4] = __uint_as_float(v.z << 16), x[5] = __uint_as_float(v.z & 0xffff0000u);
    x[6] = __uint_as_float(v.w << 16), x[7] = __uint_as_float(v.w & 0xffff0000u);
}
__device__ __forceinline__ void load8(const bf16* p, float (&x)[8]) { unpack8(load_as<uint4>(p), x); }

template <class V, class T>
__device__ __forceinline__ void store_as(T* p, V v) {
#if !defined(__CUDACC__)
    simt::check_aligned(p, sizeof(V));
    std::memcpy(p, &v, sizeof(V));
#else
    *reinterpret_cast<V*>(p) = v;
#endif
}
__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
    store_as(p, float4{x[0], x[1], x[2], x[3]}), store_as(p + 4, float4{x[4], x[5], x[6], x[7]});
}
__device__ __forceinline__ void store8(bf16* p, const float (&x)[8]) {
    store_as(p, uint4{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])});
}

// --- shared memory
// -----------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
template <class T>
using Shared = T*;
#define DELTAIC_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DELTAIC_DYNAMIC_SHARED(base) extern __shared__ __align__(16) unsigned char base[]
template <class T>
__device__ __forceinline__ T* carve(unsigned char* base, size_t byte_offset, size_t) {
    return reinterpret_cast<T*>(base + byte_offset);
}
template <class T>
__device__ __forceinline__ T* slice(T* array, int64_t first, int64_t) {
    return array + first;
}
template <class T>
__device__ __forceinline__ const T* shared_read(T* array, int64_t i, int64_t) {
    return array + i;
}
template <class T>
__device__ __forceinline__ T* shared_atomic(T* array, int64_t i) {
    return array + i;
}
#else
template <class T>
using Shared = simt::SharedArray<T>;
#define DELTAIC_SHARED(T, name, count) \
    const ::simt::SharedArray<T> name = ::simt::declare_shared<T>(__FILE__, __LINE__, count)
struct DynamicShared {};
#define DELTAIC_DYNAMIC_SHARED(base) \
    [[maybe_unused]] const DynamicShared base {}
template <class T>
Shared<T> carve(DynamicShared, size_t byte_offset, size_t count) {
    return simt::carve_dynamic<T>(byte_offset, count);
}
template <class T>
Shared<T> slice(Shared<T> array, int64_t first, int64_t count) {
    return array.slice(first, count);
}
template <class T>
const T* shared_read(Shared<T> array, int64_t i, int64_t count) {
    return array.at(i, count, false);
}
template <class T>
T* shared_atomic(Shared<T> array, int64_t i) {
    return array.raw(i);
}
#endif

// --- sums over a warp or a block
// -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
    return x;
}

// The sum over the block, in every thread. `scratch` has 32 floats; may be called again at once.
__device__ __forceinline__ float block_sum(float x, Shared<float> scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < warps; ++w) total += scratch[w];
    return total;
}

// --- functions of one number
// ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float activate(Activation kind, float x) {
    if (kind == Activation::gelu_tanh) {
        // x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
        return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    }
    if (kind == Activation::gelu_erf) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return x;
}

// --- tensor cores
// ------------------------------------------------------------------------------------------------------------------ A
// warp multiplies a 16 x K tile A by a K x 8 tile B and adds to a 16 x 8 tile of floats. With g = lane / 4 and t = lane
// % 4, a lane holds C(g, 2t), C(g, 2t+1), C(g+8, 2t), C(g+8, 2t+1). Which K a register stands for does not matter as
// long as A and B agree, and the kernels use that to load 16 bytes of a row per lane: see `fragments` in attention and
// linear.

// K = 16, bfloat16. a: rows g, g+8, g, g+8 at K 2t,2t+1 (first two) and 2t+8,2t+9; b: column g at K 2t,2t+1 and
// 2t+8,2t+9.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDACC__)
    // Turing has no bfloat16 product: the same sums through shuffles, correct and slow.
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < 16; ++k) {
        const int from = k % 8 / 2, high = k / 8, shift = k % 2 * 16;
        const uint32_t a_top = __shfl_sync(kAllLanes, high ? a[2] : a[0], g * 4 + from);
        const uint32_t a_bottom = __shfl_sync(kAllLanes, high ? a[3] : a[1], g * 4 + from);
        const uint32_t b_left = __shfl_sync(kAllLanes, high ? b[1] : b[0], 2 * t * 4 + from);
        const uint32_t b_right = __shfl_sync(kAllLanes, high ? b[1] : b[0], (2 * t + 1) * 4 + from);
        const float top = __uint_as_float(a_top >> shift << 16), bottom = __uint_as_float(a_bottom >> shift << 16);
        const float left = __uint_as_float(b_left >> shift << 16), right = __uint_as_float(b_right >> shift << 16);
        c[0] += top * left, c[1] += top * right, c[2] += bottom * left, c[3] += bottom * right;
    }
#else
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const uint8_t* all = simt::warp_collective(simt::Collective::mma, __FILE__, __LINE__, mine, sizeof mine);
    const auto element = [&](int lane, int reg, int half) {
        uint32_t word;
        std::memcpy(&word, all + lane * 32 + reg * 4, 4);
        return __uint_as_float(half ? word & 0xffff0000u : word << 16);
    };
    const int lane = simt::lane(), g = lane / 4, t = lane % 4;
    for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            c[i] += element(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) *
                    element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
#endif
}

// K = 8, float inputs of which the hardware reads 19 bits. a: (g, t), (g+8, t), (g, t+4), (g+8, t+4); b: (t, g), (t+4,
// g).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDACC__)
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
        const int from = k % 4, high = k / 4;
        const float top = __uint_as_float(__shfl_sync(kAllLanes, high ? a[2] : a[0], g * 4 + from));
        const float bottom = __uint_as_float(__shfl_sync(kAllLanes, high ? a[3] : a[1], g * 4 + from));
        const float left = __uint_as_float(__shfl_sync(kAllLanes, high ? b[1] : b[0], 2 * t * 4 + from));
        const float right = __uint_as_float(__shfl_sync(kAllLanes, high ? b[1] : b[0], (2 * t + 1) * 4 + from));
        c[0] += top * left, c[1] += top * right, c[2] += bottom * left, c[3] += bottom * right;
    }
#else
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const uint8_t* all = simt::warp_collective(simt::Collective::mma, __FILE__, __LINE__, mine, sizeof mine);
    const auto element = [&](int lane, int reg) {
        uint32_t word;
        std::memcpy(&word, all + lane * 32 + reg * 4, 4);
        return __uint_as_float(word & 0xffffe000u);
    };
    const int lane = simt::lane(), g = lane / 4, t = lane % 4;
    for (int k = 0; k < 8; ++k)
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            c[i] += element(row % 8 * 4 + k % 4, row / 8 + 2 * (k / 4)) * element(column * 4 + k % 4, 4 + k / 4);
        }
#endif
}

// K = 8 on floats with nearly float accuracy: x = high + low, and the product of the two low parts is left out.
__device__ __forceinline__ void mma_float(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a_high[i] = __float_as_uint(a[i]) & 0xffffe000u;
        a_low[i] = __float_as_uint(a[i] - __uint_as_float(a_high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        b_high[i] = __float_as_uint(b[i]) & 0xffffe000u;
        b_low[i] = __float_as_uint(b[i] - __uint_as_float(b_high[i]));
    }
    mma_tf32(c, a_low, b_high);
    mma_tf32(c, a_high, b_low);
    mma_tf32(c, a_high, b_high);
}

// --- the kernel before
// -----------------------------------------------------------------------------------------------------------------
// Kernels may be launched so that their blocks start while the kernel before still runs (see `launch`). A kernel
// therefore begins with grid_begin(), which returns when all that was written before can be seen; one that has
// something to do that depends on nothing, such as reading weights, does it between the two halves. Every kernel must
// come to grid_wait() in every thread: that it ends says that those before it have ended.
__device__ __forceinline__ void grid_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_begin() {
    grid_trigger();
    grid_wait();
}

// --- launches
// ------------------------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
[[noreturn]] void throw_cuda_error(const char* what, cudaError_t error);
extern bool overlap_kernels;  // whether a kernel's blocks may start before the kernel before has ended

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream,
            A... arguments) {
    if (shared > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) throw_cuda_error(name, error);
    }
    if (overlap_kernels) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
        const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
        if (error != cudaSuccess) throw_cuda_error(name, error);
        return;
    }
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw_cuda_error(name, error);
}
#else
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, A... arguments) {
    std::tuple<P...> values(static_cast<P>(arguments)...);
    auto call = [&] { std::apply(kernel, values); };
    std::apply(
        [&](const P&... value) {
            const simt::Argument list[] = {{&value, sizeof(P)}...};
            simt::run({name, reinterpret_cast<const void*>(kernel), grid, block, shared, list, sizeof...(P),
                       [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call});
        },
        values);
}
#endif

inline unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

// Calls `function` with a value of the element type.
template <class F>
void with_type(const char* op, int64_t type, F function) {
    switch (static_cast<Type>(type)) {
        case Type::f32:
            return function(float{});
        case Type::bf16:
            return function(bf16{});
    }
    fail(op, "unknown element type");
}

}  // namespace cuda
}  // namespace deltaic
