// sample_rows and log_softmax_top: what is done with the 248,320 logits of one token; count_tokens.
//
// Nothing here sorts or copies the whole vocabulary unless the distribution is so flat that it has to. One pass takes
// the maxima of 64 logits each. If k of these maxima reach a threshold, then so do at least k logits, and all logits
// above it lie in those few groups: they are gathered and sorted, and hold the first part of the descending order.
// Where the filters reach further, only the ranges of logits in which they and the draw end are sorted (Ranges). Logits
// changed by a penalty (few) are kept aside, in double precision, and -inf in the passes; candidates are compared and
// summed in double precision.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/penalty.h"
#include "cpu/simd.h"
#include "cpu/threshold.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

constexpr int64_t kRows = 64;           // logits of one group: one lane of 64 vectors
constexpr int64_t kStrip = kRows * 16;  // 16 groups, logits [strip * 1024 + row * 16 + lane]
constexpr int64_t kFew = 64;            // candidates looked at first where top_k does not say how many
constexpr int64_t kInserted = 64;       // candidates up to which an insertion sort is faster than counting digits
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.40282347e38f;

struct Changed {
    int64_t id;
    double value;
};

struct Logits {
    float* values;  // -inf where they are in `changed`
    int64_t limit;
    Changed* changed = nullptr;
    int64_t changes = 0;
    bool valid = true;        // of what was changed, neither NaN nor +inf
    float* maxima = nullptr;  // [strips][16], without changed logits
    int64_t groups = 0;
    double top = 0.0;  // the largest of all

    // 16 logits; -inf past the end.
    DELTAIC_INLINE f32x16 lanes(int64_t i) const {
        if (i + 16 <= limit) return load(values + i);
        float t[16];
        for (int64_t j = 0; j < 16; ++j) t[j] = i + j < limit ? values[i + j] : -kInfinity;
        return load(t);
    }
};

struct Candidate {
    uint64_t key;  // ascending keys are descending logits
    int64_t id;
};

DELTAIC_INLINE uint64_t key_of(double value) {
    value += 0.0;  // -0 and 0 are equal
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits >> 63 ? bits : ~bits & ~(uint64_t{1} << 63);
}

DELTAIC_INLINE double value_of(uint64_t key) {
    const uint64_t bits = key >> 63 ? key : ~key & ~(uint64_t{1} << 63);
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

// Fills maxima and top. False where they tell nothing: NaN or +inf, or nothing but -inf.
bool take_maxima(Logits& l) {
    const int64_t strips = ceil_div(l.limit, kStrip);
    l.groups = strips * 16;
    l.maxima = scratch_f32(l.groups);
    parallel_for(strips, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t s = begin; s < end; ++s) {
            const int64_t last = min64(l.limit, (s + 1) * kStrip);
            f32x16 largest = set1(-kInfinity), bad = zero();
            for (int64_t i = s * kStrip; i < last; i += 16) {
                const f32x16 x = l.lanes(i);
                largest = max(largest, x);
                bad = fma(max(set1(-kLargest), x), zero(),
                          bad);  // NaN where x is NaN or +inf; this order of max keeps a NaN
            }
            store(l.maxima + s * 16, add(largest, bad));
        }
    });
    double top = -kInfinity;
    bool valid = l.valid;
    for (int64_t g = 0; g < l.groups; ++g) {
        valid = valid && l.maxima[g] <= kLargest;
        if (l.maxima[g] > top) top = l.maxima[g];
    }
    for (int64_t i = 0; i < l.changes; ++i)
        if (l.changed[i].value > top) top = l.changed[i].value;
    l.top = top;
    return valid && top > -kInfinity;
}

[[noreturn]] void fail_unusable(const char* op) {
    fail(op, "logits hold NaN or +inf, or nothing but -inf; the model's output cannot be used");
}

// A value that at least k logits reach (or all, if there are fewer), and not many more: seen from the maxima, or from
// the logits themselves where there are not so many maxima.
float reached_by(const Logits& l, int64_t k) {
    if (k <= l.groups) return threshold(l.maxima, l.groups, k, 2 * k);
    const int64_t n = round_up(l.limit, 16);
    float* values = scratch_f32(n);
    for (int64_t i = 0; i < n; i += 16) store(values + i, l.lanes(i));
    return threshold(values, n, k, 2 * k);
}

