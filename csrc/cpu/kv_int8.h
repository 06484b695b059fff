// Attention of a few query rows over int8 keys and values in integer arithmetic, where bytes can be multiplied and
// added four at a time: stored numbers are used as they are, and cost no conversion.
//
// What they meet is split in two bytes, n = 256 high + low: a query row in steps of its largest number / 32639, and the
// weights (probability * scale of the value) of kIntegerKeys keys in steps of the largest / 65535. That is finer than
// bfloat16. All sums within a group of 64 numbers, or within kIntegerKeys keys, are exact.
#pragma once

#include "cpu/kv_cache.h"

namespace deltaic {
namespace DELTAIC_ISA {

#if defined(DELTAIC_BYTE_PAIRS)

constexpr int64_t kIntegerKeys = 64;  // keys that share the steps of their weights

// Query rows of the integer products: high [width], low [width] (int8), then for each group of 64 numbers -128 times
// the sum of n, then the step.
struct IntegerRow {
    static DELTAIC_INLINE int64_t width(int64_t D) { return round_up(D, kKvGroup); }
    static DELTAIC_INLINE int64_t bytes(int64_t D) { return round_up(2 * width(D) + width(D) / kKvGroup * 4 + 4, 64); }

    const uint8_t* row;
    int64_t D;
    DELTAIC_INLINE ivec high(int64_t i) const { return i_set1(load_i32(row + i)); }  // of numbers i .. i + 3
    DELTAIC_INLINE ivec low(int64_t i) const { return i_set1(load_i32(row + width(D) + i)); }
    DELTAIC_INLINE int32_t bias(int64_t group) const { return load_i32(row + 2 * width(D) + 4 * group); }
    DELTAIC_INLINE float step() const { return bits_to_float(static_cast<uint32_t>(bias(width(D) / kKvGroup))); }

    // x [D] * factor. x is read in whole vectors: zero from D on.
    static DELTAIC_INLINE void store(uint8_t* row, const float* x, float factor, int64_t D) {
        const int64_t groups = width(D) / kKvGroup;
        __m512i largest = _mm512_setzero_si512();  // of the bits without sign: a NaN stays
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        for (int64_t d = 0; d < D; d += 16)
            largest = _mm512_max_epu32(largest, _mm512_and_si512(as_int(load_n(x + d, D - d).part[0]), magnitude));
        const float amax = bits_to_float(_mm512_reduce_max_epu32(largest)) * factor;
        const vec inverse = v_set1(amax > 1e-30f ? 32639.0f / amax * factor : 0.0f);
        for (int64_t g = 0; g < groups; ++g) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t d = g * kKvGroup; d < (g + 1) * kKvGroup; d += 16) {
                const __m512i n = v_round(v_mul(load_n(x + d, max64(0, D - d)).part[0], inverse));
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(row + d), _mm512_cvtepi32_epi8(high));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(row + width(D) + d), _mm512_cvtepi32_epi8(n));
                sum = _mm512_add_epi32(sum, n);
            }
            const int32_t bias = -128 * _mm512_reduce_add_epi32(sum);
            memcpy(row + 2 * width(D) + 4 * g, &bias, 4);
        }
        const float step = amax / 32639.0f;
        memcpy(row + 2 * width(D) + 4 * groups, &step, 4);
    }
};

// Bytes of group g of a stored row of D numbers; zero past the end.
DELTAIC_INLINE __m512i load_group(const uint8_t* row, int64_t g, int64_t D) {
    const uint8_t* values = row + g * (kKvGroup + 2) + 2;
    const int64_t n = D - g * kKvGroup;
    return n >= kKvGroup ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, values);
}

// Rows k .. k + N - 1 of a run, N a multiple of 16; its last one again beyond it. Their scales go to
// halves [groups][kIntegerKeys], by plain moves, of which a core has many to spare.
template <int64_t N>
DELTAIC_INLINE void find_rows(const RunRows& run, int64_t k, int64_t groups, const uint8_t* (&rows)[N],
                              uint16_t* halves) {
    for (int64_t i = 0; i < N; i += 16) run.get(k + i, rows + i);
    for (int64_t i = 0; i < N; ++i)
        for (int64_t g = 0; g < groups; ++g) memcpy(halves + g * kIntegerKeys + i, rows[i] + g * (kKvGroup + 2), 2);
}

