#include "core/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace deltaic {
namespace {

void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `ready()`: spins first, since the next operator of a decode step comes within microseconds, then sleeps.
// After `patience` rounds of about a microsecond it lets others have the processor, if there are any.
template <class Ready>
void spin_then_wait(std::atomic<uint32_t>& word, uint32_t seen, int patience, const Ready& ready) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    for (int round = 0; !ready(); ++round) {
        for (int i = 0; i < 64 && !ready(); ++i) pause_cpu();
        if (ready()) return;
        if (round >= patience) std::this_thread::yield();
        if (std::chrono::steady_clock::now() > deadline) {
            word.wait(seen, std::memory_order_acquire);
            seen = word.load(std::memory_order_acquire);
        }
    }
}

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads), shares_(static_cast<size_t>(threads)) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        stop_.store(true, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    // Seconds in which all threads meet, and the first knows of it; the least of some. One that does not come in time
    // is waited for no longer.
    double meeting_seconds() {
        using Clock = std::chrono::steady_clock;
        struct Meeting {
            Clock::time_point began;
            int64_t expected;
            std::atomic<int64_t> arrived{0};
        };
        Clock::duration least = Clock::duration::max();
        for (int i = 0; i < 8; ++i) {
            Meeting meeting{Clock::now(), threads_ - 1};
            run(
                threads_, 1,
                [](void* context, int64_t begin, int64_t end, int thread) {
                    Meeting& m = *static_cast<Meeting*>(context);
                    if (thread != 0) {
                        m.arrived.fetch_add(end - begin, std::memory_order_relaxed);
                        return;
                    }
                    while (m.arrived.load(std::memory_order_relaxed) < m.expected &&
                           Clock::now() - m.began < std::chrono::microseconds(20))
                        pause_cpu();
                },
                &meeting);
            least = std::min(least, Clock::now() - meeting.began);
        }
        return std::chrono::duration<double>(least).count();
    }

    void run(int64_t n, int64_t grain, RangeFunction function, void* context) {
        while ((n - 1) / grain >= kMostPortions) grain *= 2;
        function_ = function;
        context_ = context;
        n_ = n;
        grain_ = grain;
        const int64_t portions = (n + grain - 1) / grain;
        left_.store(static_cast<uint32_t>(portions), std::memory_order_relaxed);
        for (int t = 0; t < threads_; ++t) shares_[t].store({portions * t / threads_, portions * (t + 1) / threads_});
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        take_ranges(0);
        const uint32_t left = left_.load(std::memory_order_acquire);
        if (left != 0) spin_then_wait(left_, left, 50, [&] { return left_.load(std::memory_order_acquire) == 0; });
    }

  private:
    // Portions [begin, end) that nobody has taken yet, as one word that threads compare and exchange.
    struct Portions {
        int64_t begin, end;
        int64_t size() const { return end - begin; }
    };
    static constexpr int64_t kMostPortions = int64_t{1} << 31;

    class alignas(64) Share {
      public:
        void store(Portions p) { word_.store(packed(p), std::memory_order_release); }

        // Takes what `split` names of what is left, its beginning or its end. False: nothing is left.
        template <class Split>
        bool take(const Split& split, Portions* taken) {
            uint64_t word = word_.load(std::memory_order_relaxed);
            for (;;) {
                const Portions left{static_cast<int64_t>(word >> 32), static_cast<int64_t>(word & 0xffffffffu)};
                if (left.size() <= 0) return false;
                *taken = split(left);
                const Portions rest =
                    taken->begin == left.begin ? Portions{taken->end, left.end} : Portions{left.begin, taken->begin};
                if (word_.compare_exchange_weak(word, packed(rest), std::memory_order_acquire)) return true;
            }
        }

      private:
        static uint64_t packed(Portions p) {
            return static_cast<uint64_t>(p.begin) << 32 | static_cast<uint64_t>(p.end);
        }
        std::atomic<uint64_t> word_{0};
    };

    // First the thread's own share, the same part of the same arrays in every operator, so that what it wrote it finds
    // in its cache: a quarter of what is left at a time, from its beginning. Then half of what another has left, from
    // its end. Both read on where they were, and what is left in the end is small.
    //
    // A loop ends when its portions are done, whoever did them: a thread that the system has not woken yet, or that
    // another process keeps from its processor, is waited for only if it has taken one. It may come late, even to
    // another loop than it was called for: whoever has taken a portion sees the loop that it belongs to, which cannot
    // end meanwhile.
    void take_ranges(int thread) {
        Portions taken;
        uint32_t done = 0;
        const auto compute = [&] {
            function_(context_, taken.begin * grain_, std::min(taken.end * grain_, n_), thread);
            done += static_cast<uint32_t>(taken.size());
        };
        while (shares_[thread].take(
            [](Portions left) { return Portions{left.begin, left.begin + std::max<int64_t>(1, left.size() / 4)}; },
            &taken))
            compute();
        for (int i = 1; i < threads_; ++i)
            while (shares_[(thread + i) % threads_].take(
                [](Portions left) { return Portions{left.end - (left.size() + 1) / 2, left.end}; }, &taken))
                compute();
        if (done != 0 && left_.fetch_sub(done, std::memory_order_acq_rel) == done && thread != 0) left_.notify_all();
    }

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            spin_then_wait(epoch_, seen, 0, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
            seen = epoch_.load(std::memory_order_acquire);
            if (stop_.load(std::memory_order_acquire)) return;
            take_ranges(thread);
        }
    }

    const int threads_;
    std::vector<Share> shares_;
    std::vector<std::thread> workers_;
    RangeFunction function_ = nullptr;
    void* context_ = nullptr;
    int64_t n_ = 0, grain_ = 1;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> left_{0};  // portions of the loop that are not done
    std::atomic<bool> stop_{false};
};

