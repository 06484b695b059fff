// linear_top and pack_screen: the largest logits exactly, for a quarter to a half of the bytes of the head.
//
// A sketch of the head has four bits per weight: q = round(w / step + u). u is a random number in (-1/2, 1/2) of the
// column; step belongs to 16 columns of a row and is wide enough that no q is cut off. Then step * (q - u) misses w by
// step * e, e uniform in (-1/2, 1/2), whatever w is, and independent of the other columns (subtractive dither). For an
// x that does not depend on the u, the sum over columns of x * step * e has the variance V = sum (x * step)^2 / 12, and
// exceeds z sqrt(V) with a probability below exp(-z^2 / 2), as uniform numbers are sub-Gaussian with their own
// variance: 2.3e-11 for z = 7. All other differences between a product with the sketch and one with the head are
// bounded outright.
//
// So each logit has a number that it does not exceed. First the blocks where that is largest are multiplied exactly,
// and give a number that k logits reach; then come all others in which a logit may reach it. One of the k largest is
// missed only if the sketch misses that very row by more than the bound. Where that would read no less than the head,
// everything is multiplied exactly.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/gemm.h"
#include "cpu/penalty.h"
#include "cpu/threshold.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

constexpr double kDeviations = 7.0;
constexpr int64_t kMostRows = 8;       // with more, the sketch costs as much as the head
constexpr int64_t kLongestRest = 256;  // calls that do without the sketch after it was of no use
constexpr float kInfinity = __builtin_inff();

// The least half precision number that is not below `value`; infinity if there is none.
uint16_t half_above(float value) {
    const uint16_t half = float_to_f16(value);
    return f16_to_float(half) < value ? static_cast<uint16_t>(half + 1) : half;
}

// What bounds the differences between sketch and head in one row.
struct RowBound {
    double fourth = 0.0;   // sum of step^4 over the groups of 16 columns
    double squares = 0.0;  // sum of w^2
};

// Steps of one run of 16 rows (lanes): amax of each group / 7 or a little more, as d * s. `w` [128][16].
void choose_steps(const float* w, uint16_t* d, uint8_t (&s)[8][16], float (&steps)[8][16], RowBound* bounds) {
    float amax[8][16];
    f32x16 squares = zero();
    for (int g = 0; g < 8; ++g) {
        f32x16 largest = zero();
        for (int k = 0; k < kGroup; ++k) {
            const f32x16 v = load(w + (g * kGroup + k) * 16);
            largest = max(largest, max(v, sub(zero(), v)));
            squares = fma(v, v, squares);
        }
        store(amax[g], largest);
    }
    float sum[16];
    store(sum, squares);
    for (int r = 0; r < 16; ++r) {
        float largest = 0.0f;
        for (int g = 0; g < 8; ++g) largest = amax[g][r] > largest ? amax[g][r] : largest;
        d[r] = half_above(largest / (7.0f * 16.0f));
        float unit = f16_to_float(d[r]);
        bounds[r].squares += static_cast<double>(sum[r]);
        if (!(unit < kInfinity) || !(sum[r] < kInfinity)) {  // too large, or NaN: such a row is always multiplied
            bounds[r].fourth = static_cast<double>(kInfinity);
            d[r] = 0, unit = 0.0f;
        }
        for (int g = 0; g < 8; ++g) {
            const float wanted = unit > 0.0f ? amax[g][r] / (7.0f * unit) : 0.0f;
            int scale = static_cast<int>(wanted);
            if (static_cast<float>(scale) < wanted) ++scale;
            scale = scale < 1 ? 1 : scale > 16 ? 16 : scale;
            s[g][r] = static_cast<uint8_t>(scale);
            steps[g][r] = unit * static_cast<float>(scale);
            const double square = static_cast<double>(steps[g][r]) * static_cast<double>(steps[g][r]);
            bounds[r].fourth += square * square;
        }
    }
}

