// The thread pool: every index of a loop once, in ranges that begin at multiples of the grain, whatever the timing.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace deltaic::test {

namespace {

// The ranges of one loop, in order, where thread `slow` (-1: none) sleeps a little in each of its ranges.
std::vector<std::pair<int64_t, int64_t>> ranges_of(int64_t n, int64_t grain, int slow) {
    std::mutex lock;
    std::vector<std::pair<int64_t, int64_t>> found;
    parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
        if (thread == slow) std::this_thread::sleep_for(std::chrono::microseconds(200));
        const std::lock_guard<std::mutex> guard(lock);
        found.emplace_back(begin, end);
    });
    std::sort(found.begin(), found.end());
    return found;
}

}  // namespace

void check_pool(int* passed, int* failed) {
    int good = 0, bad = 0;
    for (const int threads : {2, 3, 8}) {
        set_thread_count(threads);
        for (const int64_t n : {int64_t{1}, int64_t{7}, int64_t{64}, int64_t{1001}, int64_t{1} << 40})
            for (const int64_t grain : {1, 2, 5})
                for (const int slow : {-1, 0, 1}) {
                    int64_t next = 0;
                    bool right = true;
                    for (const auto& [begin, end] : ranges_of(n, grain, slow)) {
                        right = right && begin == next && end > begin && begin % grain == 0;
                        next = end;
                    }
                    ++(right && next == n ? good : bad);
                }
    }
    std::printf("%-11s %-16s %5d passed %5d failed\n", "pool", "", good, bad);
    *passed += good, *failed += bad;
}

}  // namespace deltaic::test