// One step of a stable radix sort; false if all digits are equal and nothing was moved.
template <class Digit>
bool distribute(const Candidate* from, Candidate* to, int64_t n, const Digit& digit) {
    int64_t start[256] = {};
    for (int64_t i = 0; i < n; ++i) ++start[digit(from[i])];
    if (start[digit(from[0])] == n) return false;
    int64_t sum = 0;
    for (int d = 0; d < 256; ++d) {
        const int64_t count = start[d];
        start[d] = sum;
        sum += count;
    }
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i])]++] = from[i];
    return true;
}

// All logits >= `least`, in descending order, equal ones by ascending id.
struct Ordered {
    const Candidate* items;
    int64_t size;
};

// Sorts the `n` candidates in a; b is room for as many.
Ordered in_order(Candidate* a, Candidate* b, int64_t n, int64_t limit) {
    if (n <= kInserted) {
        for (int64_t i = 1; i < n; ++i) {
            const Candidate c = a[i];
            int64_t place = i;
            for (; place > 0; --place) {
                const Candidate& before = a[place - 1];
                if (before.key < c.key || (before.key == c.key && before.id < c.id)) break;
                a[place] = before;
            }
            a[place] = c;
        }
        return {a, n};
    }
    const auto step = [&](const auto& digit) {
        if (distribute(a, b, n, digit)) {
            Candidate* sorted = b;
            b = a;
            a = sorted;
        }
    };
    for (int shift = 0; limit >> shift; shift += 8) step([=](const Candidate& c) { return c.id >> shift & 255; });
    for (int shift = 0; shift < 64; shift += 8) step([=](const Candidate& c) { return c.key >> shift & 255; });
    return {a, n};
}

Ordered gather(const Logits& l, float least) {
    int64_t capacity = l.changes;
    for (int64_t g = 0; g < l.groups; ++g) capacity += l.maxima[g] >= least ? kRows : 0;
    const size_t bytes = static_cast<size_t>(capacity) * sizeof(Candidate);
    Candidate *a = static_cast<Candidate*>(scratch(bytes)), *b = static_cast<Candidate*>(scratch(bytes));
    int64_t n = 0;
    for (int64_t g = 0; g < l.groups; ++g) {
        if (!(l.maxima[g] >= least)) continue;
        const int64_t first = g / 16 * kStrip + g % 16, last = min64(l.limit, (g / 16 + 1) * kStrip);
        for (int64_t id = first; id < last; id += 16)
            if (l.values[id] >= least) a[n++] = {key_of(l.values[id]), id};
    }
    for (int64_t i = 0; i < l.changes; ++i)
        if (l.changed[i].value >= least) a[n++] = {key_of(l.changed[i].value), l.changed[i].id};
    return in_order(a, b, n, l.limit);
}

// sum of e^((logit - top) / temperature)
double sum_exp(const Logits& l, double temperature) {
    float* sums = scratch_f32(l.groups);
    const f32x16 top = set1(static_cast<float>(l.top));
    const double inverse = 1.0 / temperature;
    const f32x16 scale = set1(inverse < kLargest ? static_cast<float>(inverse) : kLargest);
    parallel_for(l.groups / 16, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t s = begin; s < end; ++s) {
            const int64_t last = min64(l.limit, (s + 1) * kStrip);
            f32x16 sum = zero();
            for (int64_t i = s * kStrip; i < last; i += 16) sum = add(sum, exp(mul(sub(l.lanes(i), top), scale)));
            store(sums + s * 16, sum);
        }
    });
    double sum = 0.0;
    for (int64_t g = 0; g < l.groups; ++g) sum += static_cast<double>(sums[g]);
    for (int64_t i = 0; i < l.changes; ++i) sum += ::exp((l.changed[i].value - l.top) / temperature);
    return sum;
}

// Lowest id among the largest logits.
int64_t largest(const Logits& l) {
    int64_t best = l.limit;
    for (int64_t i = 0; i < l.changes; ++i)
        if (l.changed[i].value == l.top) best = min64(best, l.changed[i].id);
    for (int64_t g = 0; g < l.groups; ++g) {
        if (static_cast<double>(l.maxima[g]) != l.top) continue;
        const int64_t last = min64(l.limit, (g / 16 + 1) * kStrip);
        for (int64_t id = g / 16 * kStrip + g % 16; id < last; id += 16)
            if (l.values[id] == l.maxima[g]) best = min64(best, id);
    }
    return best;
}

