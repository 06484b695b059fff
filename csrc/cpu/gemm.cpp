// The register tiles of every weight format, and what turns one format into another on the way.
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

template <int N>
struct Count {
    static constexpr int value = N;
};

template <int NB, int NT>
DELTAIC_INLINE void clear(f32x16 (&acc)[NB][NT]) {
    DELTAIC_UNROLL for (int b = 0; b < NB; ++b) DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[b][t] = zero();
}

template <int NB, int NT>
DELTAIC_INLINE void store_sums(const f32x16 (&acc)[NB][NT], float* sums) {
    DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int b = 0; b < NB; ++b)
        store(sums + t * kSumStride + b * 16, acc[b][t]);
}

// --- words of int8 or of bfloat16 pairs

// Bytes that a stream of weights is asked for ahead of its use; 0: not at all. A block whose lines are loaded in order
// is fetched by the processor's own prefetching, at the speed of memory; where much is computed per line, the distance
// must cover the time of an access to memory (measured: bench/results/dense-zen4-2vcpu.md).
DELTAIC_INLINE constexpr int64_t far_ahead(Format format, int tokens) {
    if (format == Format::int4) return tokens < 3 ? 0 : kParts == 1 ? 8192 : tokens <= 5 ? 16384 : 0;
    if (format == Format::int8) return tokens <= 4 ? 0 : 24576;
    return tokens <= 4 ? 1024 : 4096;
}

DELTAIC_INLINE const uint16_t* halves_of(const Activations& a, int64_t run) {
    return a.halves + run * a.stride * (kWordBytes / 2);
}
DELTAIC_INLINE int64_t bf16_lines(int64_t K, int64_t run) { return min64(32, ceil_div(K, 2) - run * 32); }

// A block with NT tokens, all runs: one stream of weights.
template <int NT>
void stream_block(Format format, const uint8_t* w, const Activations& a, float* sums) {
    const BlockLayout at(format, a.K);
    constexpr int64_t kFar8 = far_ahead(Format::int8, NT), kFar4 = far_ahead(Format::int4, NT);
    f32x16 acc[1][NT], d[1];
    clear<1, NT>(acc);
    // What lies before the lines at once, for a line of it now and then would break the stream; and the lines'
    // beginning, from where the processor's own prefetching goes on while all that arrives.
    for (int64_t i = 0; i < at.lines; i += 64) prefetch(w + i);
    for (int64_t i = 0; i < 8; ++i) prefetch_far(w + at.lines + i * 64);
    for (int64_t run = 0; run < a.runs; ++run) {
        i32x16 sum[1][NT];
        const int64_t token = run * a.stride;
        const uint8_t* const lines = w + at.lines + run * at.line_bytes;
        if (format == Format::int8) {
            run_int8<(kFar8 > 0), 1, NT>(lines, 0, kFar8, a.quads(run), a.run_sum + token, sum);
        } else if constexpr (NT <= few_tokens(Format::int4)) {
            run_int4<(kFar4 > 0), 1, NT>(lines, w + at.scales + run * 64, 0, w + run * kInt4RunBytes + kFar4,
                                         a.quads(run), a.group_bias + token * 8, sum);
        }
        load_halves<1>(w + run * 32, 0, d);
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) acc[0][t] = add_run(acc[0][t], sum[0][t], a.scale[token + t], d[0]);
    }
    store_sums<1, NT>(acc, sums);
}

// NB blocks of bf16: the sums are few, so that they must come from several blocks to hide the latency of an addition.
template <int NB, int NT>
void stream_bf16(const uint8_t* w, int64_t stride, const Activations& a, float* sums) {
    f32x16 acc[NB][NT];
    clear<NB, NT>(acc);
    for (int64_t run = 0; run < ceil_div(a.K, 64); ++run)
        chunk_bf16<true, NB, NT>(w + run * 2048, stride, far_ahead(Format::bf16, NT), bf16_lines(a.K, run),
                                 halves_of(a, run), acc);
    store_sums<NB, NT>(acc, sums);
}