// Bump allocator: blocks are merged into one of the total size when the next operator starts.
class Arena {
  public:
    void* take(size_t bytes) {
        bytes = (bytes + 63) & ~size_t{63};
        if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
            const size_t size = (std::max(bytes, kHugePage) + kHugePage - 1) / kHugePage * kHugePage;
            void* data = std::aligned_alloc(kHugePage, size);
            if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
            madvise(data, size, MADV_HUGEPAGE);  // a wish: work space is walked in strides of many rows
#endif
            blocks_.push_back({data, size});
            used_ = 0;
        }
        void* result = static_cast<char*>(blocks_.back().data) + used_;
        used_ += bytes;
        return result;
    }

    void release() {
        if (blocks_.size() > 1) {
            size_t total = 0;
            for (auto& block : blocks_) {
                total += block.size;
                std::free(block.data);
            }
            blocks_.clear();
            if (total <= kKeep) take(total);
        } else if (!blocks_.empty() && blocks_[0].size > kKeep) {
            std::free(blocks_[0].data);
            blocks_.clear();
        }
        used_ = 0;
    }

  private:
    struct Block {
        void* data;
        size_t size;
    };
    static constexpr size_t kHugePage = size_t{2} << 20;
    static constexpr size_t kKeep = size_t{256} << 20;  // a larger scratch (a huge picture) is given back to the system
    std::vector<Block> blocks_;
    size_t used_ = 0;
};

struct Runtime {
    std::mutex lock;
    int threads = 1;
    std::unique_ptr<Pool> pool;
    int64_t alone_bytes = 0;
    int until_measured = 0;  // questions about them
    Arena arena;

    Pool& made_pool() {
        if (!pool) pool = std::make_unique<Pool>(threads);
        return *pool;
    }
};

std::atomic<Runtime*> runtime{nullptr};

Runtime& get() {
    if (Runtime* r = runtime.load(std::memory_order_acquire)) return *r;
    static std::once_flag once;
    std::call_once(once, [] {
        auto* r = new Runtime();  // never destroyed: worker threads must not be joined while the process exits
        r->threads = std::max(1u, std::thread::hardware_concurrency());
        runtime = r;
        // A forked child has none of the workers: it starts with a fresh pool.
        pthread_atfork(nullptr, nullptr, [] {
            auto* r = new Runtime();
            r->threads = runtime.load()->threads;
            runtime = r;
        });
    });
    return *runtime.load();
}

}  // namespace

int thread_count() { return get().threads; }

void set_thread_count(int threads) {
    Runtime& r = get();
    std::lock_guard<std::mutex> guard(r.lock);
    if (threads == r.threads) return;
    r.pool.reset();
    r.threads = threads;
    r.until_measured = 0;
}

int64_t alone_bytes() {
    constexpr int kQuestions = 4096;
    constexpr double kBytesPerSecond = 256e9, kLeast = 1 << 16, kMost = 1 << 20;
    Runtime& r = get();
    if (r.threads == 1) return INT64_MAX;
    if (r.until_measured-- == 0) {
        r.until_measured = kQuestions;
        r.alone_bytes =
            static_cast<int64_t>(std::clamp(kBytesPerSecond * r.made_pool().meeting_seconds(), kLeast, kMost));
    }
    return r.alone_bytes;
}

void parallel_run(int64_t n, int64_t grain, RangeFunction function, void* context) {
    if (n <= 0) return;
    Runtime& r = get();
    if (r.threads == 1 || n <= grain) {
        function(context, 0, n, 0);
        return;
    }
    r.made_pool().run(n, grain, function, context);
}

void* scratch(size_t bytes) { return get().arena.take(bytes); }

OperatorScope::OperatorScope() { get().lock.lock(); }

void OperatorScope::next() { get().arena.release(); }

OperatorScope::~OperatorScope() {
    next();
    get().lock.unlock();
}

}  // namespace deltaic
