#include "core/pool.h"

#include <pthread.h>

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
template <class Ready>
void spin_then_wait(std::atomic<uint32_t>& word, uint32_t seen, const Ready& ready) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!ready()) {
        for (int i = 0; i < 64 && !ready(); ++i) pause_cpu();
        if (ready()) return;
        if (std::chrono::steady_clock::now() > deadline) {
            word.wait(seen, std::memory_order_acquire);
            seen = word.load(std::memory_order_acquire);
        }
    }
}

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        stop_.store(true, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    void run(int64_t n, int64_t grain, RangeFunction function, void* context) {
        function_ = function;
        context_ = context;
        n_ = n;
        grain_ = grain;
        next_.store(0, std::memory_order_relaxed);
        running_.store(static_cast<uint32_t>(threads_ - 1), std::memory_order_relaxed);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        take_ranges(0);
        const uint32_t left = running_.load(std::memory_order_acquire);
        if (left != 0) spin_then_wait(running_, left, [&] { return running_.load(std::memory_order_acquire) == 0; });
    }

  private:
    void take_ranges(int thread) {
        for (;;) {
            const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (begin >= n_) return;
            function_(context_, begin, std::min(begin + grain_, n_), thread);
        }
    }

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            spin_then_wait(epoch_, seen, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
            seen = epoch_.load(std::memory_order_acquire);
            if (stop_.load(std::memory_order_acquire)) return;
            take_ranges(thread);
            if (running_.fetch_sub(1, std::memory_order_release) == 1) running_.notify_all();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    RangeFunction function_ = nullptr;
    void* context_ = nullptr;
    int64_t n_ = 0, grain_ = 1;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> running_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
};

// Bump allocator: blocks are merged into one of the total size when the next operator starts.
class Arena {
  public:
    void* take(size_t bytes) {
        bytes = (bytes + 63) & ~size_t{63};
        if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
            const size_t size = std::max(bytes, size_t{1} << 20);
            void* data = std::aligned_alloc(64, size);
            if (!data) throw std::bad_alloc();
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
    static constexpr size_t kKeep = size_t{256} << 20;  // a larger scratch (a huge picture) is given back to the system
    std::vector<Block> blocks_;
    size_t used_ = 0;
};

struct Runtime {
    std::mutex lock;
    int threads = 1;
    std::unique_ptr<Pool> pool;
    Arena arena;
};

Runtime* runtime = nullptr;

Runtime& get() {
    static std::once_flag once;
    std::call_once(once, [] {
        runtime = new Runtime();  // never destroyed: worker threads must not be joined while the process exits
        runtime->threads = std::max(1u, std::thread::hardware_concurrency());
        // A forked child has none of the workers: it starts with a fresh pool.
        pthread_atfork(nullptr, nullptr, [] {
            const int threads = runtime->threads;
            runtime = new Runtime();
            runtime->threads = threads;
        });
    });
    return *runtime;
}

}  // namespace

int thread_count() { return get().threads; }

void set_thread_count(int threads) {
    Runtime& r = get();
    std::lock_guard<std::mutex> guard(r.lock);
    if (threads == r.threads) return;
    r.pool.reset();
    r.threads = threads;
}

void parallel_run(int64_t n, int64_t grain, RangeFunction function, void* context) {
    if (n <= 0) return;
    Runtime& r = get();
    if (r.threads == 1 || n <= grain) {
        function(context, 0, n, 0);
        return;
    }
    if (!r.pool) r.pool = std::make_unique<Pool>(r.threads);
    r.pool->run(n, grain, function, context);
}

void* scratch(size_t bytes) { return get().arena.take(bytes); }

OperatorScope::OperatorScope() { get().lock.lock(); }

OperatorScope::~OperatorScope() {
    get().arena.release();
    get().lock.unlock();
}

}  // namespace deltaic