// f(Count<T>), for T of at most `most`, and that of at most 8.
template <int64_t most, class F>
DELTAIC_INLINE void with_tokens(int64_t T, const F& f) {
    switch (T) {
        case 1:
            return f(Count<min64(1, most)>{});
        case 2:
            return f(Count<min64(2, most)>{});
        case 3:
            return f(Count<min64(3, most)>{});
        case 4:
            return f(Count<min64(4, most)>{});
        case 5:
            return f(Count<min64(5, most)>{});
        case 6:
            return f(Count<min64(6, most)>{});
        case 7:
            return f(Count<min64(7, most)>{});
        default:
            return f(Count<min64(8, most)>{});
    }
}

// Some runs of a few blocks as register tiles take them: the lines as they lie in memory or their form, block after
// block `line_stride` bytes apart and run after run `run_bytes`; and how they lie in memory, blocks `stride` bytes
// apart.
struct Runs {
    const uint8_t* lines;
    int64_t line_stride, run_bytes;
    const uint8_t *stored, *scales, *halves;
    int64_t stride;
    int64_t first, count;
};

// Whether the sums of a register tile are in registers meanwhile; else, where these are few, in memory.
DELTAIC_INLINE constexpr bool keeps_sums(bool halves) { return halves || kTileRuns > 1; }

// These runs of NB blocks with NT tokens. A function of its own, for all registers.
template <bool kHalves, int NB, int NT>
__attribute__((noinline)) void run_tile(Format format, const Runs& w, const Activations& a, float* sums) {
    constexpr bool kKept = keeps_sums(kHalves);
    f32x16 acc[NB][NT];
    if (kKept && w.first == 0) clear<NB, NT>(acc);
    if (kKept && w.first > 0)
        DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int b = 0; b < NB; ++b) acc[b][t] =
            load(sums + t * kSumStride + b * 16);
    for (int64_t i = 0; i < (kTileRuns > 1 ? w.count : 1); ++i) {
        const int64_t run = w.first + i, token = run * a.stride;
        const uint8_t* const lines = w.lines + i * w.run_bytes;
        if constexpr (kHalves) {
            const int64_t count = bf16_lines(a.K, run);
            if constexpr (has_form(Format::bf16)) {
                form_bf16<NB, NT>(lines, w.line_stride, count / 2 * 2, halves_of(a, run), acc);
                if (count % 2)
                    chunk_bf16<false, NB, NT>(w.stored + (count - 1) * 64, w.stride, 0, 1,
                                              halves_of(a, run) + (count - 1) * 2, acc);
            } else {
                chunk_bf16<false, NB, NT>(lines, w.line_stride, 0, count, halves_of(a, run), acc);
            }
        } else {
            i32x16 sum[NB][NT];
            if constexpr (has_form(Format::int8)) {
                form_int8<NB, NT>(lines, w.line_stride, a.quads(run), sum);
            } else if (has_form(Format::int4) || format == Format::int8) {
                run_int8<false, NB, NT>(lines, w.line_stride, 0, a.quads(run), a.run_sum + token, sum);
            } else {
                run_int4<false, NB, NT>(lines, w.scales, w.stride, nullptr, a.quads(run), a.group_bias + token * 8,
                                        sum);
            }
            f32x16 d[NB];
            load_halves<NB>(w.halves + i * 32, w.stride, d);
            DELTAIC_UNROLL for (int t = 0; t < NT; ++t) DELTAIC_UNROLL for (int b = 0; b < NB; ++b) {
                float* const total = sums + t * kSumStride + b * 16;
                acc[b][t] = add_run(kKept ? acc[b][t] : load(total), sum[b][t], a.scale[token + t], d[b]);
                if (!kKept) store(total, acc[b][t]);
            }
        }
    }
    if (kKept) store_sums<NB, NT>(acc, sums);
}

