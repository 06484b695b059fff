// sample: one token from each row of logits, seen as a list of (logit, id), without sorting it. count_tokens.
//
// In the order (logit descending, id ascending) the filters each keep a front part of the list. Its end is found from
// the top digit of the logits' bits down: a histogram over 256 digits holds how many entries, and how much probability,
// each digit has. Weights are whole numbers of 2^-40 of the largest, so their sums do not depend on the order of
// additions and a seed always gives the same token. A small top_k is first reduced in parallel: the k best of each
// stretch of the logits (`shortlist`) contain the k best of all.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kThreads = 1024;
constexpr double kUnit = 1099511627776.0;  // 2^40

// Larger logits get larger keys; NaN gets the largest of all, so that it cannot pass unseen.
__device__ __forceinline__ uint32_t key_of(float x) {
    if (x != x) return 0xffffffffu;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What penalties take from the texts of `sequences` sequences: see reference.py. seen: where the array of each is.
struct Penalties {
    const int64_t* seen;
    const int64_t* cu_seqlens;
    const int64_t* fed;
    int64_t sequences, words, skipped;  // `skipped` rows come before the first of the logits
    float presence, frequency, repetition;
};

// A thread enters the tokens of a sequence: they are few, and some are equal.
__global__ void count_kernel(const int64_t* ids, int64_t count, const int64_t* seen, int64_t words) {
    grid_begin();
    if (threadIdx.x > 0) return;
    int64_t* const held = reinterpret_cast<int64_t*>(seen[blockIdx.x]);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t id = ids[blockIdx.x * count + i];
        if (id < 0 || id >= 64 * words) continue;
        held[id / 64] |= static_cast<int64_t>(uint64_t{1} << id % 64);
        held[words + id] += 1;
    }
}

__device__ __forceinline__ int64_t block_count(int64_t x, Shared<int64_t> scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    int64_t total = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += scratch[w];
    return total;
}

// Where the sum of 256 amounts, from the largest digit down or (with `rising`) from the smallest up, reaches `target`.
struct Place {
    int digit;       // the last one that holds anything, where the sum does not reach it
    uint64_t above;  // the sum before that digit
    bool found;
};

// By every warp for itself; `amount` must be complete. A lane sums eight digits, and the sums are added across lanes.
__device__ __forceinline__ Place find_place(Shared<unsigned long long> amount, uint64_t target, bool rising) {
    constexpr int kEach = 256 / kWarp;
    const int lane = threadIdx.x % kWarp;
    const auto digit = [&](int i) { return rising ? i : 255 - i; };
    unsigned long long own = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) own += amount[digit(lane * kEach + j)];
    unsigned long long through = own;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned long long before = __shfl_up_sync(kAllLanes, through, offset);
        if (lane >= offset) through += before;
    }
    const uint32_t reached = __ballot_sync(kAllLanes, through >= target), holds = __ballot_sync(kAllLanes, own > 0);
    const int at = reached ? __ffs(static_cast<int>(reached)) - 1 : holds ? 31 - __clz(static_cast<int>(holds)) : 0;
    Place place{255, __shfl_sync(kAllLanes, through - own, at), false};
    for (int j = 0; j < kEach; ++j) {
        const unsigned long long here = amount[digit(at * kEach + j)];
        if (here) place.digit = digit(at * kEach + j);
        if (place.above + here >= target) {
            place.digit = digit(at * kEach + j), place.found = true;
            break;
        }
        place.above += here;
    }
    return place;
}

// Where a front part ends: the entries with a larger key, and the first `ties` (by id) of those with this key.
struct Cut {
    uint32_t key;
    int64_t ties;
};

// A list of n entries; ids == nullptr means that entry i has id i.
struct List {
    const float* logits;
    const int64_t* ids;
    int64_t n;
    float inverse_temperature;
    float largest;

    __device__ __forceinline__ uint64_t weight(float x) const {
        return static_cast<uint64_t>(kUnit *
                                     exp(static_cast<double>(x - largest) * static_cast<double>(inverse_temperature)));
    }
};

// amount[digit] += value in the lanes where `valid`; all lanes of the warp call it. Shared memory adds 64-bit numbers
// by trying until no other lane was faster, so what most lanes share is summed across the warp first.
__device__ __forceinline__ void add_amount(Shared<unsigned long long> amount, int digit, unsigned long long value,
                                           bool valid) {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
        const uint32_t left = __ballot_sync(kAllLanes, valid);
        if (left == 0) return;
        const int first = __ffs(static_cast<int>(left)) - 1, common = __shfl_sync(kAllLanes, digit, first);
        const bool mine = valid && digit == common;
        unsigned long long sum = mine ? value : 0;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (static_cast<int>(threadIdx.x % kWarp) == first) atomicAdd(shared_atomic(amount, common), sum);
        valid = valid && !mine;
    }
    if (valid) atomicAdd(shared_atomic(amount, digit), value);
}

