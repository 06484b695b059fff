// A host stand-in for the part of CUDA that the kernels use, so that the same .cu files run where there is no GPU.
//
// The threads of a block are fibres of one operating-system thread and run one after another between barriers, in an
// order that a test chooses; blocks run one after another. What real hardware would leave undefined is an error here,
// with kernel, block and thread named: a barrier or warp operation that not all threads reach, an access beyond a
// shared array, two threads touching one shared element with no barrier between them (one of them writing), a
// misaligned vector access, and, for buffers from `guarded_alloc`, an access beyond device memory. Shared memory starts
// as 0xCD.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// Where the running fibre is. Globals: there is one operating-system thread, and the scheduler sets them at every
// switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class Order { forward, reverse, random };

// The order in which runnable threads, and blocks, take their turns.
void set_order(Order order, uint64_t seed);

// Device memory between two inaccessible regions, filled with 0xCD bytes; the end of the data touches the upper one.
void* guarded_alloc(size_t bytes, const char* name);
void guarded_free(void* data);

// Reports an error of the running thread and leaves the kernel; the launch throws deltaic::Error.
[[noreturn]] void fail(const std::string& message);

enum class Collective : uint8_t { sync, shuffle, vote, mma };

// One step that all 32 lanes of a warp take together: deposits up to 32 bytes, returns the 32 deposits (32 bytes
// apart).
const uint8_t* warp_collective(Collective kind, const char* file, int line, const void* deposit, size_t bytes);
void block_barrier(const char* file, int line);
int lane();

struct Argument {
    const void* data;
    size_t bytes;
};
struct Launch {
    const char* name;
    const void* kernel;  // as compiled for the host; `body` calls it with the arguments
    dim3 grid, block;
    size_t dynamic_shared;
    const Argument* arguments;
    size_t count;
    void (*body)(void*);
    void* context;
};
void run(const Launch& launch);

// Reads the PTX files of all kernels (see ptx.h), to be used under this name. `symbols`: the names of this library's
// functions by their offset.
void load_ptx(const std::string& name, const std::vector<std::string>& files,
              const std::map<uint64_t, std::string>& symbols);
// From here on launches run that PTX; with an empty name what the host compiler made of the kernels again.
void use_ptx(const std::string& name);
// Runs a kernel of one PTX file that takes only 8-byte parameters.
void run_ptx(const std::string& text, const std::string& kernel, unsigned blocks, unsigned threads,
             size_t dynamic_shared, const std::vector<uint64_t>& arguments);
// Kernels of it: how many instructions they have, and where those are that never ran.
std::map<std::string, std::pair<size_t, std::vector<std::string>>> ptx_coverage(const std::string& name);

// The addresses around this one that belong to one device buffer and its guards, or to none (then data_end is 0).
void guarded_region(uint64_t address, uint64_t* begin, uint64_t* end, uint64_t* data, uint64_t* data_end,
                    std::string* name);

// Shared memory of the running block: `site` names one declaration in the source.
uint8_t* shared_array(const char* file, int line, size_t bytes, size_t align);
uint8_t* dynamic_shared(size_t* bytes);
void note_read(const uint8_t* address, size_t bytes);
void note_write(const uint8_t* address, size_t bytes);

// An element of a shared array: every read and write is noted, to find races.
template <class T>
class Ref {
  public:
    explicit Ref(T* address) : address_(address) {}
    operator T() const {
        note_read(reinterpret_cast<const uint8_t*>(address_), sizeof(T));
        return *address_;
    }
    T operator=(T value) const {
        note_write(reinterpret_cast<const uint8_t*>(address_), sizeof(T));
        return *address_ = value;
    }
    T operator=(const Ref& other) const { return *this = static_cast<T>(other); }
    T operator+=(T value) const { return *this = static_cast<T>(static_cast<T>(*this) + value); }
    T operator-=(T value) const { return *this = static_cast<T>(static_cast<T>(*this) - value); }
    T operator*=(T value) const { return *this = static_cast<T>(static_cast<T>(*this) * value); }

  private:
    T* address_;
};

