// Integer dot products on the int8 and int4 layouts (core/view.h). Activations are quantised per token and run of 128
// columns to int8; all sums inside a run are exact integers, so every instruction set, and every way to split the work,
// gives the same bits.
#pragma once

#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

// Rows of activations, as plain floats and, where a quantised matrix reads them, as int8.
struct Activations {
    int64_t T = 0, K = 0;
    const float* x = nullptr;            // [T][K]
    int64_t runs = 0;                    // ceil(K / 128)
    const int8_t* q = nullptr;           // [T][runs * 128], x ~ scale * q
    const float* scale = nullptr;        // [T][runs]
    const int32_t* run_sum = nullptr;    // [T][runs] sum of q
    const int32_t* group_sum = nullptr;  // [T][runs * 8]

    DELTAIC_INLINE Activations rows(int64_t first, int64_t count) const {
        Activations a = *this;
        a.T = count;
        a.x += first * K;
        if (q)
            a.q += first * runs * kRun, a.scale += first * runs, a.run_sum += first * runs,
                a.group_sum += first * runs * 8;
        return a;
    }
};

// Scratch memory for T rows of K columns. Calling thread only.
DELTAIC_INLINE Activations scratch_activations(int64_t T, int64_t K, bool floats, bool integers) {
    Activations a;
    a.T = T, a.K = K, a.runs = ceil_div(K, kRun);
    if (floats) a.x = scratch_f32(T * K);
    if (integers) {
        a.q = static_cast<int8_t*>(scratch(static_cast<size_t>(T * a.runs * kRun)));
        a.scale = scratch_f32(T * a.runs);
        a.run_sum = static_cast<int32_t*>(scratch(static_cast<size_t>(T * a.runs) * 4));
        a.group_sum = static_cast<int32_t*>(scratch(static_cast<size_t>(T * a.runs * 8) * 4));
    }
    return a;
}

// Copies row `from` of `source` to row `to` of `target`, whose arrays are writable memory of the same form.
DELTAIC_INLINE void copy_row(const Activations& source, int64_t from, const Activations& target, int64_t to) {
    const int64_t runs = source.runs;
    memcpy(const_cast<float*>(target.x) + to * source.K, source.x + from * source.K, static_cast<size_t>(source.K) * 4);
    if (!source.q) return;
    memcpy(const_cast<int8_t*>(target.q) + to * runs * kRun, source.q + from * runs * kRun,
           static_cast<size_t>(runs * kRun));
    memcpy(const_cast<float*>(target.scale) + to * runs, source.scale + from * runs, static_cast<size_t>(runs) * 4);
    memcpy(const_cast<int32_t*>(target.run_sum) + to * runs, source.run_sum + from * runs,
           static_cast<size_t>(runs) * 4);
    memcpy(const_cast<int32_t*>(target.group_sum) + to * runs * 8, source.group_sum + from * runs * 8,
           static_cast<size_t>(runs) * 32);
}