// The shortest front part of `within` whose amount reaches `target` (> 0): entries are counted, or with `weighted`
// their weights summed. If the whole does not reach it, the whole.
__device__ Cut find_cut(const List& list, Cut within, uint64_t target, bool weighted, Shared<unsigned long long> amount,
                        Shared<int64_t> scratch) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) amount[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t first = 0; first < list.n; first += blockDim.x) {
            const int64_t i = first + threadIdx.x;
            const float x = i < list.n ? list.logits[i] : 0.0f;
            const uint32_t key = key_of(x);
            // Ties at the border of `within` are added below.
            const bool counts = i < list.n && key > within.key && (key & mask) == prefix;
            add_amount(amount, static_cast<int>(key >> shift & 255u), counts && weighted ? list.weight(x) : 1u, counts);
        }
        __syncthreads();
        if (threadIdx.x == 0 && within.ties > 0 && (within.key & mask) == prefix) {
            // All entries of the border key have the same weight.
            const uint32_t bits = within.key & 0x80000000u ? within.key & 0x7fffffffu : ~within.key;
            const unsigned long long each = weighted ? list.weight(__uint_as_float(bits)) : 1u;
            const int digit = static_cast<int>(within.key >> shift & 255u);
            amount[digit] = amount[digit] + each * static_cast<unsigned long long>(within.ties);
        }
        __syncthreads();
        const Place place = find_place(amount, target, false);
        target = place.found ? target - place.above : ~0ull;  // else everything below, too
        prefix |= static_cast<uint32_t>(place.digit) << shift;
        mask |= 255u << shift;
    }
    // prefix is a whole key now: how many of its ties are needed?
    int64_t same = 0;
    for (int64_t i = threadIdx.x; i < list.n; i += blockDim.x) same += key_of(list.logits[i]) == prefix;
    same = block_count(same, scratch);
    if (prefix == within.key && within.ties < same) same = within.ties;
    const uint32_t bits = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
    const uint64_t each = weighted ? list.weight(__uint_as_float(bits)) : 1u;
    uint64_t needed = each ? (target + each - 1) / each : static_cast<uint64_t>(same);
    if (target > each * static_cast<uint64_t>(same)) needed = static_cast<uint64_t>(same);
    if (needed < 1) needed = 1;
    return Cut{prefix, static_cast<int64_t>(needed)};
}

// Sum of the weights of a front part.
__device__ uint64_t mass_of(const List& list, Cut cut, Shared<int64_t> scratch) {
    int64_t sum = 0;
    for (int64_t i = threadIdx.x; i < list.n; i += blockDim.x)
        if (key_of(list.logits[i]) > cut.key) sum += static_cast<int64_t>(list.weight(list.logits[i]));
    sum = block_count(sum, scratch);
    const uint32_t bits = cut.key & 0x80000000u ? cut.key & 0x7fffffffu : ~cut.key;
    return static_cast<uint64_t>(sum) + list.weight(__uint_as_float(bits)) * static_cast<uint64_t>(cut.ties);
}

// The id of the last entry of a front part: the `ties`-th smallest id among those with the key, found from its top
// digit down.
__device__ int64_t last_id(const List& list, Cut cut, Shared<unsigned long long> amount) {
    uint64_t prefix = 0, mask = 0;
    int64_t wanted = cut.ties;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) amount[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t first = 0; first < list.n; first += blockDim.x) {
            const int64_t i = first + threadIdx.x;
            const uint64_t id = static_cast<uint64_t>(i < list.n && list.ids ? list.ids[i] : i);
            const bool counts = i < list.n && key_of(list.logits[i]) == cut.key && (id & mask) == prefix;
            add_amount(amount, static_cast<int>(id >> shift & 255u), 1u, counts);
        }
        __syncthreads();
        const Place place = find_place(amount, static_cast<uint64_t>(wanted), true);
        wanted -= static_cast<int64_t>(place.above);
        prefix |= static_cast<uint64_t>(place.digit) << shift;
        mask |= static_cast<uint64_t>(255) << shift;
    }
    return static_cast<int64_t>(prefix);
}