// A line of nibbles: columns 0 .. 3 in the low ones of each lane's four bytes, columns 4 .. 7 in the high ones.
void store_line(uint8_t* line, const f32x16 (&q)[8]) {
    f32x16 bytes[4];
    for (int j = 0; j < 4; ++j) bytes[j] = fma(q[4 + j], set1(16.0f), q[j]);
    // Three bytes are an exact float.
    const f32x16 low = fma(bytes[2], set1(65536.0f), fma(bytes[1], set1(256.0f), bytes[0]));
    for (int i = 0; i < kParts; ++i) {
        const ivec all = i_add(v_round(low.part[i]), i_shl<24>(v_round(bytes[3].part[i])));
        v_store(reinterpret_cast<float*>(line) + i * kWidth, as_float(all));
    }
}

// One block of the sketch, of rows wide [runs * 128][16], columns past the last being zero.
void pack_block(const float* wide, int64_t K, const float* dither, uint8_t* out, RowBound* bounds) {
    const BlockLayout at(Format::int4, K);
    memset(out, 0, static_cast<size_t>(at.lines));
    for (int64_t run = 0; run < at.runs; ++run) {
        const float* const w = wide + run * kRun * 16;
        uint8_t s[8][16];
        float steps[8][16];
        choose_steps(w, reinterpret_cast<uint16_t*>(out) + run * 16, s, steps, bounds);
        for (int g = 0; g < 8; ++g) {
            float inverse[16];
            for (int r = 0; r < 16; ++r) {
                out[at.scales + run * 64 + g / 2 * 16 + r] |= static_cast<uint8_t>((s[g][r] - 1) << (g % 2 * 4));
                inverse[r] = steps[g][r] > 0.0f ? 1.0f / steps[g][r] : 0.0f;
            }
            const f32x16 by = load(inverse);
            for (int line = 0; line < 2; ++line) {
                f32x16 q[8];
                for (int64_t j = 0; j < 8; ++j) {
                    const int64_t k = g * kGroup + line * 8 + j, column = run * kRun + k;
                    const f32x16 v = fma(load(w + k * 16), by, set1(column < K ? dither[column] : 0.0f));
                    q[j] = add(max(set1(-8.0f), min(set1(7.0f), round(v))), set1(8.0f));
                }
                store_line(out + at.lines + run * 1024 + g * 128 + line * 64, q);
            }
        }
    }
}

// What a row of activations makes of the bounds of rows of weights: |difference| <= of_steps * (sum step^4)^(1/4) +
// of_norm * (sum w^2)^(1/2), but for the probability above.
struct Margin {
    float of_steps, of_norm;
};

// Fills `bias` [runs][stride][8] for row t: what the integers q - u of a group begin with, rounded.
Margin measure(const Weight& head, const Activations& a, int64_t t, const float* dither, int16_t* bias) {
    const Product product = product_of(head, head.segment[0].format, a.T);
    const bool same = product.words && product.format != Format::bf16;  // the head meets the same integers
    double energies = 0.0, rounding = 0.0, squares = 0.0, difference = 0.0;
    for (int64_t run = 0; run < a.runs; ++run) {
        const int64_t at = run * a.stride + t;
        const int8_t* const q = a.q + at * kWordBytes;
        const double scale = static_cast<double>(a.scale[at]);
        for (int64_t g = 0; g < 8; ++g) {
            const int64_t first = g * kGroup, columns = min64(kGroup, a.K - run * kRun - first);
            float sum = 0.0f, square = 0.0f;
            for (int64_t k = first; k < first + columns; ++k) {
                const float n = static_cast<float>(q[k]);
                sum += n * (8.0f + dither[run * kRun + k]), square += n * n;
            }
            bias[at * 8 + g] = static_cast<int16_t>(rintf(-sum));
            const double energy = scale * scale * static_cast<double>(square);
            energies += energy * energy, squares += energy;
            rounding += ::pow(scale, 4.0 / 3.0);
        }
        for (int64_t k = run * kRun; !same && k < min64(a.K, (run + 1) * kRun); ++k) {
            const float x =
                product.words ? bf16_to_float(a.halves[(k / 64 * a.stride + t) * 64 + k % 64]) : a.x[t * a.K + k];
            const double miss = static_cast<double>(x) - scale * static_cast<double>(q[k - run * kRun]);
            difference += miss * miss;
        }
    }
    // Hoelder: sum step^2 E <= (sum step^4)^(1/2) (sum E^2)^(1/2), and sum step c / 2 where c is a scale: what a
    // group's bias is rounded by is at most 0.51 (with the rounding of its own sum).
    const double of_steps = kDeviations * ::sqrt(::sqrt(energies) / 12.0) + 0.51 * ::pow(rounding, 0.75);
    // The sums of both products are rounded K times at most, each by 2^-24 of what is summed.
    const double rounded = static_cast<double>(2 * a.K + 16) * 0x1p-24 * (::sqrt(squares) + ::sqrt(difference));
    return {static_cast<float>(of_steps * (1.0 + 1e-5)),  // what comes is rounded, too
            static_cast<float>(::sqrt(difference) * (1.0 + 1e-5) + 2.0 * rounded)};
}

