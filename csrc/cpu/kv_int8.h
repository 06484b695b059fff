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

#if defined(__AVX512VNNI__)

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

// Rows first..first + count - 1 (count 1..N); the last one again up to N, a multiple of 16. Their scales go to
// halves [groups][kIntegerKeys], by plain moves, of which a core has many to spare.
template <int64_t N>
DELTAIC_INLINE void find_rows(const CacheRows& cache, int64_t first, int64_t count, int64_t groups,
                              const uint8_t* (&rows)[N], uint16_t* halves) {
    for (int64_t i = 0; i < N; i += 16) {
        const uint8_t* some[16];
        cache.rows(first + min64(i, count - 1), max64(1, min64(16, count - i)), some);
        memcpy(rows + i, some, sizeof some);
    }
    for (int64_t i = 0; i < N; ++i)
        for (int64_t g = 0; g < groups; ++g) memcpy(halves + g * kIntegerKeys + i, rows[i] + g * (kKvGroup + 2), 2);
}

// Two-byte numbers from the sums of their bytes.
DELTAIC_INLINE ivec join(ivec high, ivec low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

// Work space of one thread, in bytes from the start of its memory.
struct IntegerMemory {
    uint8_t* keys;     // [groups][2][16 quads][16 keys][4]
    uint8_t* values;   // [16 quads of keys][4][16 dimensions][4]
    uint8_t* weights;  // [kPieceRows][groups][2][kIntegerKeys], high and low
    float* steps;      // [kPieceRows][groups]
    uint16_t* halves;  // [groups][kIntegerKeys], scales of keys or values
    DELTAIC_INLINE IntegerMemory(float* memory, int64_t D) {
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup;
        keys = reinterpret_cast<uint8_t*>(memory);
        values = keys + groups * 2048;
        weights = values + 4096;
        steps = reinterpret_cast<float*>(weights + kPieceRows * groups * 2 * kIntegerKeys);
        halves = reinterpret_cast<uint16_t*>(steps + kPieceRows * groups);
    }
    static DELTAIC_INLINE int64_t floats(int64_t D) {
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup;
        return (groups * 2048 + 4096 + kPieceRows * groups * 2 * kIntegerKeys + groups * kIntegerKeys * 2 +
                kPieceRows * groups * 4) /
               4;
    }
};

// 16 rows of keys, lanes are keys, a lane holds four neighbouring numbers: group g's 16 lines at packed + g * 2048.
DELTAIC_INLINE void pack_keys(const uint8_t* const* rows, int64_t D, uint8_t* packed) {
    for (int64_t g = 0; g * kKvGroup < D; ++g, packed += 2048) {
        f32x16 lines[16];
        for (int i = 0; i < 16; ++i) lines[i].part[0] = as_float(load_group(rows[i], g, D));
        transpose(lines);
        for (int i = 0; i < 16; ++i) v_store(reinterpret_cast<float*>(packed + i * 64), lines[i].part[0]);
    }
}

// scores[r * stride + (0..31)] = q[r] . key for 32 packed keys. `ahead`: the next 32 keys, which are called from memory
// meanwhile.
template <int ROWS>
DELTAIC_INLINE void integer_scores(const uint8_t* keys, const uint16_t* halves, const uint8_t* q, int64_t q_stride,
                                   int64_t D, const uint8_t* ahead, float* scores, int64_t stride) {
    const int64_t groups = IntegerRow::width(D) / kKvGroup;
    vec total[ROWS][2];
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int b = 0; b < 2; ++b) total[r][b] = v_set1(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        ivec high[ROWS][2], low[ROWS][2];
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
            high[r][b] = i_set1(0);
            low[r][b] = i_set1(IntegerRow{q + r * q_stride, D}.bias(g));
        }
        for (int64_t quad = 0; quad < 16; ++quad) {
            ivec key[2];
            DELTAIC_UNROLL for (int b = 0; b < 2; ++b) key[b] = i_load(keys + ((g * 2 + b) * 16 + quad) * 64);
            prefetch_far(ahead), prefetch_far(ahead + 64), ahead += 128;
            DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
                const IntegerRow row{q + r * q_stride, D};
                const ivec h = row.high(g * kKvGroup + quad * 4), l = row.low(g * kKvGroup + quad * 4);
                DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
                    high[r][b] = _mm512_dpbusd_epi32(high[r][b], key[b], h);
                    low[r][b] = _mm512_dpbusd_epi32(low[r][b], key[b], l);
                }
            }
        }
        prefetch_far(ahead), ahead += 64;  // a group of 32 keys is 33 lines
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int b = 0; b < 2; ++b) total[r][b] =
            v_fma(i_to_float(join(high[r][b], low[r][b])), v_load_f16(halves + g * kIntegerKeys + b * 16), total[r][b]);
    }
    DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vec step = v_set1(IntegerRow{q + r * q_stride, D}.step());
        DELTAIC_UNROLL for (int b = 0; b < 2; ++b) v_store(scores + r * stride + b * 16, v_mul(total[r][b], step));
    }
}