struct Filter {
    double temperature, top_p, min_p;
};

// Index of the chosen candidate, or -1 if the candidates do not reach far enough. `all`: there are no others.
// `mass` is the sum of e^((logit - top) / temperature) that probabilities refer to.
int64_t draw(const Ordered& c, bool all, double mass, const Filter& filter, double uniform) {
    double* cumulative = static_cast<double*>(scratch(static_cast<size_t>(c.size) * sizeof(double)));
    const double top = value_of(c.items[0].key), largest = 1.0 / mass;
    double sum = 0.0;
    int64_t kept = 0;
    bool closed = all;  // is `kept` final?
    while (kept < c.size) {
        const double p = ::exp((value_of(c.items[kept].key) - top) / filter.temperature) / mass;
        if (p < filter.min_p * largest) {
            closed = true;
            break;
        }
        cumulative[kept++] = sum += p;
        if (filter.top_p < 1.0 && sum >= filter.top_p) {
            closed = true;
            break;
        }
    }
    // Without filters the rest counts too, and its sum is known.
    const bool open = !closed && filter.top_p >= 1.0 && filter.min_p <= 0.0;
    if (!closed && !open) return -1;
    const double target = uniform * (closed ? sum : 1.0);
    for (int64_t i = 0; i < kept; ++i)
        if (cumulative[i] > target) return i;
    return closed ? kept - 1 : -1;
}

// For distributions so flat that the candidates would be most of the vocabulary: the mass of each small range of
// logits, from the top down, says in which range the filters and the draw end, and only those are sorted. Sums do not
// depend on the order: within a range they are of whole numbers.
class Ranges {
  public:
    Ranges(const Logits& l, double temperature) : l_(l), temperature_(temperature), top_(static_cast<float>(l.top)) {
        const double inverse = 1.0 / temperature;
        scale_ = inverse < kLargest ? static_cast<float>(inverse) : kLargest;
        const int64_t cells = kRanges * thread_count();
        int64_t* sums = static_cast<int64_t*>(scratch(static_cast<size_t>(cells) * sizeof(int64_t)));
        for (int64_t i = 0; i < cells; ++i) sums[i] = 0;
        parallel_for(l.groups / 16, 16, [&](int64_t begin, int64_t end, int thread) {
            int64_t* sum = sums + thread * kRanges;
            int32_t range[kStrip], weight[kStrip];
            for (int64_t s = begin; s < end; ++s) {
                const int64_t first = s * kStrip, n = min64(l.limit - first, kStrip);
                for (int64_t i = 0; i < n; i += 16) {
                    const f32x16 depth = depth_of(l.lanes(first + i)), index = range_of(depth);
                    // e^-d for |d| <= 1/128, to its cube (relative error below 2e-10).
                    const f32x16 d = fma(index, set1(-1.0f / kPerUnit), depth);
                    const f32x16 e = fma(fma(fma(set1(-1.0f / 6), d, set1(0.5f)), d, set1(-1.0f)), d, set1(1.0f));
                    store_rounded(range + i, index);
                    store_rounded(weight + i, if_less(index, set1(kLast), mul(e, set1(kWhole)), zero()));
                }
                for (int64_t i = 0; i < n; ++i) sum[range[i]] += weight[i];
            }
        });
        mass_ = static_cast<double*>(scratch(kRanges * sizeof(double)));
        const double step = ::exp(-1.0 / kPerUnit);
        double unit = 1.0 / kWhole;
        for (int64_t r = 0; r < kRanges; ++r, unit *= step) {
            int64_t sum = 0;
            for (int64_t i = r; i < cells; i += kRanges) sum += sums[i];
            mass_[r] = static_cast<double>(sum) * unit;
        }
        for (int64_t i = 0; i < l.changes; ++i) {
            const int64_t r = range_of(l.changed[i].value);
            if (r < kRanges - 1) mass_[r] += mass_of(l.changed[i].value);
        }
        for (int64_t r = 0; r < kRanges; ++r) total_ += mass_[r];
        const size_t bytes = static_cast<size_t>(l.groups) * kRows * sizeof(Candidate);
        found_ = static_cast<Candidate*>(scratch(bytes));
        spare_ = static_cast<Candidate*>(scratch(bytes));
        counts_ = static_cast<int64_t*>(scratch(static_cast<size_t>(l.groups / 16) * sizeof(int64_t)));
    }