// Two-byte numbers from the sums of their bytes.
DELTAIC_INLINE ivec join(ivec high, ivec low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

// Work space of one thread, in bytes from the start of its memory.
struct IntegerMemory {
    uint8_t* weights;  // [kPieceRows][groups][2][kIntegerKeys], high and low
    float* steps;      // [kPieceRows][groups]
    uint16_t* halves;  // [groups][kIntegerKeys], scales of keys or values
    DELTAIC_INLINE IntegerMemory(float* memory, int64_t D) {
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup;
        weights = reinterpret_cast<uint8_t*>(memory);
        steps = reinterpret_cast<float*>(weights + kPieceRows * groups * 2 * kIntegerKeys);
        halves = reinterpret_cast<uint16_t*>(steps + kPieceRows * groups);
    }
    static DELTAIC_INLINE int64_t floats(int64_t D) {
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup;
        return (kPieceRows * groups * 2 * kIntegerKeys + groups * kIntegerKeys * 2 + kPieceRows * groups * 4) / 4;
    }
};

// scores[r * stride + (0..15)] = q[r] . key for 16 rows of keys. The rows of a group are turned in registers, so that
// lanes are keys and a lane holds four neighbouring numbers. `ahead`: `lines` lines that are called from memory
// meanwhile.
template <int ROWS>
DELTAIC_INLINE void integer_scores(const uint8_t* const* rows, const uint16_t* halves, const uint8_t* q,
                                   int64_t q_stride, int64_t D, const uint8_t* ahead, int64_t lines, float* scores,
                                   int64_t stride) {
    const int64_t groups = IntegerRow::width(D) / kKvGroup;
    vec total[ROWS];
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) total[r] = v_set1(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        vec keys[16];
        DELTAIC_UNROLL for (int i = 0; i < 16; ++i) keys[i] = as_float(load_group(rows[i], g, D));
        v_transpose(keys);
        for (int64_t line = g * lines / groups; line < (g + 1) * lines / groups; ++line)
            prefetch_far(ahead + line * 64);
        ivec high[ROWS], low[ROWS];
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            high[r] = i_set1(0);
            low[r] = i_set1(IntegerRow{q + r * q_stride, D}.bias(g));
        }
        DELTAIC_UNROLL for (int quad = 0; quad < 16; ++quad) DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            const IntegerRow row{q + r * q_stride, D};
            high[r] = _mm512_dpbusd_epi32(high[r], as_int(keys[quad]), row.high(g * kKvGroup + quad * 4));
            low[r] = _mm512_dpbusd_epi32(low[r], as_int(keys[quad]), row.low(g * kKvGroup + quad * 4));
        }
        const vec scale = v_load_f16(halves + g * kIntegerKeys);
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) total[r] =
            v_fma(i_to_float(join(high[r], low[r])), scale, total[r]);
    }
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r)
        v_store(scores + r * stride, v_mul(total[r], v_set1(IntegerRow{q + r * q_stride, D}.step())));
}

// The quad of a row of weights that holds keys 4 n .. 4 n + 3: as packing narrows them, four registers at a time.
DELTAIC_INLINE int64_t place_of(int64_t n) { return n % 4 * 4 + n / 4; }

