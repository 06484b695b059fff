// checksum against its definition, written out again; the probes for what they promise: whole reads, honest counts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"

namespace deltaic::test {

namespace {

uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Chunks of 1024 lines of eight words: sums, sums of the sums, mixed with the chunk's number.
uint64_t expected_sum(const Bytes& data) {
    uint64_t total = 0;
    const int64_t lines = data.size() / 64;
    for (int64_t chunk = 0; chunk * 1024 < lines; ++chunk) {
        uint64_t a[8] = {}, b[8] = {};
        for (int64_t line = chunk * 1024; line < lines && line < (chunk + 1) * 1024; ++line)
            for (int i = 0; i < 8; ++i) {
                uint64_t word;
                std::memcpy(&word, data.data.data() + line * 64 + i * 8, 8);
                a[i] += word;
                b[i] += a[i];
            }
        uint64_t state = static_cast<uint64_t>(chunk);
        for (const uint64_t value : a) state = mix(state ^ value);
        for (const uint64_t value : b) state = mix(state ^ value);
        total += state;
    }
    return total;
}

}  // namespace

void test_checksum(Suite& t) {
    Random random(31);
    for (const int64_t lines : {0, 1, 17, 1023, 1024, 1025, 40000}) {
        Bytes data({lines * 64});
        for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(random.below(256));
        Integers sum({1});
        t.call([&] { t.ops.checksum(data.view(), 0, sum.view()); });
        t.check(static_cast<uint64_t>(sum[0]) == expected_sum(data), "checksum of " + std::to_string(lines) + " lines");
    }
    Bytes ragged({65});
    Integers sum({1});
    t.refuses("a size that is not whole lines", [&] { t.call([&] { t.ops.checksum(ragged.view(), 0, sum.view()); }); });
}

void test_probe_read(Suite& t) {
    for (const int64_t lines : {1, 5, 40000}) {
        Bytes data({lines * 64});
        for (int64_t i = 0; i < data.size(); ++i) data[i] = 1;
        Integers sum({1});
        t.call([&] { t.ops.probe_read(data.view(), sum.view()); });
        const uint64_t ones = 0x0101010101010101u;
        t.check(static_cast<uint64_t>(sum[0]) == ones * 8 * static_cast<uint64_t>(lines), "every word is read once");
    }
}

void test_probe_peak(Suite& t) {
    Integers few({1}), many({1});
    t.call([&] { t.ops.probe_peak(0, 2, few.view()); });
    t.call([&] { t.ops.probe_peak(0, 20, many.view()); });
    t.check(few[0] > 0 && many[0] == 10 * few[0], "operations grow with the rounds");
    Integers whole({1});
    bool has_int8 = true;
    try {
        t.call([&] { t.ops.probe_peak(1, 2, whole.view()); });
    } catch (const Error&) {
        has_int8 = false;
    }
    t.check(!has_int8 || (whole[0] >= 4 * few[0] && whole[0] % few[0] == 0),
            "a lane of int8 does at least four times the operations");
    t.refuses("no rounds", [&] { t.call([&] { t.ops.probe_peak(0, 0, few.view()); }); });
}

// Two merges, the lower rank first: a piece is merged within itself alone.
void test_bpe_merge(Suite& t) {
    std::vector<int64_t> ids = {1, 2, 3, 1, 2, 2, 3}, begins = {0, 4, 7};
    std::vector<int64_t> pairs = {int64_t{2} << 32 | 3, int64_t{1} << 32 | 2}, merged = {10, 11};
    std::vector<int64_t> slots(8, -1), out(7, -7), count(1);
    for (int64_t rank = 0; rank < 2; ++rank) {
        uint64_t hash = static_cast<uint64_t>(pairs[static_cast<size_t>(rank)]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
        size_t slot = hash & 7;
        while (slots[slot] >= 0) slot = (slot + 1) & 7;
        slots[slot] = rank;
    }
    const auto view = [](std::vector<int64_t>& values) {
        View v;
        v.data = values.data(), v.dtype = Dtype::i64, v.ndim = 1, v.shape[0] = static_cast<int64_t>(values.size());
        return v;
    };
    t.ops.bpe_merge(view(ids), view(begins), view(slots), view(pairs), view(merged), view(out), view(count));
    const std::vector<int64_t> expected = {1, 10, 1, 2, 10};
    t.check(count[0] == 5 && std::equal(expected.begin(), expected.end(), out.begin()), "merges by rank");
}

}  // namespace deltaic::test
