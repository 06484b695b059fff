// moe: sparse feed-forward. Tokens are grouped by expert, so that the weights of an expert are read once however many
// tokens chose it, and those of an expert that nobody chose not at all. The shared expert is one more group, of all
// tokens.
//
// Two parallel regions do the work. The first runs over (expert, pair of blocks) of gate_up: all outputs are
// independent. The second runs over pairs of blocks of the output columns, and each pair goes through the experts in
// ascending order, the shared one last: no two threads add to the same output, and a token's sum has one order whoever
// shares its batch.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/gemm.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// A group: the tokens of one expert. Its rows are [first, first + count) of the hidden activations.
struct Group {
    int64_t expert, first, count;
};

// Which tokens go to which expert, and with what coefficient. Rows are sorted by expert, then by token.
struct Routing {
    Group* groups;
    int64_t size;         // groups with at least one token
    int64_t* tokens;      // [T * top_k] token of a row
    float* coefficients;  // [T * top_k]
};

// The top_k largest of n logits, equal ones by lower index, and their softmax.
void choose_experts(const float* logits, int64_t n, int64_t top_k, int64_t* experts, float* coefficients) {
    for (int64_t e = 0; e < n; ++e) {
        int64_t place = min64(e, top_k);
        while (place > 0 && logits[e] > logits[experts[place - 1]]) {
            if (place < top_k) experts[place] = experts[place - 1];
            --place;
        }
        if (place < top_k) experts[place] = e;
    }
    float sum = 0.0f;
    for (int64_t j = 0; j < top_k; ++j) sum += coefficients[j] = expf(logits[experts[j]] - logits[experts[0]]);
    for (int64_t j = 0; j < top_k; ++j) coefficients[j] /= sum;
}

// experts, coefficients [T, top_k] -> rows sorted by expert
Routing route(const int64_t* experts, const float* coefficients, int64_t T, int64_t top_k, int64_t E) {
    const int64_t rows = T * top_k;
    Routing r;
    r.groups = static_cast<Group*>(scratch(static_cast<size_t>(E) * sizeof(Group)));
    r.tokens = static_cast<int64_t*>(scratch(static_cast<size_t>(rows) * sizeof(int64_t)));
    r.coefficients = scratch_f32(rows);
    int64_t* next = static_cast<int64_t*>(scratch(static_cast<size_t>(E) * sizeof(int64_t)));
    for (int64_t e = 0; e < E; ++e) next[e] = 0;
    for (int64_t i = 0; i < rows; ++i) ++next[experts[i]];
    r.size = 0;
    int64_t first = 0;
    for (int64_t e = 0; e < E; ++e) {
        const int64_t count = next[e];
        if (count > 0) r.groups[r.size++] = {e, first, count};
        next[e] = first;
        first += count;
    }
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = next[experts[i]]++;
        r.tokens[row] = i / top_k;
        r.coefficients[row] = coefficients[i];
    }
    return r;
}

// Asks for the first blocks of the expert that comes next: a stream of weights looks ahead within one expert only.
DELTAIC_INLINE void prefetch_head(const uint8_t* w) {
    for (int64_t i = 0; i < 8192; i += 64) prefetch_far(w + i);
}

// hidden[t] = silu(x[t] Wg^T) * (x[t] Wu^T) for pairs [begin, end) of blocks
DELTAIC_INLINE void glu_pairs(const Weight& w, int64_t expert, int64_t begin, int64_t end, const Activations& x,
                              uint8_t* work, int64_t I, float* hidden) {
    multiply_pairs(w, expert, begin, end, x, work, {}, [&](int, int64_t pair, int64_t t, f32x16 gate, f32x16 up) {
        store_n(hidden + t * I + pair * 16, mul(silu(gate), up), I - pair * 16);
    });
}