// out[r][(0..63)] += steps[r] * sum over kIntegerKeys values of the weights n [2][kIntegerKeys] of row r, of group g of
// the values. Four rows are interleaved as signed bytes, so that lanes are dimensions and a lane holds four keys: lane
// 4 j + m of part i holds dimension 16 j + 4 i + m. `ahead`: 66 lines that are called from memory meanwhile.
template <int ROWS>
DELTAIC_INLINE void integer_sums(const uint8_t* const* values, int64_t g, int64_t D, const uint8_t* weights,
                                 int64_t weight_stride, const float* steps, int64_t step_stride, const uint8_t* ahead,
                                 float* out, int64_t width) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    DELTAIC_UNROLL for (int half = 0; half < 2; ++half) {
        ivec high[ROWS][2], low[ROWS][2];
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int b = 0; b < 2; ++b) high[r][b] =
            low[r][b] = i_set1(0);
        for (int64_t quad = 0; quad < kIntegerKeys / 4; ++quad) {
            __m512i a[4];
            DELTAIC_UNROLL for (int i = 0; i < 4; ++i) a[i] =
                _mm512_xor_si512(load_group(values[quad * 4 + i], g, D), sign);
            const __m512i first = half ? _mm512_unpackhi_epi8(a[0], a[1]) : _mm512_unpacklo_epi8(a[0], a[1]);
            const __m512i second = half ? _mm512_unpackhi_epi8(a[2], a[3]) : _mm512_unpacklo_epi8(a[2], a[3]);
            const ivec value[2] = {_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)};
            prefetch_far(ahead), prefetch_far(ahead + 64), ahead += 128;
            DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
                const uint8_t* n = weights + r * weight_stride + place_of(quad) * 4;
                const ivec h = i_set1(load_i32(n)), l = i_set1(load_i32(n + kIntegerKeys));
                DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
                    high[r][b] = _mm512_dpbusd_epi32(high[r][b], h, value[b]);
                    low[r][b] = _mm512_dpbusd_epi32(low[r][b], l, value[b]);
                }
            }
        }
        prefetch_far(ahead), ahead += 64;
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            const vec step = v_set1(steps[r * step_stride]);
            DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
                float* o = out + r * width + (half * 2 + b) * 16;
                v_store(o, v_fma(i_to_float(join(high[r][b], low[r][b])), step, v_load(o)));
            }
        }
    }
}

// The lowest n of 64 bits; n may lie outside.
DELTAIC_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1; }