// Multiplies the listed blocks of the head exactly.
void multiply_listed(const Weight& head, const Activations& a, const int32_t* list, int64_t count, View y) {
    const int64_t N = head.rows, room = work_bytes(head, a.T);
    const Format stored = head.segment[0].format;
    const Product product = product_of(head, stored, a.T);
    uint8_t* const work = static_cast<uint8_t*>(scratch(static_cast<size_t>(room * thread_count())));
    parallel_for(count, 1, [&](int64_t begin, int64_t end, int thread) {
        float* const sums = reinterpret_cast<float*>(work + thread * room);
        uint8_t* const form = work + thread * room + round_up(a.T, 12) * kSumStride * 4;
        for (int64_t i = begin; i < end; ++i) {
            const uint8_t* block = head.block(0, 0, list[i]);
            if (product.format != stored) {
                expand_block(stored, block, a.K, reinterpret_cast<float*>(form));
                block = form;
            }
            multiply_blocks(product, 1, block, 0, a, sums, form, {});
            const int64_t n = list[i] * kBlockRows;
            for (int64_t t = 0; t < a.T; ++t)
                store_n(y.f32() + t * N + n, load(sums + t * kSumStride), min64(kBlockRows, N - n));
        }
    });
}

// What may be chosen in one row of logits, and what it is worth there.
struct Choice {
    int64_t limit;
    View unused;
    Penalties penalties;
    TextIds text;
    const uint64_t* special;  // a bit for each id: its logit is not what counts

    DELTAIC_INLINE uint32_t special_of(int64_t block) const {
        const int64_t n = block * kBlockRows;
        return static_cast<uint32_t>(special[n / 64] >> n % 64 & 0xffffu);
    }
    // Of a special id: never above what counts for a larger logit.
    float worth(int64_t id, float logit) const {
        if (id >= limit) return -kInfinity;
        for (int64_t i = 0; i < unused.shape[0]; ++i)
            if (unused.i64()[i] == id) return -kInfinity;
        if (!text.held) return logit;
        const int64_t drafted = text.drafted(id);
        if (drafted == 0 && !text.is_held(id)) return logit;
        return static_cast<float>(penalties.apply(static_cast<double>(logit), text.generated[id] + drafted));
    }
};

// For row t of the logits of N ids.
Choice choice_of(int64_t N, int64_t limit, const View& unused, const Penalties& penalties, const Texts& texts,
                 int64_t t) {
    const int64_t words = ceil_div(N, 64);
    uint64_t* const special = static_cast<uint64_t*>(scratch(static_cast<size_t>(words) * 8));
    Choice choice{limit, unused, penalties, texts.any() ? texts.before(t) : TextIds{}, special};
    const auto mark = [&](int64_t id) {
        if (id >= 0 && id < N) special[id / 64] |= uint64_t{1} << id % 64;
    };
    for (int64_t w = 0; w < words; ++w)
        special[w] = choice.text.held && w * 64 < limit ? static_cast<uint64_t>(choice.text.held[w]) : 0;
    for (int64_t i = 0; i < choice.text.count; ++i) mark(choice.text.drafts[i]);
    for (int64_t i = 0; i < unused.shape[0]; ++i) mark(unused.i64()[i]);
    for (int64_t id = limit; id < N; ++id) mark(id);
    return choice;
}