// out[r][(0..63)] += steps[r] * sum over kIntegerKeys packed values of the weights n [2][kIntegerKeys] of row r.
template <int ROWS>
DELTAIC_INLINE void integer_sums(const uint8_t* values, const uint8_t* weights, int64_t weight_stride,
                                 const float* steps, int64_t step_stride, const uint8_t* ahead, float* out,
                                 int64_t width) {
    for (int64_t part = 0; part < 4; part += 2) {
        ivec high[ROWS][2], low[ROWS][2];
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) DELTAIC_UNROLL for (int b = 0; b < 2; ++b) high[r][b] =
            low[r][b] = i_set1(0);
        for (int64_t quad = 0; quad < kIntegerKeys / 4; ++quad) {
            ivec value[2];
            DELTAIC_UNROLL for (int b = 0; b < 2; ++b) value[b] = i_load(values + (quad * 4 + part + b) * 64);
            prefetch_far(ahead), prefetch_far(ahead + 64), ahead += 128;
            DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
                const uint8_t* n = weights + r * weight_stride + quad * 4;
                const ivec h = i_set1(load_i32(n)), l = i_set1(load_i32(n + kIntegerKeys));
                DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
                    high[r][b] = _mm512_dpbusd_epi32(high[r][b], h, value[b]);
                    low[r][b] = _mm512_dpbusd_epi32(low[r][b], l, value[b]);
                }
            }
        }
        prefetch_far(ahead), ahead += 64;  // a group of kIntegerKeys values is 66 lines
        DELTAIC_UNROLL for (int r = 0; r < ROWS; ++r) {
            const vec step = v_set1(steps[r * step_stride]);
            DELTAIC_UNROLL for (int b = 0; b < 2; ++b) {
                float* o = out + r * width + (part + b) * 16;
                v_store(o, v_fma(i_to_float(join(high[r][b], low[r][b])), step, v_load(o)));
            }
        }
    }
}

