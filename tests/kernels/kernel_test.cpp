// Every operator of every usable instruction set, at awkward sizes, against plain loops in double precision.
// kernel_test [instruction set]: one line per instruction set and operator; exit status 1 if a check failed.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "core/isa.h"

using namespace deltaic;

namespace {

struct Test {
    const char* op;
    void (*run)(test::Suite&);
};

#define X(name, contract, arguments) {#name, test::test_##name},
const Test kTests[] = {DELTAIC_OPS(X)};
#undef X

// Runs one test with one and with three threads; the bits must not depend on that.
void run(const Isa& isa, const Test& test, int* passed, int* failed) {
    test::Suite alone(isa, test.op);
    test::Suite shared(isa, test.op);
    set_thread_count(1);
    test.run(alone);
    set_thread_count(3);
    test.run(shared);
    shared.check(alone.hash == shared.hash, "the number of threads changes the result");
    const int good = alone.passed + shared.passed, bad = alone.failed + shared.failed;
    std::printf("%-11s %-16s %5d passed %5d failed\n", isa.name, test.op, good, bad);
    std::fflush(stdout);
    *passed += good, *failed += bad;
}

}  // namespace

int main(int count, char** values) {
    int isas = 0, passed = 0, failed = 0;
    bool found = false;
    const Isa* list = isa_list(&isas);
    for (int i = 0; i < isas; ++i) {
        if (count > 1 && std::strcmp(values[1], list[i].name) != 0) continue;
        found = true;
        if (!list[i].usable) {
            std::printf("%-11s not usable on this machine\n", list[i].name);
            if (count > 1) return 1;
            continue;
        }
        for (const Test& test : kTests) run(list[i], test, &passed, &failed);
        test::check_agreement(list, isas, list[i], &passed, &failed);
    }
    if (!found) {
        std::printf("no instruction set %s in this build\n", values[1]);
        return 1;
    }
    test::check_pool(&passed, &failed);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