    int64_t draw(double top_p, double min_p, double uniform) const {
        double kept = total_;
        if (top_p < 1.0 || min_p > 0.0) {
            double before = 0.0;
            int64_t last = find(top_p < 1.0 ? top_p * total_ : total_, before);
            if (min_p > 0.0) {
                const int64_t least = range_of(l_.top + temperature_ * ::log(min_p));
                if (least < last) last = least, before = mass_above(last);
            }
            const Ordered c = gather(last);
            for (int64_t i = 0; i < c.size && !(top_p < 1.0 && before >= top_p * total_); ++i) {
                const double mass = mass_of(value_of(c.items[i].key));
                if (mass < min_p) break;
                before += mass;
            }
            kept = before;
        }
        double before = 0.0;
        const Ordered c = gather(find(uniform * kept, before));
        int64_t i = 0;
        while (i + 1 < c.size && (before += mass_of(value_of(c.items[i].key))) <= uniform * kept) ++i;
        return c.items[i].id;
    }

  private:
    static constexpr int64_t kRanges = 2048;
    static constexpr float kPerUnit = 64.0f;     // ranges per unit of depth
    static constexpr float kLast = kRanges - 1;  // depths of 32 and more: at most 3e-9 of the whole, which is left out
    static constexpr float kWhole = int64_t{1} << 30;  // a weight of 1

    // (top - logit) / temperature
    DELTAIC_INLINE f32x16 depth_of(f32x16 x) const { return mul(sub(set1(top_), x), set1(scale_)); }
    static DELTAIC_INLINE f32x16 range_of(f32x16 depth) {
        const f32x16 index = mul(depth, set1(kPerUnit)), last = set1(kLast);
        return round(if_less(index, last, index, last));  // a depth that is NaN (infinity * 0) is in the last one
    }
    int64_t range_of(double value) const {
        int32_t index[16];
        store_rounded(index, range_of(depth_of(set1(static_cast<float>(value)))));
        return index[0];
    }
    // Of one logit; that of the largest is 1.
    double mass_of(double value) const { return ::exp((value - l_.top) / temperature_); }

    double mass_above(int64_t r) const {
        double sum = 0.0;
        for (int64_t i = 0; i < r; ++i) sum += mass_[i];
        return sum;
    }

    // The range in which the running mass exceeds `target`, or the last that has any; `before`: the mass above it.
    int64_t find(double target, double& before) const {
        int64_t found = 0;
        double sum = 0.0;
        for (int64_t r = 0; r < kRanges && sum <= target; ++r) {
            if (mass_[r] == 0.0) continue;
            found = r, before = sum;
            sum += mass_[r];
        }
        return found;
    }

    // The logits of a range: those of each strip in its own room, then together.
    Ordered gather(int64_t r) const {
        const f32x16 wanted = set1(static_cast<float>(r));
        parallel_for(l_.groups / 16, 16, [&](int64_t begin, int64_t end, int) {
            for (int64_t s = begin; s < end; ++s) {
                Candidate* const room = found_ + s * kStrip;
                int64_t n = 0;
                for (int64_t i = s * kStrip; i < min64(l_.limit, (s + 1) * kStrip); i += 16) {
                    const f32x16 index = range_of(depth_of(l_.lanes(i)));
                    const uint32_t others = less_bits(index, wanted) | less_bits(wanted, index);
                    for (uint32_t bits = ~others & 0xffffu; bits; bits &= bits - 1) {
                        const int64_t id = i + __builtin_ctz(bits);
                        if (id < l_.limit && l_.values[id] > -kInfinity)
                            room[n++] = {key_of(static_cast<double>(l_.values[id])), id};
                    }
                }
                counts_[s] = n;
            }
        });
        int64_t n = 0;
        for (int64_t s = 0; s < l_.groups / 16; ++s)
            for (int64_t i = 0; i < counts_[s]; ++i) found_[n++] = found_[s * kStrip + i];
        for (int64_t i = 0; i < l_.changes; ++i) {
            const Changed& c = l_.changed[i];
            if (range_of(c.value) == r && c.value > -kInfinity) found_[n++] = {key_of(c.value), c.id};
        }
        return in_order(found_, spare_, n, l_.limit);
    }