// A shared array with bounds.
template <class T>
class SharedArray {
  public:
    SharedArray(T* data, size_t size) : data_(data), size_(size) {}
    Ref<T> operator[](int64_t i) const {
        if (i < 0 || static_cast<size_t>(i) >= size_)
            fail("element " + std::to_string(i) + " of a shared array of " + std::to_string(size_));
        return Ref<T>(data_ + i);
    }
    SharedArray slice(int64_t first, int64_t count) const {
        if (first < 0 || count < 0 || static_cast<size_t>(first + count) > size_)
            fail("elements " + std::to_string(first) + "..+" + std::to_string(count) + " of a shared array of " +
                 std::to_string(size_));
        return SharedArray(data_ + first, static_cast<size_t>(count));
    }
    // Address of `count` elements, for a vector access or an atomic.
    T* at(int64_t i, int64_t count, bool write) const {
        const SharedArray part = slice(i, count);
        if (write)
            note_write(reinterpret_cast<const uint8_t*>(part.data_), sizeof(T) * static_cast<size_t>(count));
        else
            note_read(reinterpret_cast<const uint8_t*>(part.data_), sizeof(T) * static_cast<size_t>(count));
        return part.data_;
    }
    // For atomics, which do not race with each other.
    T* raw(int64_t i) const { return slice(i, 1).data_; }

  private:
    T* data_;
    size_t size_;
};

template <class T>
SharedArray<T> declare_shared(const char* file, int line, size_t count) {
    return SharedArray<T>(
        reinterpret_cast<T*>(shared_array(file, line, count * sizeof(T), alignof(T) < 16 ? 16 : alignof(T))), count);
}

template <class T>
SharedArray<T> carve_dynamic(size_t byte_offset, size_t count) {
    size_t bytes = 0;
    uint8_t* base = dynamic_shared(&bytes);
    if (byte_offset % alignof(T) || byte_offset + count * sizeof(T) > bytes)
        fail("dynamic shared memory holds " + std::to_string(bytes) + " bytes, used to " +
             std::to_string(byte_offset + count * sizeof(T)));
    return SharedArray<T>(reinterpret_cast<T*>(base + byte_offset), count);
}

template <class T>
T shuffle(T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= 32 && std::is_trivially_copyable_v<T>);
    const uint8_t* deposits = warp_collective(Collective::shuffle, file, line, &value, sizeof(T));
    T result;
    std::memcpy(&result, deposits + 32 * (source & 31), sizeof(T));
    return result;
}

inline uint32_t ballot(bool predicate, const char* file, int line) {
    const uint8_t value = predicate;
    const uint8_t* deposits = warp_collective(Collective::vote, file, line, &value, 1);
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(deposits[32 * i] & 1) << i;
    return mask;
}

template <class T>
void check_aligned(const T* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail("address is not aligned to " + std::to_string(bytes) + " bytes");
}

inline void check_mask(uint32_t mask) {
    if (mask != 0xffffffffu) fail("a warp operation with a partial mask, which this emulator does not run");
}

}  // namespace simt

#define __syncthreads() ::simt::block_barrier(__FILE__, __LINE__)
#define __syncwarp() \
    static_cast<void>(::simt::warp_collective(::simt::Collective::sync, __FILE__, __LINE__, nullptr, 0))
#define __shfl_xor_sync(mask, value, offset) \
    (::simt::check_mask(mask), ::simt::shuffle(value, ::simt::lane() ^ (offset), __FILE__, __LINE__))
#define __shfl_sync(mask, value, source) (::simt::check_mask(mask), ::simt::shuffle(value, source, __FILE__, __LINE__))
#define __shfl_down_sync(mask, value, offset)                                                                      \
    (::simt::check_mask(mask),                                                                                     \
     ::simt::shuffle(value, ::simt::lane() + (offset) > 31 ? ::simt::lane() : ::simt::lane() + (offset), __FILE__, \
                     __LINE__))
#define __shfl_up_sync(mask, value, offset)                                                                   \
    (::simt::check_mask(mask),                                                                                \
     ::simt::shuffle(value, ::simt::lane() < (offset) ? ::simt::lane() : ::simt::lane() - (offset), __FILE__, \
                     __LINE__))
#define __ballot_sync(mask, predicate) (::simt::check_mask(mask), ::simt::ballot(predicate, __FILE__, __LINE__))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == 0xffffffffu)

// Fibres switch only at barriers, so a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = static_cast<T>(old + value);
    return old;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    if (value > old) *address = value;
    return old;
}
inline void __threadfence() {}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
template <class T>
T __ldg(const T* address) {
    return *address;
}