// All tokens, some runs after others: the weights of these stay in the first-level cache, the tokens pass by in order.
template <bool kHalves, int NB>
void many_tokens(Format format, const uint8_t* w, int64_t stride, const Activations& a, float* sums, uint8_t* form,
                 Destination target) {
    const BlockLayout at(format, a.K);
    const int64_t scale_bytes = kHalves ? 0 : at.lines;  // bf16 has lines only; a run is half as many columns
    const int64_t runs = kHalves ? ceil_div(a.K, 64) : at.runs;
    if (!keeps_sums(kHalves))
        for (int64_t t = 0; t < a.T; ++t)
            for (int b = 0; b < NB; ++b) store(sums + t * kSumStride + b * 16, zero());
    for (int64_t run = 0; run < runs; run += kTileRuns) {
        const int64_t count = min64(kTileRuns, runs - run);
        const uint8_t* const stored = w + scale_bytes + run * at.line_bytes;
        Runs these{stored, stride, at.line_bytes, stored, w + at.scales + run * 64, w + run * 32, stride, run, count};
        // Then come the runs after these, or the first ones of the blocks that follow, after their scales: asked for
        // tile by tile, so that the requests find room.
        const bool last = run + count == runs;
        const uint8_t* const next = last ? w + NB * stride : stored + count * at.line_bytes;
        const int64_t next_bytes =
            min64(kTileRuns, last ? runs : runs - run - count) * at.line_bytes + (last ? scale_bytes : 0);
        const int64_t each = round_up(ceil_div(next_bytes, ceil_div(a.T, kPanelTokens)), 64);
        int64_t ahead = 0;
        if (has_form(format)) {
            these.lines = form, these.line_stride = kTileRuns * kFormBytes, these.run_bytes = kFormBytes;
            for (int b = 0; b < NB; ++b)
                for (int64_t i = 0; i < count; ++i)
                    form_run(format, stored + b * stride + i * at.line_bytes, these.scales + b * stride + i * 64,
                             kHalves ? bf16_lines(a.K, run + i) : 32, form + (b * kTileRuns + i) * kFormBytes);
        }
        int64_t t = 0;
        const auto tile = [&](auto tokens) {
            constexpr int NT = decltype(tokens)::value;
            for (const int64_t end = min64(ahead + each, next_bytes); ahead < end; ahead += 64)
                for (int b = 0; b < NB; ++b) prefetch_far(next + b * stride + ahead);
            if (last && target.data)
                for (int i = 0; i < NT; ++i)
                    for (int64_t byte = 0; byte < NB * target.pair_bytes / 2; byte += 64)
                        prefetch_write(target.data + (t + i) * target.row_bytes + byte);
            run_tile<kHalves, NB, NT>(format, these, a.rows(t, NT), sums + t * kSumStride);
            t += NT;
        };
        while (a.T - t >= kPanelTokens) tile(Count<kPanelTokens>{});
        switch (a.T - t) {
            case 5:
                tile(Count<5>{});
                break;
            case 4:
                tile(Count<4>{});
                break;
            case 3:
                tile(Count<3>{});
                break;
            case 2:
                tile(Count<2>{});
                break;
            case 1:
                tile(Count<1>{});
                break;
            default:
                break;
        }
    }
}

// The same for as many neighbouring blocks as a register tile has room for; their number.
template <bool kHalves>
int64_t a_few_blocks(Format format, int64_t left, const uint8_t* w, int64_t stride, const Activations& a, float* sums,
                     uint8_t* form, Destination target) {
    constexpr int kBlocks = tile_blocks(kHalves ? Format::bf16 : Format::int8);
    if (left >= kBlocks) {
        many_tokens<kHalves, kBlocks>(format, w, stride, a, sums, form, target);
        return kBlocks;
    }
    many_tokens<kHalves, 1>(format, w, stride, a, sums, form, target);
    return 1;
}