DELTAIC_INLINE int32_t load_i32(const void* p) {
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

// --- the two integer products that differ between instruction sets
// ----------------------------------------------------------- dot4: acc[lane] += sum over 4 bytes of (w[lane] - 128) *
// a, except that kBias * sum(a) may be left for the caller to subtract. dot16: acc[lane] += sum over 16 columns of
// nibble * a; w is a group of two lines.

#if defined(__AVX512VNNI__)
constexpr int32_t kBias = 128;
template <int NB, int NT>
DELTAIC_INLINE void dot4(const uint8_t* const (&w)[NB], const int8_t* a, int64_t a_stride, i32x16 (&acc)[NB][NT]) {
    ivec wb[NB];
    for (int b = 0; b < NB; ++b) wb[b] = i_load(w[b]);
    for (int t = 0; t < NT; ++t) {
        const ivec at = i_set1(load_i32(a + t * a_stride));
        for (int b = 0; b < NB; ++b) acc[b][t].part[0] = _mm512_dpbusd_epi32(acc[b][t].part[0], wb[b], at);
    }
}
template <int NT>
DELTAIC_INLINE void dot16(const uint8_t* w, const int8_t* a, int64_t a_stride, i32x16 (&acc)[NT]) {
    const ivec low = _mm512_set1_epi8(15);
    const ivec line0 = i_load(w), line1 = i_load(w + 64);
    const ivec quads[4] = {_mm512_and_si512(line0, low), _mm512_and_si512(_mm512_srli_epi16(line0, 4), low),
                           _mm512_and_si512(line1, low), _mm512_and_si512(_mm512_srli_epi16(line1, 4), low)};
    for (int t = 0; t < NT; ++t)
        for (int j = 0; j < 4; ++j)
            acc[t].part[0] = _mm512_dpbusd_epi32(acc[t].part[0], quads[j], i_set1(load_i32(a + t * a_stride + 4 * j)));
}
#elif defined(__AVX2__)
constexpr int32_t kBias = 0;
// vpmaddubsw saturates, so the sign moves from the weight to the activation: |w| <= 128, |a| <= 127, two products fit
// 16 bits.
template <int NB, int NT>
DELTAIC_INLINE void dot4(const uint8_t* const (&w)[NB], const int8_t* a, int64_t a_stride, i32x16 (&acc)[NB][NT]) {
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(static_cast<char>(0x80));
    for (int b = 0; b < NB; ++b)
        for (int i = 0; i < kParts; ++i) {
            const __m256i wi = _mm256_xor_si256(i_load(w[b] + 32 * i), flip), magnitude = _mm256_abs_epi8(wi);
            for (int t = 0; t < NT; ++t) {
                const __m256i at = _mm256_sign_epi8(i_set1(load_i32(a + t * a_stride)), wi);
                acc[b][t].part[i] =
                    i_add(acc[b][t].part[i], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, at), ones));
            }
        }
}
// Nibbles are below 16: four quads (15 * 127 * 2 * 4 = 15240) are added in 16 bits before widening.
template <int NT>
DELTAIC_INLINE void dot16(const uint8_t* w, const int8_t* a, int64_t a_stride, i32x16 (&acc)[NT]) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < kParts; ++i) {
        const __m256i line0 = i_load(w + 32 * i), line1 = i_load(w + 64 + 32 * i);
        const __m256i quads[4] = {_mm256_and_si256(line0, low), _mm256_and_si256(_mm256_srli_epi16(line0, 4), low),
                                  _mm256_and_si256(line1, low), _mm256_and_si256(_mm256_srli_epi16(line1, 4), low)};
        for (int t = 0; t < NT; ++t) {
            __m256i sum = _mm256_maddubs_epi16(quads[0], i_set1(load_i32(a + t * a_stride)));
            for (int j = 1; j < 4; ++j)
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quads[j], i_set1(load_i32(a + t * a_stride + 4 * j))));
            acc[t].part[i] = i_add(acc[t].part[i], _mm256_madd_epi16(sum, ones));
        }
    }
}
#elif defined(__aarch64__) && !defined(DELTAIC_PORTABLE)
constexpr int32_t kBias = 0;
DELTAIC_INLINE ivec neon_dot(ivec acc, int8x16_t w, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, w, a);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
template <int NB, int NT>
DELTAIC_INLINE void dot4(const uint8_t* const (&w)[NB], const int8_t* a, int64_t a_stride, i32x16 (&acc)[NB][NT]) {
    int8x16_t at[NT];
    for (int t = 0; t < NT; ++t) at[t] = vreinterpretq_s8_s32(vdupq_n_s32(load_i32(a + t * a_stride)));
    for (int b = 0; b < NB; ++b)
        for (int i = 0; i < kParts; ++i) {
            const int8x16_t wi = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w[b] + 16 * i), vdupq_n_u8(0x80)));
            for (int t = 0; t < NT; ++t) acc[b][t].part[i] = neon_dot(acc[b][t].part[i], wi, at[t]);
        }
}
template <int NT>
DELTAIC_INLINE void dot16(const uint8_t* w, const int8_t* a, int64_t a_stride, i32x16 (&acc)[NT]) {
    for (int i = 0; i < kParts; ++i) {
        const uint8x16_t line0 = vld1q_u8(w + 16 * i), line1 = vld1q_u8(w + 64 + 16 * i), low = vdupq_n_u8(15);
        const int8x16_t quads[4] = {
            vreinterpretq_s8_u8(vandq_u8(line0, low)), vreinterpretq_s8_u8(vshrq_n_u8(line0, 4)),
            vreinterpretq_s8_u8(vandq_u8(line1, low)), vreinterpretq_s8_u8(vshrq_n_u8(line1, 4))};
        for (int t = 0; t < NT; ++t)
            for (int j = 0; j < 4; ++j)
                acc[t].part[i] = neon_dot(acc[t].part[i], quads[j],
                                          vreinterpretq_s8_s32(vdupq_n_s32(load_i32(a + t * a_stride + 4 * j))));
    }
}
#else
constexpr int32_t kBias = 0;
template <int NB, int NT>
DELTAIC_INLINE void dot4(const uint8_t* const (&w)[NB], const int8_t* a, int64_t a_stride, i32x16 (&acc)[NB][NT]) {
    for (int b = 0; b < NB; ++b)
        for (int t = 0; t < NT; ++t)
            for (int lane = 0; lane < 16; ++lane) {
                int32_t sum = 0;
                for (int j = 0; j < 4; ++j) sum += (w[b][4 * lane + j] - 128) * a[t * a_stride + j];
                acc[b][t].part[lane / kWidth][lane % kWidth] += sum;
            }
}
template <int NT>
DELTAIC_INLINE void dot16(const uint8_t* w, const int8_t* a, int64_t a_stride, i32x16 (&acc)[NT]) {
    for (int t = 0; t < NT; ++t)
        for (int lane = 0; lane < 16; ++lane) {
            int32_t sum = 0;
            for (int line = 0; line < 2; ++line)
                for (int j = 0; j < 4; ++j) {
                    const int32_t byte = w[64 * line + 4 * lane + j];
                    const int8_t* at = a + t * a_stride + 8 * line + j;
                    sum += (byte & 15) * at[0] + (byte >> 4) * at[4];
                }
            acc[t].part[lane / kWidth][lane % kWidth] += sum;
        }
}
#endif