// Logits [first, first + n) of row `at` as they are chosen from, in place: -inf for ids that are never chosen, and what
// penalties make of those in the text. By the whole block, which has then seen all of it.
__device__ __forceinline__ void prepare(float* row, int64_t at, int64_t first, int64_t n, const int64_t* unused,
                                        int64_t count, const Penalties& p) {
    if (p.sequences > 0) {
        const int64_t last = p.skipped + at;
        int64_t b = 0;
        while (b + 1 < p.sequences && p.cu_seqlens[b + 1] <= last) ++b;
        const int64_t* const held = reinterpret_cast<const int64_t*>(p.seen[b]);
        const int64_t draft = p.cu_seqlens[b] + 1;  // the first
        for (int64_t id = first + threadIdx.x; id < first + n; id += blockDim.x) {
            int64_t times = 0;
            for (int64_t i = draft; i <= last; ++i) times += p.fed[i] == id;
            const bool known = static_cast<uint64_t>(held[id / 64]) >> id % 64 & 1;
            if (!known && times == 0) continue;
            if (known) times += held[p.words + id];
            float x = row[id];
            x = x > 0 ? x / p.repetition : x * p.repetition;
            if (times > 0) x -= p.frequency * static_cast<float>(times) + p.presence;
            row[id] = x;
        }
        if (count) __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
        if (first <= unused[i] && unused[i] < first + n) row[unused[i]] = -INFINITY;
    if (count || p.sequences > 0) __syncthreads();
}

// Block = row: n logits from its `pitch`-th on, with ids if these are given; uniform = draws / 2^53. token = the chosen
// id; -1 if the logits hold NaN or +inf, or nothing but -inf.
__global__ void __launch_bounds__(kThreads, 1)
    choose_kernel(float* logits, const int64_t* ids, int64_t pitch, int64_t n, const int64_t* unused,
                  int64_t unused_count, Penalties penalties, float temperature, int64_t top_k, double top_p,
                  double min_p, const int64_t* draws, int64_t* tokens) {
    grid_begin();
    logits += blockIdx.x * pitch;
    if (ids) ids += blockIdx.x * pitch;
    prepare(logits, blockIdx.x, 0, n, unused, unused_count, penalties);
    DELTAIC_SHARED(unsigned long long, amount, 256);
    DELTAIC_SHARED(int64_t, scratch, 32);
    DELTAIC_SHARED(float, peaks, 32);
    float peak = -INFINITY;
    bool bad = false;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        bad |= logits[i] != logits[i];
        peak = fmaxf(peak, logits[i]);
    }
    peak = warp_max(peak);
    if (threadIdx.x % kWarp == 0) peaks[threadIdx.x / kWarp] = peak;
    const int64_t wrong = block_count(bad, scratch);
    for (int w = 0; w < kThreads / kWarp; ++w) peak = fmaxf(peak, peaks[w]);
    if (wrong || peak == INFINITY || peak == -INFINITY) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = -1;
        return;
    }
    const List list{logits, ids, n, temperature > 0 ? 1.0f / temperature : 1.0f, peak};
    Cut cut{0, 0};  // key 0 is below every number's: everything
    if (temperature == 0) top_k = 1;
    if (top_k > 0 && top_k < n) cut = find_cut(list, cut, static_cast<uint64_t>(top_k), false, amount, scratch);
    if (top_k != 1) {
        if (top_p < 1) {
            const double target = top_p * static_cast<double>(mass_of(list, cut, scratch));
            const uint64_t whole = static_cast<uint64_t>(target);
            cut = find_cut(list, cut, whole + (static_cast<double>(whole) < target) + (whole == 0 && target <= 0), true,
                           amount, scratch);
        }
        if (min_p > 0) {
            // The entries of at least min_p of the largest weight: one more condition on the key.
            uint64_t least = static_cast<uint64_t>(min_p * kUnit);
            int64_t kept = 0;
            for (int64_t i = threadIdx.x; i < n; i += kThreads)
                kept += key_of(logits[i]) > cut.key && list.weight(logits[i]) >= least;
            kept = block_count(kept, scratch);
            const uint32_t bits = cut.key & 0x80000000u ? cut.key & 0x7fffffffu : ~cut.key;
            if (cut.ties > 0 && list.weight(__uint_as_float(bits)) >= least) kept += cut.ties;
            cut = find_cut(list, cut, static_cast<uint64_t>(kept > 0 ? kept : 1), false, amount, scratch);
        }
        const uint64_t total = mass_of(list, cut, scratch);
        const double uniform = static_cast<double>(draws[blockIdx.x]) * (1.0 / 9007199254740992.0);
        // The first entry whose running sum exceeds uniform * total.
        uint64_t target = static_cast<uint64_t>(uniform * static_cast<double>(total)) + 1;
        cut = find_cut(list, cut, target > total ? total : target, true, amount, scratch);
    }
    const int64_t chosen = last_id(list, cut, amount);
    if (threadIdx.x == 0) tokens[blockIdx.x] = chosen;
}

