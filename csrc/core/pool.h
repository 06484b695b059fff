// The one thread pool of the process, and scratch memory for the operator that is running.
// One operator runs at a time: whoever calls operators from several threads holds `operator_lock()` meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/view.h"

namespace deltaic {

int thread_count();
void set_thread_count(int threads);  // >= 1; takes effect at once

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end, int thread);

// Calls `function` on disjoint ranges that cover [0, n), each some multiple of `grain` long (but the last), on all
// threads; the caller works too. Thread t starts with the t-th part of [0, n) and helps the others in the end. Which
// thread gets which range depends on timing, so a result must not depend on the ranges.
void parallel_run(int64_t n, int64_t grain, RangeFunction function, void* context);

template <class F>
DELTAIC_INLINE void parallel_for(int64_t n, int64_t grain, const F& body) {
    parallel_run(
        n, grain,
        [](void* context, int64_t begin, int64_t end, int thread) {
            (*static_cast<const F*>(context))(begin, end, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Bytes that one thread reads while several would meet and part, and fetch from each other what they need: it is done
// with less before them. How far apart cores are is measured now and then: a virtual machine moves between them.
int64_t alone_bytes();

// The grain for work that reads so many bytes: all of it where that is too little to be shared.
DELTAIC_INLINE int64_t grain_for(int64_t bytes, int64_t n, int64_t grain) {
    return n > grain && bytes < alone_bytes() ? n : grain;
}

// 64-byte aligned memory that lives until the operator returns. Kept between operators, so a decoded token allocates
// nothing.
void* scratch(size_t bytes);
DELTAIC_INLINE float* scratch_f32(int64_t n) {
    return static_cast<float*>(scratch(static_cast<size_t>(n) * sizeof(float)));
}

// Serialises operators of different callers and releases the scratch memory of the previous one.
class OperatorScope {
  public:
    OperatorScope();
    ~OperatorScope();
    void next();  // another operator follows
    OperatorScope(const OperatorScope&) = delete;
    OperatorScope& operator=(const OperatorScope&) = delete;
};

}  // namespace deltaic