void multiply_words(Format format, int64_t blocks, const uint8_t* w, int64_t stride, const Activations& a, float* sums,
                    uint8_t* form, Destination target) {
    for (int64_t b = 0; b < blocks;) {
        const int64_t left = blocks - b;
        const uint8_t* block = w + b * stride;
        float* out = sums + b * 16;
        if (a.T > few_tokens(format)) {
            const Destination to = target.at(0, b / 2);
            b += format == Format::bf16 ? a_few_blocks<true>(format, left, block, stride, a, out, form, to)
                                        : a_few_blocks<false>(format, left, block, stride, a, out, form, to);
        } else if (format != Format::bf16) {
            constexpr int64_t most = max64(few_tokens(Format::int8), few_tokens(Format::int4));
            with_tokens<most>(a.T, [&](auto T) { stream_block<decltype(T)::value>(format, block, a, out); });
            b += 1;
        } else {
            with_tokens<few_tokens(Format::bf16)>(a.T, [&](auto T) {
                constexpr int NT = decltype(T)::value, NB = kParts == 1 || NT <= 2 ? 2 : 1;
                if (kParts == 1 && NT == 1 && left >= 4) {
                    stream_bf16<4, NT>(block, stride, a, out), b += 4;
                } else if (left >= NB) {
                    stream_bf16<NB, NT>(block, stride, a, out), b += NB;
                } else {
                    stream_bf16<1, NT>(block, stride, a, out), b += 1;
                }
            });
        }
    }
}

// --- floats

template <int NB, int NT>
void float_tile(Format format, const uint8_t* w, int64_t stride, const Activations& a, float* sums) {
    f32x16 acc[NB][NT];
    clear<NB, NT>(acc);
    if (format == Format::f32) {
        tile_f32<NB, NT>(reinterpret_cast<const float*>(w), stride / 4, 16, a.x, a.K, a.K, acc);
    } else {
        tile_bf16<NB, NT>(w, stride, a.x, a.K, a.K, acc);
    }
    store_sums<NB, NT>(acc, sums);
}

// Tokens of a register tile: with 2 blocks in 32 wide registers, with 1 block where a block needs several registers.
constexpr int kFloatTokens = kParts == 1 ? 12 : kTileTokens > 1 ? 6 : 2;

template <int NB>
void multiply_floats(Format format, const uint8_t* w, int64_t stride, const Activations& a, float* sums) {
    int64_t t = 0;
    const auto tile = [&](auto tokens) {
        constexpr int NT = decltype(tokens)::value;
        float_tile<NB, NT>(format, w, stride, a.rows(t, NT), sums + t * kSumStride);
        t += NT;
    };
    if constexpr (NB == 1 || kParts == 1) {
        while (a.T - t >= kFloatTokens) tile(Count<kFloatTokens>{});
        if constexpr (kFloatTokens > 8) {
            if (a.T - t >= 8) tile(Count<8>{});
        }
        if constexpr (kFloatTokens > 4) {
            if (a.T - t >= 4) tile(Count<4>{});
            if (a.T - t >= 3) tile(Count<3>{});
        }
    }
    while (a.T - t >= 2) tile(Count<2>{});
    if (a.T - t >= 1) tile(Count<1>{});
}

}  // namespace

void multiply_blocks(Product product, int64_t blocks, const uint8_t* w, int64_t stride, const Activations& a,
                     float* sums, uint8_t* form, Destination target) {
    if (product.words) {
        multiply_words(product.format, blocks, w, stride, a, sums, form, target);
    } else if (blocks == 2 && (kParts == 1 || a.T <= 2)) {
        multiply_floats<2>(product.format, w, stride, a, sums);
    } else {
        for (int64_t b = 0; b < blocks; ++b)
            multiply_floats<1>(product.format, w + b * stride, stride, a, sums + b * 16);
    }
}

void expand_block(Format stored, const uint8_t* w, int64_t K, float* out) {
    if (stored == Format::bf16) {
        for (int64_t k = 0; k < K; k += 2) {
            store(out + k * 16, load_pair_first(w + k * 32));
            if (k + 1 < K) store(out + k * 16 + 16, load_pair_second(w + k * 32));
        }
        return;
    }
    const BlockLayout at(stored, K);
    for (int64_t k = 0; k < K; ++k) {
        if (stored == Format::int8) {
            const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(w) + k / kRun * 16);
            store(out + k * 16, mul(d, load_int8(w + at.lines + k / 4 * 64, k % 4)));
            continue;
        }
        for (int64_t lane = 0; lane < 16; ++lane) out[k * 16 + lane] = element_int4(w, at, k, lane);
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