    const Logits& l_;
    double temperature_, total_ = 0.0;
    float top_, scale_;
    double* mass_;
    Candidate *found_, *spare_;
    int64_t* counts_;
};

bool is_finite(double value) { return value - value == 0.0; }

// What is asked of a distribution after its penalties.
struct Choice {
    double temperature;
    int64_t top_k;
    double top_p, min_p, uniform;
};

void check(const char* op, const Choice& c, int64_t limit, int64_t logits) {
    if (limit < 1 || limit > logits) fail(op, "limit must be between 1 and the number of logits");
    if (!(c.temperature >= 0.0) || !is_finite(c.temperature)) fail(op, "temperature must be a finite number >= 0");
    if (c.top_k < 0) fail(op, "top_k must be >= 0 (0: off)");
    if (!(c.top_p >= 0.0 && c.top_p <= 1.0)) fail(op, "top_p must be between 0 and 1 (1: off)");
    if (!(c.min_p >= 0.0 && c.min_p <= 1.0)) fail(op, "min_p must be between 0 and 1 (0: off)");
    if (!(c.uniform >= 0.0 && c.uniform < 1.0)) fail(op, "uniform must be at least 0 and below 1");
}

// Keeps aside what the logits become of the ids in a text.
void penalise(Logits& l, const Penalties& p, const TextIds& text) {
    const int64_t words = ceil_div(l.limit, 64), count = text.count, *const drafts = text.drafts;
    int64_t room = count;
    for (int64_t w = 0; w < words; ++w) room += __builtin_popcountll(static_cast<uint64_t>(text.held[w]));
    if (room == 0) return;
    l.changed = static_cast<Changed*>(scratch(static_cast<size_t>(room) * sizeof(Changed)));
    for (int64_t w = 0; w < words; ++w)
        for (uint64_t bits = static_cast<uint64_t>(text.held[w]); bits; bits &= bits - 1) {
            const int64_t id = w * 64 + __builtin_ctzll(bits);
            if (id < l.limit) l.changed[l.changes++].id = id;
        }
    for (int64_t i = 0; i < count; ++i) {
        bool known = drafts[i] < 0 || drafts[i] >= l.limit || text.is_held(drafts[i]);
        for (int64_t j = 0; j < i; ++j) known = known || drafts[j] == drafts[i];
        if (!known) l.changed[l.changes++].id = drafts[i];
    }
    constexpr int64_t kAhead = 16;  // they lie far from each other
    for (int64_t i = 0; i < l.changes; ++i) {
        if (i + kAhead < l.changes) prefetch(l.values + l.changed[i + kAhead].id);
        if (i + kAhead < l.changes) prefetch(text.generated + l.changed[i + kAhead].id);
        const int64_t id = l.changed[i].id;
        double value = p.apply(static_cast<double>(l.values[id]), text.generated[id] + text.drafted(id));
        l.valid = l.valid && l.values[id] <= kLargest && value < kInfinity;
        if (is_finite(value) && value < -kLargest) value = -kLargest;
        l.values[id] = -kInfinity;
        l.changed[i].value = value;
    }
}

