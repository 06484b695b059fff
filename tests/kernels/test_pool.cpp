// The thread pool: every index of a loop once, in ranges that begin at multiples of the grain, whatever the timing, and
// whether all threads come or not.
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <atomic>
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

std::atomic<bool> held{false}, release{false};

void hold(int) {
    held = true;
    const timespec millisecond{0, 1000000};
    while (!release) nanosleep(&millisecond, nullptr);
}

// A thread that has taken nothing is not waited for, as if another process kept it from its processor: loops end
// though thread 1 is held in a signal's handler.
bool loops_end_without_a_thread() {
    set_thread_count(2);
    std::atomic<bool> known{false};
    pthread_t other{};
    while (!known)
        parallel_for(64, 1, [&](int64_t, int64_t, int thread) {
            if (thread == 1 && !known.exchange(true)) other = pthread_self();
        });
    release = held = false;
    signal(SIGUSR1, hold);
    pthread_kill(other, SIGUSR1);
    while (!held) std::this_thread::yield();
    std::thread rescuer([] {  // where the loops do wait, the test fails instead of hanging
        for (int i = 0; i < 1000 && !release; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
        release = true;
    });
    int64_t done = 0;
    bool alone = true;
    for (int loop = 0; loop < 100; ++loop)
        parallel_for(64, 1, [&](int64_t begin, int64_t end, int thread) {
            alone = alone && thread == 0;
            done += end - begin;
        });
    const bool ended = !release.exchange(true);
    rescuer.join();
    return ended && alone && done == 6400;
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
        const int64_t alone = alone_bytes();
        ++(alone >= int64_t{1} << 16 && alone <= int64_t{1} << 20 ? good : bad);
        ++(grain_for(alone + (int64_t{1} << 20), 100, 3) == 3 && grain_for(1000, 100, 3) == 100 ? good : bad);
    }
    ++(loops_end_without_a_thread() ? good : bad);
    set_thread_count(1);
    ++(grain_for(int64_t{1} << 40, 100, 3) == 100 ? good : bad);
    std::printf("%-11s %-16s %5d passed %5d failed\n", "pool", "", good, bad);
    *passed += good, *failed += bad;
}

}  // namespace deltaic::test