// y[t] += coefficient * (hidden[i] Wd^T) for pairs [begin, end) of blocks of columns, with `target(i, &t)` ->
// coefficient
template <class Target>
DELTAIC_INLINE void add_pairs(const Weight& w, int64_t expert, int64_t begin, int64_t end, const Activations& hidden,
                              uint8_t* work, int64_t H, float* y, const Target& target) {
    multiply_pairs(w, expert, begin, end, hidden, work, {}, [&](int, int64_t pair, int64_t i, f32x16 even, f32x16 odd) {
        int64_t t;
        const f32x16 c = set1(target(i, &t));
        const int64_t n = pair * 32;
        float* out = y + t * H + n;
        store_n(out, fma(c, even, load_n(out, H - n)), H - n);
        if (n + 16 < H) store_n(out + 16, fma(c, odd, load_n(out + 16, H - n - 16)), H - n - 16);
    });
}

}  // namespace

void moe(View x, const Weight& router, const Weight& gate_up, const Weight& down, const Weight& shared_gate_up,
         const Weight& shared_down, const Weight& shared_gate, View norm, float eps, int64_t top_k, View residual,
         View y) {
    const int64_t T = x.shape[0], H = x.shape[1], E = router.rows, I = down.columns, Is = shared_down.columns;
    if (!gate_up.glu || !shared_gate_up.glu) fail("moe", "gate_up and shared_gate_up must come from pack_glu()");
    const Weight* const plain[] = {&router, &down, &shared_down, &shared_gate};
    for (const Weight* w : plain)
        if (w->glu || w->segments != 1) fail("moe", "router, down and shared_gate must be packed from one matrix each");
    if (top_k < 1 || top_k > E) fail("moe", "top_k must be between 1 and the number of experts");
    if (T == 0) return;
    const int threads = thread_count();
    const Forms all =
        wanted_forms(router) | wanted_forms(shared_gate) | wanted_forms(gate_up) | wanted_forms(shared_gate_up);
    const Activations h = prepare(x.f32(), T, H, norm, eps, all);
    const Weight* const matrices[] = {&router, &gate_up, &down, &shared_gate_up, &shared_down, &shared_gate};
    int64_t room = 0;
    for (const Weight* w : matrices) room = max64(room, work_bytes(*w, T));
    uint8_t* work = static_cast<uint8_t*>(scratch(static_cast<size_t>(room * threads)));

    // Router logits and the gate of the shared expert, which is one more pair of blocks.
    float* logits = scratch_f32(T * E);
    float* shared_coefficient = scratch_f32(T);
    const int64_t router_pairs = count_pairs(router);
    parallel_for(router_pairs + 1, pair_grain(router, router_pairs + 1, T, threads),
                 [&](int64_t begin, int64_t end, int thread) {
                     uint8_t* const mine = work + thread * room;
                     multiply_pairs(router, 0, begin, min64(end, router_pairs), h, mine, {},
                                    [&](int, int64_t pair, int64_t t, f32x16 even, f32x16 odd) {
                                        const int64_t n = pair * 32;
                                        store_n(logits + t * E + n, even, E - n);
                                        if (n + 16 < E) store_n(logits + t * E + n + 16, odd, E - n - 16);
                                    });
                     if (end > router_pairs) {
                         multiply_pairs(shared_gate, 0, 0, 1, h, mine, {},
                                        [&](int, int64_t, int64_t t, f32x16 sums, f32x16) {
                                            store_n(shared_coefficient + t, sigmoid(sums), 1);
                                        });
                     }
                 });

    int64_t* experts = static_cast<int64_t*>(scratch(static_cast<size_t>(T * top_k) * sizeof(int64_t)));
    float* coefficients = scratch_f32(T * top_k);
    parallel_for(T, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t)
            choose_experts(logits + t * E, E, top_k, experts + t * top_k, coefficients + t * top_k);
    });
    const Routing routing = route(experts, coefficients, T, top_k, E);

    // Gate and up. Rows of a group are gathered into a panel per thread; a group of one is read where it lies.
    const Product product = product_of(gate_up, gate_up.segment[0].format, T);
    const int64_t panel = min64(panel_tokens(product, H), T);
    const Activations gathered =
        scratch_activations(T > 1 ? threads * panel : 0, H, !product.words, wanted_forms(gate_up));
    float* hidden = scratch_f32(T * top_k * I);
    float* shared_hidden = scratch_f32(T * Is);
    const int64_t pairs = count_pairs(gate_up), routed = routing.size * pairs,
                  shared_pairs = count_pairs(shared_gate_up);
    // One expert at a time if there are enough of them and their rows are many, so that those are gathered once.
    const bool whole = routing.size >= 8 * threads && T * top_k > 4 * routing.size;
    const int64_t grain =
        grain_for(2 * block_bytes(gate_up.segment[0].format, H) * (routed + shared_pairs) * ceil_div(T, 4),
                  routed + shared_pairs, whole ? pairs : pair_grain(gate_up, routed + shared_pairs, T, threads));
    parallel_for(routed + shared_pairs, grain, [&](int64_t begin, int64_t end, int thread) {
        uint8_t* const mine = work + thread * room;
        while (begin < min64(end, routed)) {
            const Group& group = routing.groups[begin / pairs];
            const int64_t pair = begin % pairs, last = min64(pairs, pair + end - begin), next = begin / pairs + 1;
            if (last == pairs && next < routing.size) prefetch_head(gate_up.block(0, routing.groups[next].expert, 0));
            float* out = hidden + group.first * I;
            if (group.count == 1) {
                glu_pairs(gate_up, group.expert, pair, last, h.rows(routing.tokens[group.first], 1), mine, I, out);
            } else {
                for (int64_t i0 = 0; i0 < group.count; i0 += panel) {
                    const int64_t n = min64(panel, group.count - i0);
                    const Activations rows = gathered.rows(thread * panel, n);
                    for (int64_t i = 0; i < n; ++i) copy_row(h, routing.tokens[group.first + i0 + i], rows, i);
                    glu_pairs(gate_up, group.expert, pair, last, rows, mine, I, out + i0 * I);
                }
            }
            begin += last - pair;
        }
        if (begin < end) glu_pairs(shared_gate_up, 0, begin - routed, end - routed, h, mine, Is, shared_hidden);
    });

    const Activations expert_in = prepare(hidden, T * top_k, I, View{}, 0.0f, wanted_forms(down));
    const Activations shared_in = prepare(shared_hidden, T, Is, View{}, 0.0f, wanted_forms(shared_down));
    const int64_t out_pairs = count_pairs(down);
    const int64_t out_bytes =
        2 * (routing.size * block_bytes(down.segment[0].format, I) + block_bytes(shared_down.segment[0].format, Is));
    const int64_t out_grain = grain_for(
        out_bytes * out_pairs * ceil_div(T, 4), out_pairs,
        in_caches(out_bytes * out_pairs, T) ? ceil_div(out_pairs, threads) : max64(1, out_pairs / (4 * threads)));
    parallel_for(out_pairs, out_grain, [&](int64_t begin, int64_t end, int thread) {
        uint8_t* const mine = work + thread * room;
        const int64_t n = begin * 32, width = min64(end * 32, H) - n;
        for (int64_t t = 0; t < T; ++t) {
            float* out = y.f32() + t * H + n;
            if (residual) {
                memcpy(out, residual.f32() + t * H + n, static_cast<size_t>(width) * sizeof(float));
            } else {
                memset(out, 0, static_cast<size_t>(width) * sizeof(float));
            }
        }
        for (int64_t g = 0; g < routing.size; ++g) {
            const Group& group = routing.groups[g];
            if (g + 1 < routing.size) prefetch_head(down.block(0, routing.groups[g + 1].expert, 2 * begin));
            add_pairs(down, group.expert, begin, end, expert_in.rows(group.first, group.count), mine, H, y.f32(),
                      [&](int64_t i, int64_t* t) {
                          *t = routing.tokens[group.first + i];
                          return routing.coefficients[group.first + i];
                      });
        }
        add_pairs(shared_down, 0, begin, end, shared_in, mine, H, y.f32(), [&](int64_t i, int64_t* t) {
            *t = i;
            return shared_coefficient[i];
        });
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