// Weights of `visible` (up to kIntegerKeys) keys in one group: n, high bytes and low bytes, and their step.
DELTAIC_INLINE void store_weights(const float* probabilities, const uint16_t* halves, int64_t visible, uint8_t* n,
                                  float* step) {
    vec w[kIntegerKeys / 16];
    __m512i largest = _mm512_setzero_si512();  // weights are not negative: their bits are in order, and a NaN is above
    DELTAIC_UNROLL for (int i = 0; i < kIntegerKeys / 16; ++i) {
        const int64_t left = max64(0, min64(16, visible - i * 16));
        const __mmask16 seen = static_cast<__mmask16>((1u << left) - 1);
        w[i] =
            _mm512_maskz_mul_ps(seen, _mm512_maskz_loadu_ps(seen, probabilities + i * 16), v_load_f16(halves + i * 16));
        largest = _mm512_max_epu32(largest, as_int(w[i]));
    }
    const float amax = bits_to_float(_mm512_reduce_max_epu32(largest));
    const vec inverse = v_set1(amax > 1e-30f ? 65535.0f / amax : 0.0f);
    DELTAIC_UNROLL for (int i = 0; i < kIntegerKeys / 16; ++i) {
        const __m512i both = v_round(v_mul(w[i], inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(n + i * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(both, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(n + kIntegerKeys + i * 16), _mm512_cvtepi32_epi8(both));
    }
    *step = amax / 65535.0f;
}

// Group g of kIntegerKeys rows as signed bytes: lanes are dimensions, a lane holds four keys. Lane 4 j + m of
// register i holds dimension 16 j + 4 i + m.
DELTAIC_INLINE void pack_values(const uint8_t* const* rows, int64_t g, int64_t D, uint8_t* packed) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t quad = 0; quad < kIntegerKeys / 4; ++quad, packed += 256) {
        __m512i a[4];
        DELTAIC_UNROLL for (int i = 0; i < 4; ++i) a[i] = _mm512_xor_si512(load_group(rows[quad * 4 + i], g, D), sign);
        const __m512i low0 = _mm512_unpacklo_epi8(a[0], a[1]), low1 = _mm512_unpacklo_epi8(a[2], a[3]);
        const __m512i high0 = _mm512_unpackhi_epi8(a[0], a[1]), high1 = _mm512_unpackhi_epi8(a[2], a[3]);
        _mm512_storeu_si512(packed, _mm512_unpacklo_epi16(low0, low1));
        _mm512_storeu_si512(packed + 64, _mm512_unpackhi_epi16(low0, low1));
        _mm512_storeu_si512(packed + 128, _mm512_unpacklo_epi16(high0, high1));
        _mm512_storeu_si512(packed + 192, _mm512_unpackhi_epi16(high0, high1));
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
        for (int64_t k = 0; k < run.keys; k += 32) {
            const uint8_t *rows[32], *ahead = k + 32 < run.keys ? keys.row(run.first + k + 32) : next;
            find_rows(keys, run.first + k, min64(32, run.keys - k), groups, rows, at.halves);
            for (int b = 0; b < 2; ++b) pack_keys(rows + b * 16, D, at.keys + b * 1024);
            row_tiles(run.rows, [&](auto constant, int64_t r) {
                integer_scores<decltype(constant)::value>(at.keys, at.halves, q + r * q_stride, q_stride, D, ahead,
                                                          scores + r * kRunKeys + k, kRunKeys);
            });
        }
    }

    static DELTAIC_INLINE void values(const CacheRows& values, const Run& run, int64_t D, const uint8_t* next,
                                      const float* probabilities, float* memory, float* out) {
        const IntegerMemory at(memory, D);
        const int64_t width = IntegerRow::width(D), groups = width / kKvGroup, row_bytes = groups * 2 * kIntegerKeys;
        for (int64_t k = 0; k < run.keys; k += kIntegerKeys) {
            const uint8_t *rows[kIntegerKeys],
                *ahead = k + kIntegerKeys < run.keys ? values.row(run.first + k + kIntegerKeys) : next;
            find_rows(values, run.first + k, min64(kIntegerKeys, run.keys - k), groups, rows, at.halves);
            for (int64_t r = 0; r < run.rows; ++r) {
                const int64_t visible = min64(kIntegerKeys, run.visible[r] - k);
                for (int64_t g = 0; g < groups; ++g)
                    store_weights(probabilities + r * kRunKeys + k, at.halves + g * kIntegerKeys, visible,
                                  at.weights + r * row_bytes + g * 2 * kIntegerKeys, at.steps + r * groups + g);
            }
            for (int64_t g = 0; g < groups; ++g) {
                pack_values(rows, g, D, at.values);
                row_tiles(run.rows, [&](auto constant, int64_t r) {
                    integer_sums<decltype(constant)::value>(
                        at.values, at.weights + r * row_bytes + g * 2 * kIntegerKeys, row_bytes,
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