// --- products of blocks of 16 rows with NT tokens
// ----------------------------------------------------------------------------

template <int NB, int NT>
DELTAIC_INLINE void tile_int8(const uint8_t* w, int64_t block_stride, const Activations& a, f32x16 (&acc)[NB][NT]) {
    const int64_t q_stride = a.runs * kRun;
    for (int64_t run = 0; run < a.runs; ++run) {
        i32x16 sum[NB][NT];
        for (int t = 0; t < NT; ++t)
            for (int b = 0; b < NB; ++b) sum[b][t] = set1(kBias == 0 ? 0 : -kBias * a.run_sum[t * a.runs + run]);
        for (int quad = 0; quad < kRun / 4; ++quad) {
            const uint8_t* p[NB];
            for (int b = 0; b < NB; ++b) p[b] = w + b * block_stride + run * 2048 + quad * 64;
            if (NT == 1)  // the same place in the next blocks
                for (int b = 0; b < NB; ++b) prefetch_far(p[b] + NB * block_stride);
            dot4<NB, NT>(p, a.q + run * kRun + quad * 4, q_stride, sum);
        }
        for (int b = 0; b < NB; ++b) {
            const f32x16 d =
                load_f16(reinterpret_cast<const uint16_t*>(w + b * block_stride + a.runs * 2048) + run * 16);
            for (int t = 0; t < NT; ++t)
                acc[b][t] = fma(mul(to_float(sum[b][t]), set1(a.scale[t * a.runs + run])), d, acc[b][t]);
        }
    }
}

template <int NB, int NT>
DELTAIC_INLINE void tile_int4(const uint8_t* w, int64_t block_stride, const Activations& a, f32x16 (&acc)[NB][NT]) {
    const int64_t q_stride = a.runs * kRun;
    for (int64_t run = 0; run < a.runs; ++run)
        for (int b = 0; b < NB; ++b) {
            const uint8_t* lines = w + b * block_stride + run * 1024;
            const uint8_t* scales = w + b * block_stride + a.runs * 1024 + run * 64;
            if (NT == 1) prefetch_far(scales + NB * block_stride);
            f32x16 sum[NT];  // integers below 2^24: exact
            for (int t = 0; t < NT; ++t) sum[t] = zero();
            for (int g = 0; g < 8; ++g) {
                i32x16 s = load_u8(scales + g / 2 * 16), dot[NT];
                for (int i = 0; i < kParts; ++i)
                    s.part[i] = i_add(g % 2 ? i_shr<4>(s.part[i]) : i_and(s.part[i], i_set1(15)), i_set1(1));
                if (NT == 1)
                    prefetch_far(lines + g * 128 + NB * block_stride),
                        prefetch_far(lines + g * 128 + 64 + NB * block_stride);
                for (int t = 0; t < NT; ++t) dot[t] = set1(-8 * a.group_sum[(t * a.runs + run) * 8 + g]);
                dot16<NT>(lines + g * 128, a.q + run * kRun + g * kGroup, q_stride, dot);
                for (int t = 0; t < NT; ++t) sum[t] = fma(to_float(dot[t]), to_float(s), sum[t]);
            }
            const f32x16 d =
                load_f16(reinterpret_cast<const uint16_t*>(w + b * block_stride + a.runs * 1088) + run * 16);
            for (int t = 0; t < NT; ++t) acc[b][t] = fma(mul(sum[t], set1(a.scale[t * a.runs + run])), d, acc[b][t]);
        }
}