// Block (j, row): the k best of the logits [j * stretch, (j + 1) * stretch) of the row, in no particular order, to
// values and ids [row][j][k]. A NaN comes first, so it is seen later. Where there are fewer than k, -inf and an id past
// the end fill up.
__global__ void __launch_bounds__(kThreads)
    shortlist_kernel(float* logits, int64_t pitch, int64_t limit, const int64_t* unused, int64_t unused_count,
                     Penalties penalties, int64_t stretch, int64_t k, float* values, int64_t* ids) {
    grid_begin();
    DELTAIC_SHARED(unsigned long long, amount, 256);
    DELTAIC_SHARED(int64_t, scratch, 32);
    DELTAIC_SHARED(int, used, 1);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * stretch,
                  n = limit - first < stretch ? limit - first : stretch;
    logits += blockIdx.y * pitch;
    values += blockIdx.y * gridDim.x * k, ids += blockIdx.y * gridDim.x * k;
    prepare(logits, blockIdx.y, first, n, unused, unused_count, penalties);
    const List list{logits + first, nullptr, n, 1.0f, 0.0f};
    Cut cut{0, 0};
    int64_t border = -1;
    if (k < n) {
        cut = find_cut(list, cut, static_cast<uint64_t>(k), false, amount, scratch);
        border = last_id(list, cut, amount);
    }
    if (threadIdx.x == 0) used[0] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        const uint32_t key = key_of(list.logits[i]);
        if (key > cut.key || (key == cut.key && i <= border)) {
            const int64_t place = blockIdx.x * k + atomicAdd(shared_atomic(used, 0), 1);
            values[place] = list.logits[i], ids[place] = first + i;
        }
    }
    __syncthreads();
    for (int64_t i = used[0] + static_cast<int64_t>(threadIdx.x); i < k; i += kThreads) {
        values[blockIdx.x * k + i] = -INFINITY;
        ids[blockIdx.x * k + i] = limit + i;
    }
}

}  // namespace

void count_tokens(const int64_t* ids, int64_t count, const int64_t* seen, int64_t sequences, int64_t words,
                  Stream stream) {
    if (sequences == 0) return;
    launch("count_tokens", count_kernel, static_cast<unsigned>(sequences), kWarp, 0, stream, ids, count, seen, words);
}

void sample(float* logits, int64_t rows, int64_t pitch, int64_t limit, const int64_t* unused, int64_t unused_count,
            const int64_t* seen, int64_t sequences, int64_t words, const int64_t* cu_seqlens, const int64_t* fed,
            int64_t skipped, float presence, float frequency, float repetition, float temperature, int64_t top_k,
            double top_p, double min_p, const int64_t* draws, float* values, int64_t* ids, int64_t room,
            int64_t* tokens, Stream stream) {
    if (limit < 1 || limit > pitch) fail("sample", "limit must be positive, and rows at least as long");
    if (rows == 0) return;
    constexpr int64_t kStretch = 4096;
    const int64_t k = temperature == 0 ? 1 : top_k, blocks = (limit + kStretch - 1) / kStretch;
    const unsigned grid = static_cast<unsigned>(rows);
    const Penalties penalties{seen, cu_seqlens, fed, sequences, words, skipped, presence, frequency, repetition};
    if (k > 0 && k <= 128 && blocks > 1) {
        if (room < blocks * k) fail("sample", "too little room for the shortlist");
        launch("sample shortlist", shortlist_kernel, dim3(static_cast<unsigned>(blocks), grid), kThreads, 0, stream,
               logits, pitch, limit, unused, unused_count, penalties, kStretch, k, values, ids);
        launch("sample", choose_kernel, grid, kThreads, 0, stream, values, static_cast<const int64_t*>(ids), blocks * k,
               blocks * k, static_cast<const int64_t*>(nullptr), int64_t{0}, Penalties{}, temperature, top_k, top_p,
               min_p, draws, tokens);
    } else {
        launch("sample", choose_kernel, grid, kThreads, 0, stream, logits, static_cast<const int64_t*>(nullptr), pitch,
               limit, unused, unused_count, penalties, temperature, top_k, top_p, min_p, draws, tokens);
    }
}

}  // namespace cuda
}  // namespace deltaic