// The largest that any of the 16 rows of a block may be worth, their logits being at most `upper`.
float most_worth(f32x16 upper, int64_t block, int64_t N, const Choice& choice) {
    const int64_t first = block * kBlockRows, rows = min64(kBlockRows, N - first);
    const uint32_t special = choice.special_of(block);
    if (special == 0 && rows == kBlockRows) return reduce_max(upper);
    float lanes[16], largest = -kInfinity;
    store(lanes, upper);
    for (int64_t r = 0; r < rows; ++r) {
        const float value = special >> r & 1 ? choice.worth(first + r, lanes[r]) : lanes[r];
        if (!(value <= largest)) largest = value;  // NaN is taken
    }
    return largest;
}

// The k-th largest of what is known exactly; -inf if that is less than k.
float kth_largest(const float* logits, const int32_t* list, int64_t count, int64_t N, int64_t k, const Choice& choice) {
    float* const values = scratch_f32(count * kBlockRows);
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t first = list[i] * kBlockRows;
        const uint32_t special = choice.special_of(list[i]);
        for (int64_t r = 0; r < min64(kBlockRows, N - first); ++r)
            values[n++] = special >> r & 1 ? choice.worth(first + r, logits[first + r]) : logits[first + r];
    }
    const float least = threshold(values, n, k, k);
    float found = kInfinity;
    for (int64_t i = 0; i < n; ++i)
        if (values[i] >= least && values[i] < found) found = values[i];
    return n < k ? -kInfinity : found;
}

}  // namespace

void pack_screen(const Weight& head, View dither, View sketch, View bounds) {
    const int64_t K = head.columns, blocks = head.segment[0].blocks, bytes = block_bytes(Format::int4, K);
    const Format format = head.segment[0].format;
    if (head.segments != 1 || head.glu) fail("pack_screen", "head must be one matrix of one format");
    if (sketch.shape[0] != blocks * bytes) fail("pack_screen", "sketch has another size than the head's int4 would");
    if (bounds.shape[0] != blocks) fail("pack_screen", "bounds must have a row for each block of 16 rows");
    const int64_t room = round_up(K, kRun) * 16;
    float* const work = scratch_f32(room * thread_count());
    parallel_for(blocks, 8, [&](int64_t begin, int64_t end, int thread) {
        float* const wide = work + thread * room;
        memset(wide + K * 16, 0, static_cast<size_t>(room - K * 16) * 4);
        for (int64_t b = begin; b < end; ++b) {
            RowBound rows[kBlockRows];
            if (format == Format::f32) {
                memcpy(wide, head.block(0, 0, b), static_cast<size_t>(K) * 64);
            } else {
                expand_block(format, head.block(0, 0, b), K, wide);
            }
            pack_block(wide, K, dither.f32(), sketch.u8() + b * bytes, rows);
            double fourth = 0.0, squares = 0.0;
            for (const RowBound& row : rows) {
                fourth = row.fourth < fourth ? fourth : row.fourth;  // NaN is taken
                squares = row.squares < squares ? squares : row.squares;
            }
            bounds.f32()[b * 2] = static_cast<float>(::pow(fourth, 0.25) * (1.0 + 1e-6));  // and rounded
            bounds.f32()[b * 2 + 1] = static_cast<float>(::sqrt(squares) * (1.0 + 1e-6));
        }
    });
}