// An int4 block as an int8 block (s multiplied in), for many tokens: the same integers, so the same results.
DELTAIC_INLINE void expand_int4(const uint8_t* w, int64_t runs, uint8_t* out) {
    for (int64_t run = 0; run < runs; ++run)
        for (int g = 0; g < 8; ++g) {
            const uint8_t* lines = w + run * 1024 + g * 128;
            const uint8_t* scales = w + runs * 1024 + run * 64 + g / 2 * 16;
            uint8_t* quads = out + run * 2048 + g * 256;
#if defined(__AVX512F__)
            const ivec packed = i_load_u8(scales);
            ivec s = i_add(g % 2 ? _mm512_srli_epi32(packed, 4) : i_and(packed, i_set1(15)), i_set1(1));
            s = _mm512_or_si512(s, _mm512_slli_epi32(s, 16));  // the row's scale in both 16-bit halves of its lane
            const ivec low = _mm512_set1_epi8(15), even = _mm512_set1_epi16(0xff),
                       flip = _mm512_set1_epi8(static_cast<char>(0x80));
            for (int j = 0; j < 4; ++j) {
                const ivec line = i_load(lines + j / 2 * 64);
                const ivec value = _mm512_sub_epi8(_mm512_and_si512(j % 2 ? _mm512_srli_epi16(line, 4) : line, low),
                                                   _mm512_set1_epi8(8));
                const ivec first = _mm512_mullo_epi16(value, s);  // low byte: even columns times s
                const ivec second = _mm512_mullo_epi16(_mm512_srai_epi16(value, 8), s);
                const ivec both = _mm512_or_si512(_mm512_and_si512(first, even), _mm512_slli_epi16(second, 8));
                _mm512_storeu_si512(quads + j * 64, _mm512_xor_si512(both, flip));
            }
#else
            for (int j = 0; j < 4; ++j)
                for (int r = 0; r < 16; ++r) {
                    const int s = (g % 2 ? scales[r] >> 4 : scales[r] & 15) + 1;
                    for (int c = 0; c < 4; ++c) {
                        const int byte = lines[j / 2 * 64 + 4 * r + c];
                        quads[j * 64 + 4 * r + c] =
                            static_cast<uint8_t>(((j % 2 ? byte >> 4 : byte & 15) - 8) * s + 128);
                    }
                }
#endif
        }
    memcpy(out + runs * 2048, w + runs * 1088, static_cast<size_t>(runs) * 32);
}

// Column k of row `lane` of an int8 or int4 block, as a number.
DELTAIC_INLINE float element_int8(const uint8_t* w, int64_t runs, int64_t k, int64_t lane) {
    const uint16_t* d = reinterpret_cast<const uint16_t*>(w + runs * 2048);
    return f16_to_float(d[k / kRun * 16 + lane]) * static_cast<float>(w[k / 4 * 64 + lane * 4 + k % 4] - 128);
}
DELTAIC_INLINE float element_int4(const uint8_t* w, int64_t runs, int64_t k, int64_t lane) {
    const int64_t run = k / kRun, g = k % kRun / kGroup, quad = k % kGroup / 4;
    const int byte = w[run * 1024 + g * 128 + quad / 2 * 64 + lane * 4 + k % 4],
              scales = w[runs * 1024 + run * 64 + g / 2 * 16 + lane];
    const int value = (quad % 2 ? byte >> 4 : byte & 15) - 8, s = (g % 2 ? scales >> 4 : scales & 15) + 1;
    const uint16_t* d = reinterpret_cast<const uint16_t*>(w + runs * 1088);
    return f16_to_float(d[run * 16 + lane]) * static_cast<float>(s * value);
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