// -1: the logits cannot be used.
int64_t choose(Logits& l, const Choice& choice) {
    const double temperature = choice.temperature, top_p = choice.top_p, min_p = choice.min_p, uniform = choice.uniform;
    if (!take_maxima(l)) return -1;
    if (temperature == 0.0) return largest(l);
    const Filter filter{temperature, top_p, min_p};
    if (choice.top_k > 0) {
        const float least = reached_by(l, choice.top_k);
        Ordered c = gather(l, least < -kLargest ? -kLargest : least);  // -inf is not among the candidates
        c.size = min64(c.size, choice.top_k);
        double mass = 0.0;
        for (int64_t i = 0; i < c.size; ++i) mass += ::exp((value_of(c.items[i].key) - l.top) / temperature);
        return c.items[draw(c, true, mass, filter, uniform)].id;
    }
    const bool summed = top_p < 1.0 || min_p <= 0.0;  // else probabilities relative to the largest are enough
    const double mass = summed ? sum_exp(l, temperature) : 1.0;
    // At least so many candidates are needed. No logit below `lowest` passes min_p; the draw sees to float's rounding.
    const double needed = summed ? mass * (top_p < 1.0 ? top_p : uniform) : 0.0;
    float lowest = -kLargest;  // -inf is not among the candidates
    if (min_p > 0.0) {
        const double edge = l.top + temperature * ::log(min_p);
        lowest = static_cast<float>(edge - 1e-6 * (edge < 0.0 ? -edge : edge) - 1e-30);
    }
    if (needed < kFew) {
        float least = reached_by(l, kFew);
        if (!(least > lowest)) least = lowest;
        const Ordered c = gather(l, least);
        const int64_t chosen = c.size > 0 ? draw(c, least == lowest, mass, filter, uniform) : -1;
        if (chosen >= 0) return c.items[chosen].id;
    }
    return Ranges(l, temperature).draw(top_p, min_p, uniform);
}

}  // namespace

void count_tokens(View ids, Views seen) {
    for (int64_t b = 0; b < seen.size; ++b) {
        const int64_t words = seen[b].shape[1];
        for (int64_t s = 0; s < ids.shape[1]; ++s) {
            const int64_t id = ids.i64()[b * ids.shape[1] + s];
            if (id < 0) continue;
            if (id >= 64 * words) fail("count_tokens", "ids must be ids of the vocabulary, or negative");
            seen[b].i64()[id / 64] |= static_cast<int64_t>(uint64_t{1} << id % 64);
            ++seen[b].i64()[words + id];
        }
    }
}

void sample_rows(View logits, double temperature, int64_t top_k, double top_p, double min_p, double presence_penalty,
                 double frequency_penalty, double repetition_penalty, int64_t limit, View unused, View draws,
                 Views seen, View cu_seqlens, View fed, View tokens) {
    const char* const op = "sample_rows";
    const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
    const Penalties penalties{presence_penalty, frequency_penalty, repetition_penalty};
    penalties.check(op);
    for (int64_t i = 0; i < unused.shape[0]; ++i)
        if (unused.i64()[i] < 0 || unused.i64()[i] >= vocabulary) fail(op, "unused must hold ids of the vocabulary");
    const Texts texts(op, seen, cu_seqlens, fed, rows, limit);
    for (int64_t t = 0; t < rows; ++t) {
        float* const row = logits.f32() + t * vocabulary;
        for (int64_t i = 0; i < unused.shape[0]; ++i) row[unused.i64()[i]] = -kInfinity;
        const double uniform = static_cast<double>(draws.i64()[t]) * 0x1p-53;
        const Choice choice{temperature, top_k, top_p, min_p, uniform};
        check(op, choice, limit, vocabulary);
        Logits l{row, limit};
        if (texts.any()) penalise(l, penalties, texts.before(t));
        tokens.i64()[t] = choose(l, choice);
    }
}

void log_softmax_top(View logits, int64_t limit, int64_t k, int64_t token, View logprob, View top_ids,
                     View top_logprobs) {
    const char* const op = "log_softmax_top";
    if (limit < 1 || limit > logits.shape[0]) fail(op, "limit must be between 1 and the number of logits");
    if (k < 0 || k > limit) fail(op, "k must be between 0 and limit");
    if (token < 0 || token >= limit) fail(op, "token must be at least 0 and below limit");
    Logits l{logits.f32(), limit};
    if (!take_maxima(l)) fail_unusable(op);
    const double log_sum = ::log(sum_exp(l, 1.0));
    logprob.f32()[0] = static_cast<float>(static_cast<double>(l.values[token]) - l.top - log_sum);
    if (k == 0) return;
    const Ordered c = gather(l, reached_by(l, k));
    for (int64_t i = 0; i < k; ++i) {
        top_ids.i64()[i] = c.items[i].id;
        top_logprobs.f32()[i] = static_cast<float>(value_of(c.items[i].key) - l.top - log_sum);
    }
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