void linear_top(View x, const Weight& head, const Weight& sketch, View dither, View bounds, View history, View norm,
                float eps, int64_t k, double presence_penalty, double frequency_penalty, double repetition_penalty,
                int64_t limit, View unused, Views seen, View cu_seqlens, View fed, View y) {
    const char* const op = "linear_top";
    const int64_t T = x.shape[0], K = head.columns, N = head.rows, blocks = head.segment[0].blocks;
    const Penalties penalties{presence_penalty, frequency_penalty, repetition_penalty};
    penalties.check(op);
    if (head.segments != 1 || head.glu || sketch.segments != 1 || sketch.segment[0].format != Format::int4)
        fail(op, "head and sketch must be one matrix each, and the sketch int4");
    if (bounds.shape[0] != blocks) fail(op, "bounds must have a row for each block of 16 rows");
    if (k < 1) fail(op, "k must be at least 1");
    if (limit < 1 || limit > N) fail(op, "limit must be between 1 and the number of logits");
    const Texts texts(op, seen, cu_seqlens, fed, T, limit);
    int64_t &rest = history.i64()[0], &last_rest = history.i64()[1];
    const auto everything = [&] { linear(x, head, norm, eps, View{}, 0, View{}, y); };
    if (T > kMostRows || !penalties.only_lower()) return everything();
    if (rest > 0) return --rest, everything();

    Forms forms = wanted_forms(head);
    forms.integers = true;
    const Activations a = prepare(x.f32(), T, K, norm, eps, forms);
    Activations dithered = a;
    int16_t* const bias = static_cast<int16_t*>(scratch(static_cast<size_t>(a.stride * a.runs) * 16 + 2));
    dithered.group_bias = bias;
    Margin margins[kMostRows];
    Choice choices[kMostRows];
    for (int64_t t = 0; t < T; ++t) {
        margins[t] = measure(head, a, t, dither.f32(), bias);
        choices[t] = choice_of(N, limit, unused, penalties, texts, t);
    }

    float* const most = scratch_f32(T * blocks);  // that any row of a block may be worth
    multiply_all(sketch, dithered, {}, [&](int, int64_t pair, int64_t t, f32x16 even, f32x16 odd) {
        for (int64_t b = pair * 2; b < min64(blocks, pair * 2 + 2); ++b) {
            const float* const of = bounds.f32() + b * 2;
            const float margin = margins[t].of_steps * of[0] + margins[t].of_norm * of[1];
            most[t * blocks + b] = most_worth(add(b % 2 ? odd : even, set1(margin)), b, N, choices[t]);
        }
    });

    uint8_t* const is_exact = static_cast<uint8_t*>(scratch(static_cast<size_t>(blocks)));
    int32_t* const list = static_cast<int32_t*>(scratch(static_cast<size_t>(blocks) * 4));
    memset(is_exact, 0, static_cast<size_t>(blocks));
    int64_t listed = 0;
    const auto take = [&](int64_t t, float least) {
        for (int64_t b = 0; b < blocks; ++b)
            if (!is_exact[b] && !(most[t * blocks + b] < least))
                list[listed++] = static_cast<int32_t>(b), is_exact[b] = 1;
    };
    const int64_t of_head = block_bytes(head.segment[0].format, K);
    const auto pays = [&] { return blocks * block_bytes(Format::int4, K) + listed * of_head < blocks * of_head; };
    for (int64_t t = 0; t < T; ++t) take(t, threshold(most + t * blocks, blocks, k, 2 * k));
    if (pays()) {
        multiply_listed(head, a, list, listed, y);
        float least[kMostRows];
        for (int64_t t = 0; t < T; ++t) least[t] = kth_largest(y.f32() + t * N, list, listed, N, k, choices[t]);
        const int64_t before = listed;
        for (int64_t t = 0; t < T; ++t) take(t, least[t]);
        if (pays()) {
            multiply_listed(head, a, list + before, listed - before, y);
            parallel_for(T * blocks, 1024, [&](int64_t begin, int64_t end, int) {
                for (int64_t i = begin; i < end; ++i) {
                    const int64_t t = i / blocks, b = i % blocks, n = b * kBlockRows;
                    if (!is_exact[b]) store_n(y.f32() + t * N + n, set1(-kInfinity), min64(kBlockRows, N - n));
                }
            });
            last_rest /= 2;
            return;
        }
    }
    rest = last_rest = min64(kLongestRest, max64(8, 2 * last_rest));
    everything();
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
