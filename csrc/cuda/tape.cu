// relocate: what a captured graph reads and writes of arrays that are elsewhere each time it is replayed.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace deltaic {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEach = 16 * kThreads;  // bytes that a block copies at a time

// Block (part, job). jobs [count, 3]: address to read, address to write, bytes.
__global__ void relocate_kernel(const int64_t* jobs) {
    grid_begin();
    const int64_t* job = jobs + 3 * blockIdx.y;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(job[0]);
    uint8_t* to = reinterpret_cast<uint8_t*>(job[1]);
    const int64_t bytes = job[2], first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
    if ((job[0] | job[1] | bytes) % 16 == 0) {
        for (int64_t i = first; i < bytes / 16; i += step)
            reinterpret_cast<uint4*>(to)[i] = load_as<uint4>(from + 16 * i);
    } else {
        for (int64_t i = first; i < bytes; i += step) to[i] = from[i];
    }
}

}  // namespace

void relocate(const int64_t* jobs, int64_t count, int64_t longest, Stream stream) {
    if (count == 0 || longest == 0) return;
    constexpr int64_t kMostBlocks = 1024;
    const int64_t blocks = (longest + kEach - 1) / kEach;
    launch("relocate", relocate_kernel,
           dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), static_cast<unsigned>(count)),
           kThreads, 0, stream, jobs);
}

}  // namespace cuda
}  // namespace deltaic