// Weights of kIntegerKeys keys, for each row and group: n [rows][groups][2][kIntegerKeys], high and low bytes, and
// their steps [rows][groups]. Row r sees the first visible[r] - key of them.
DELTAIC_INLINE void store_weights(const float* probabilities, int64_t stride, int64_t rows, const int64_t* visible,
                                  int64_t key, const uint16_t* halves, int64_t groups, uint8_t* n, float* steps) {
    const auto weight = [&](int64_t row, int64_t group, int i) __attribute__((always_inline)) {
        const uint64_t seen = low_bits(visible[row] - key) >> i * 16;
        return _mm512_maskz_mul_ps(static_cast<__mmask16>(seen), v_load(probabilities + row * stride + i * 16),
                                   v_load_f16(halves + group * kIntegerKeys + i * 16));
    };
    // Weights are not negative: their bits are in order, and a NaN is above.
    const auto larger = [](vec x, vec y)
                            __attribute__((always_inline)) { return as_float(_mm512_max_epu32(as_int(x), as_int(y))); };
    for (int64_t first = 0; first < rows * groups; first += 16, n += 16 * 2 * kIntegerKeys) {
        const int64_t count = min64(16, rows * groups - first);
        vec largest[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t row = (first + min64(i, count - 1)) / groups, group = (first + min64(i, count - 1)) % groups;
            largest[i] = larger(larger(weight(row, group, 0), weight(row, group, 1)),
                                larger(weight(row, group, 2), weight(row, group, 3)));
        }
        v_fold(largest, larger);
        const vec none = v_set1(0.0f);
        alignas(64) float inverse[16], step[16];
        v_store(inverse, v_less(v_set1(1e-30f), largest[0], v_div(v_set1(65535.0f), largest[0]), none));
        v_store(step, v_div(largest[0], v_set1(65535.0f)));
        memcpy(steps + first, step, static_cast<size_t>(count) * 4);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = (first + i) / groups, group = (first + i) % groups;
            const vec factor = v_set1(inverse[i]);
            ivec w[4];
            DELTAIC_UNROLL for (int j = 0; j < 4; ++j) w[j] = v_round(v_mul(weight(row, group, j), factor));
            const ivec a = _mm512_packus_epi32(w[0], w[1]), b = _mm512_packus_epi32(w[2], w[3]);
            const ivec low = _mm512_set1_epi16(255);
            _mm512_storeu_si512(n + i * 2 * kIntegerKeys,
                                _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
            _mm512_storeu_si512(n + i * 2 * kIntegerKeys + kIntegerKeys,
                                _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
        }
    }
}

// In place of StoredRows: integer products of int8 rows.
struct IntegerRows {
    using Number = uint8_t;  // of a query row: IntegerRow
    using Probabilities = FloatProducts;
    static constexpr bool kPrefills = false;
    static constexpr bool kPlainSums = false;  // the order of dimensions is that of packed values
    static constexpr int64_t kAhead = 64;
    static DELTAIC_INLINE int64_t width(int64_t D) { return IntegerRow::width(D); }

    static DELTAIC_INLINE int64_t query_bytes(int64_t D) { return IntegerRow::bytes(D); }
    static DELTAIC_INLINE void store_query(uint8_t* q, const float* x, float factor, int64_t D) {
        IntegerRow::store(q, x, factor, D);
    }
    static DELTAIC_INLINE int64_t floats(int64_t D) { return IntegerMemory::floats(D); }

    static DELTAIC_INLINE void scores(const CacheRows& keys, const Run& run, const uint8_t* q, int64_t q_stride,
                                      int64_t D, const uint8_t* next, float* scores, float* memory) {
        const IntegerMemory at(memory, D);
        const int64_t groups = IntegerRow::width(D) / kKvGroup;
        const RunRows run_rows(keys, run);
        for (int64_t k = 0; k < run.keys; k += 16) {
            const uint8_t *rows[16], *ahead = run_rows.ahead(k + 32, 16, next);
            find_rows(run_rows, k, groups, rows, at.halves);
            const int64_t lines = ahead ? ceil_div(16 * keys.row_bytes, 64) : 0;
            row_tiles(run.rows, [&](auto constant, int64_t r) {
                integer_scores<decltype(constant)::value>(rows, at.halves, q + r * q_stride, q_stride, D, ahead,
                                                          r ? 0 : lines, scores + r * kRunKeys + k, kRunKeys);
            });
        }
    }

    static DELTAIC_INLINE void values(const CacheRows& values, const Run& run, int64_t D, const uint8_t* next,
                                      const float* probabilities, float* memory, float* out) {
        const IntegerMemory at(memory, D);
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup, row_bytes = groups * 2 * kIntegerKeys;
        const RunRows run_rows(values, run);
        for (int64_t k = 0; k < run.keys; k += kIntegerKeys) {
            const uint8_t *rows[kIntegerKeys], *ahead = run_rows.ahead(k + kIntegerKeys, kIntegerKeys, next);
            find_rows(run_rows, k, groups, rows, at.halves);
            store_weights(probabilities + k, kRunKeys, run.rows, run.visible, k, at.halves, groups, at.weights,
                          at.steps);
            for (int64_t g = 0; g < groups; ++g) {
                row_tiles(run.rows, [&](auto constant, int64_t r) {
                    integer_sums<decltype(constant)::value>(
                        rows, g, D, at.weights + r * row_bytes + g * 2 * kIntegerKeys, row_bytes,
                        at.steps + r * groups + g, groups, ahead + g * 66 * 64, out + r * width + g * kKvGroup, width);
                });
            }
        }
    }

    static DELTAIC_INLINE void plain_sums(const float* sums, int64_t n, int64_t D, float* out) {
        for (int64_t r = 0; r < n; ++r)
            for (int64_t d = 0; d < D; d += 4)
                memcpy(out + r * round_up(D, 16) + d,
                       sums + r * width(D) + d / kKvGroup * kKvGroup + d / 4 % 4 * 16 + d / 16 % 4 * 4, 16);
    }
};
using DecodedInt8 = IntegerRows;
#else
using DecodedInt8 = StoredRows<HalfProducts, Stored::int8>;
#endif

}  // namespace DELTAIC_ISA
}  // namespace deltaic
