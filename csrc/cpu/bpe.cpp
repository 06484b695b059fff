// bpe_merge: byte-pair encoding of pieces of text whose bytes are token ids already.
//
// The order of merges is that of the tokenizers library: the pair of the lowest rank first, the leftmost of equals; an
// entry of the queue counts as long as the pair at its place still gives the token it was made for.
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Open addressing: slots [a power of two] hold the number of a merge, or -1.
struct Merges {
    const int64_t *slots, *pairs, *merged;
    int64_t mask, count;

    // The rank of the pair, or -1.
    DELTAIC_INLINE int64_t find(int64_t left, int64_t right) const {
        const int64_t key = left << 32 | right;
        uint64_t hash = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
        for (int64_t step = 0; step <= mask; ++step) {
            const int64_t rank = slots[(static_cast<int64_t>(hash & 0x7fffffff) + step) & mask];
            if (rank < 0 || rank >= count) return -1;
            if (pairs[rank] == key) return rank;
        }
        return -1;
    }
};

struct Entry {
    int64_t rank, place;
};

DELTAIC_INLINE bool before(const Entry& a, const Entry& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.place < b.place;
}

struct Queue {
    Entry* items;
    int64_t size = 0;

    void push(Entry entry) {
        int64_t i = size++;
        for (; i > 0 && before(entry, items[(i - 1) / 2]); i = (i - 1) / 2) items[i] = items[(i - 1) / 2];
        items[i] = entry;
    }

    Entry pop() {
        const Entry first = items[0], last = items[--size];
        int64_t i = 0;
        for (int64_t child = 1; child < size; child = 2 * i + 1) {
            if (child + 1 < size && before(items[child + 1], items[child])) ++child;
            if (!before(items[child], last)) break;
            items[i] = items[child];
            i = child;
        }
        items[i] = last;
        return first;
    }
};

}  // namespace

void bpe_merge(View ids, View begins, View slots, View pairs, View merged, View out, View count) {
    const char* const op = "bpe_merge";
    const int64_t n = ids.shape[0], pieces = begins.shape[0] - 1, mask = slots.shape[0] - 1;
    if (pieces < 0 || begins.i64()[0] != 0 || begins.i64()[pieces] != n)
        fail(op, "begins must rise from 0 to the number of ids");
    if (mask < 0 || (slots.shape[0] & mask) != 0) fail(op, "the number of slots must be a power of two");
    const Merges merges{slots.i64(), pairs.i64(), merged.i64(), mask, pairs.shape[0]};
    int64_t longest = 0;
    for (int64_t p = 0; p < pieces; ++p) {
        if (begins.i64()[p + 1] < begins.i64()[p]) fail(op, "begins must rise from 0 to the number of ids");
        longest = max64(longest, begins.i64()[p + 1] - begins.i64()[p]);
    }
    const size_t bytes = static_cast<size_t>(longest) * sizeof(int64_t);
    int64_t* id = static_cast<int64_t*>(scratch(bytes));        // -1: merged into one on its left
    int64_t* previous = static_cast<int64_t*>(scratch(bytes));  // place of the neighbour, or -1
    int64_t* next = static_cast<int64_t*>(scratch(bytes));
    Queue queue{static_cast<Entry*>(scratch(3 * static_cast<size_t>(longest) * sizeof(Entry)))};
    int64_t written = 0;
    for (int64_t p = 0; p < pieces; ++p) {
        const int64_t begin = begins.i64()[p], size = begins.i64()[p + 1] - begin;
        const auto offer = [&](int64_t place) {
            const int64_t rank = merges.find(id[place], id[next[place]]);
            if (rank >= 0) queue.push({rank, place});
        };
        for (int64_t i = 0; i < size; ++i) {
            id[i] = ids.i64()[begin + i];
            if (id[i] < 0 || id[i] > 0x7fffffff) fail(op, "an id is negative or does not fit 31 bits");
            previous[i] = i - 1;
            next[i] = i + 1 < size ? i + 1 : -1;
        }
        for (int64_t i = 0; i + 1 < size; ++i) offer(i);
        while (queue.size > 0) {
            const Entry top = queue.pop();
            const int64_t place = top.place;
            if (id[place] < 0 || next[place] < 0) continue;
            const int64_t right = next[place], rank = merges.find(id[place], id[right]);
            if (rank < 0 || merges.merged[rank] != merges.merged[top.rank]) continue;
            id[place] = merges.merged[rank];
            if (id[place] < 0 || id[place] > 0x7fffffff) fail(op, "a merged id is negative or does not fit 31 bits");
            id[right] = -1;
            next[place] = next[right];
            if (next[place] >= 0) previous[next[place]] = place;
            if (previous[place] >= 0) offer(previous[place]);
            if (next[place] >= 0) offer(place);
        }
        for (int64_t i = size > 0 ? 0 : -1; i >= 0; i = next[i]) out.i64()[written++] = id[i];
    }
    count.i64()[0] = written;
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
