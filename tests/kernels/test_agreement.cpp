// Integer products agree between instruction sets, bit for bit: sums of a run of 128 columns are exact, and what
// follows is the same operations in the same order. Only that the baseline has no fused multiply-add shows from the
// second run on.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "core/isa.h"

namespace deltaic::test {

namespace {

struct Case {
    Format format;
    int64_t T, K;
};

Floats products(Suite& t, const Case& c) {
    Random random(40);
    Packed w = pack(t, random, {{48 + 5, c.format}}, c.K);
    Floats x = normal(random, {c.T, c.K}), y = poisoned({c.T, 48 + 5});
    t.call([&] { t.ops.linear(x.view(), w.weight, View{}, 0.0f, View{}, 0, View{}, y.view()); });
    return y;
}

}  // namespace

void check_agreement(const Isa* list, int isas, const Isa& isa, int* passed, int* failed) {
    const Isa* other = nullptr;  // the best other one, and the baseline, which is last
    for (int i = isas - 1; i >= 0; --i)
        if (list[i].usable && &list[i] != &isa) other = &list[i];
    const Isa *baseline = &list[isas - 1], *fused = other == baseline ? nullptr : other;
    if (&isa == baseline) return;
    Suite mine(isa, "agreement");
    for (const Format format : {Format::int8, Format::int4})
        for (const int64_t T : {1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 31})
            for (const int64_t K : {1, 100, 128, 300}) {
                const Isa* with = K <= 128 ? baseline : fused;
                if (!with) continue;
                Suite theirs(*with, "agreement");
                mine.same_bits(products(mine, {format, T, K}), products(theirs, {format, T, K}),
                               std::string("beside ") + with->name + ", format " +
                                   std::to_string(static_cast<int>(format)) + " T=" + std::to_string(T) +
                                   " K=" + std::to_string(K));
            }
    std::printf("%-11s %-16s %5d passed %5d failed\n", isa.name, "agreement", mine.passed, mine.failed);
    *passed += mine.passed, *failed += mine.failed;
}

}  // namespace deltaic::test
