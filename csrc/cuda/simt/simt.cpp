// The emulator's scheduler: fibres, barriers, warp collectives, shared memory with race detection, guarded device
// memory.
#include "cuda/simt/simt.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "core/error.h"
#include "cuda/simt/ptx.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------------- switching
// fibres

#if defined(__x86_64__)
extern "C" void deltaic_simt_switch(void** save, void* resume);
// Saves the callee-saved registers on the old stack, and takes those of the new one.
asm(R"(
.text
.globl deltaic_simt_switch
.hidden deltaic_simt_switch
.type deltaic_simt_switch, @function
deltaic_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size deltaic_simt_switch, .-deltaic_simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kShared = 256 * 1024;

enum class Status : uint8_t { ready, at_barrier, at_collective, done };

struct Fibre {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    Status status = Status::ready;
    const char* file = "";
    int line = 0;
};

struct Warp {
    uint8_t deposits[2][32 * 32];
    unsigned generation = 0;
    int arrived = 0;
    Collective kind = Collective::sync;
    const char* file = "";
    int line = 0;
    uint32_t epoch = 0;  // warp-wide steps so far: orders accesses of its lanes
};

// Last accesses of one 2-byte unit of shared memory.
struct Shadow {
    uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
    int16_t writer = -1, reader = -1;  // reader: -2 means several
};

struct Site {
    size_t offset, bytes;
};

struct Block {
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    int threads = 0, at_barrier = 0, done = 0, current = -1;
    const char* barrier_file = "";
    int barrier_line = 0;
    uint32_t epoch = 1;
    std::map<std::pair<std::string, int>, Site> sites;
    size_t shared_used = 0, dynamic_bytes = 0;
    void (*body)(void*) = nullptr;
    void* context = nullptr;
    const char* kernel = "";
    std::string error;
};

Order order = Order::forward;
uint64_t order_seed = 0;
std::unique_ptr<Block> block;
uint8_t* stacks = nullptr;
uint8_t* shared = nullptr;
std::vector<Shadow> shadow;
size_t shared_dirty = kShared;  // bytes to poison before the next block
#if defined(__x86_64__)
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif
bool running = false;
sigjmp_buf fault_exit;
char fault_message[256];

struct Guarded {
    uint8_t* base;
    size_t total, data_offset, bytes;
    std::string name;
};
std::map<const uint8_t*, Guarded> guarded;

std::string place(const char* file, int line) {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

std::string thread_name() {
    return "thread " + std::to_string(block->current) + " of block (" + std::to_string(blockIdx.x) + "," +
           std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ")";
}

void leave_fibre() {
    Fibre& f = block->fibres[static_cast<size_t>(block->current)];
#if defined(__x86_64__)
    deltaic_simt_switch(&f.stack_pointer, scheduler);
#else
    swapcontext(&f.context, &scheduler);
#endif
}

void fibre_main() {
    block->body(block->context);
    Fibre& f = block->fibres[static_cast<size_t>(block->current)];
    f.status = Status::done;
    ++block->done;
    leave_fibre();
    std::abort();  // a finished fibre is never resumed
}

void prepare_fibre(int i) {
    Fibre& f = block->fibres[static_cast<size_t>(i)];
    f.status = Status::ready;
    uint8_t* top = stacks + static_cast<size_t>(i + 1) * kStack;
#if defined(__x86_64__)
    void** p = reinterpret_cast<void**>(top);
    *--p = nullptr;  // keeps the stack aligned as after a call
    *--p = reinterpret_cast<void*>(&fibre_main);
    for (int r = 0; r < 6; ++r) *--p = nullptr;
    f.stack_pointer = p;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = top - kStack + 4096;
    f.context.uc_stack.ss_size = kStack - 4096;
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&fibre_main), 0);
#endif
}

void resume(int i) {
    Fibre& f = block->fibres[static_cast<size_t>(i)];
    block->current = i;
    const unsigned n = static_cast<unsigned>(i), nx = blockDim.x, ny = blockDim.y;
    threadIdx = dim3(n % nx, n / nx % ny, n / (nx * ny));
#if defined(__x86_64__)
    deltaic_simt_switch(&scheduler, f.stack_pointer);
#else
    swapcontext(&scheduler, &f.context);
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// memory faults

struct sigaction old_segv, old_bus;

void on_fault(int signal, siginfo_t* info, void*) {
    const uint8_t* address = static_cast<const uint8_t*>(info->si_addr);
    for (const auto& [data, g] : guarded) {
        if (!running || address < g.base || address >= g.base + g.total) continue;
        const long long offset = address - data;
        std::snprintf(fault_message, sizeof fault_message, "access to byte %lld of device buffer '%s' of %zu bytes",
                      offset, g.name.c_str(), g.bytes);
        siglongjmp(fault_exit, 1);
    }
    sigaction(signal, signal == SIGSEGV ? &old_segv : &old_bus, nullptr);  // not ours: crash as usual
}

void install_fault_handler() {
    static bool installed = false;
    if (installed) return;
    installed = true;
    stack_t stack = {};
    stack.ss_size = 64 * 1024;
    stack.ss_sp = std::malloc(stack.ss_size);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
}

void allocate_stacks() {
    if (stacks) return;
    void* p =
        mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw deltaic::Error("simt: no memory for the stacks of a block");
    stacks = static_cast<uint8_t*>(p);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + static_cast<size_t>(i) * kStack, 4096, PROT_NONE);
    shared = static_cast<uint8_t*>(std::aligned_alloc(1024, kShared));
    shadow.resize(kShared / 2);
}

// -------------------------------------------------------------------------------------------------------------------
// scheduling

std::string waiting_threads() {
    for (int i = 0; i < block->threads; ++i) {
        const Fibre& f = block->fibres[static_cast<size_t>(i)];
        if (f.status == Status::at_barrier)
            return "thread " + std::to_string(i) + " waits at the barrier of " + place(f.file, f.line);
        if (f.status == Status::at_collective)
            return "thread " + std::to_string(i) + " waits at the warp operation of " + place(f.file, f.line);
    }
    return "no thread waits";
}

void run_block(std::mt19937_64& random) {
    Block& b = *block;
    b.at_barrier = b.done = 0;
    b.epoch = 1;
    shared_dirty = std::max(shared_dirty, b.shared_used);  // of the block before this one
    b.shared_used = (b.dynamic_bytes + 15) / 16 * 16;
    b.sites.clear();
    shared_dirty = std::max(shared_dirty, b.shared_used);
    std::memset(shared, 0xCD, shared_dirty);
    std::fill(shadow.begin(), shadow.begin() + static_cast<ptrdiff_t>(shared_dirty / 2), Shadow{});
    shared_dirty = 0;
    for (Warp& w : b.warps) w.arrived = 0, w.epoch = 1;
    for (int i = 0; i < b.threads; ++i) prepare_fibre(i);
    std::vector<int> turns(static_cast<size_t>(b.threads));
    for (int i = 0; i < b.threads; ++i) turns[static_cast<size_t>(i)] = order == Order::reverse ? b.threads - 1 - i : i;
    while (b.done < b.threads) {
        if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
        bool progress = false;
        for (const int i : turns) {
            if (b.fibres[static_cast<size_t>(i)].status != Status::ready) continue;
            progress = true;
            resume(i);
            if (!b.error.empty()) return;
        }
        if (!progress) {
            b.error =
                "some threads never reach a barrier or warp operation that others wait for: " + waiting_threads() +
                ", " + std::to_string(b.done) + " of " + std::to_string(b.threads) + " threads have returned";
            return;
        }
    }
}

void run_blocks(const std::vector<uint64_t>& turns, std::mt19937_64& random) {
    for (const uint64_t i : turns) {
        blockIdx = dim3(static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                        static_cast<unsigned>(i / gridDim.x / gridDim.y));
        run_block(random);
        if (!block->error.empty()) return;
    }
}

// False where a memory fault ended it.
__attribute__((noinline)) bool run_until_fault(const std::vector<uint64_t>& turns, std::mt19937_64& random) {
    if (sigsetjmp(fault_exit, 1)) return false;
    run_blocks(turns, random);
    return true;
}

}  // namespace

void set_order(Order new_order, uint64_t seed) {
    order = new_order;
    order_seed = seed;
}

int lane() { return block->current % 32; }

void fail(const std::string& message) {
    if (!running) throw deltaic::Error("simt: " + message);
    block->error = message + " (" + thread_name() + ")";
    leave_fibre();
    std::abort();
}

const uint8_t* warp_collective(Collective kind, const char* file, int line, const void* deposit, size_t bytes) {
    Fibre& f = block->fibres[static_cast<size_t>(block->current)];
    const int warp = block->current / 32;
    Warp& w = block->warps[static_cast<size_t>(warp)];
    if (w.arrived == 0) {
        w.kind = kind, w.file = file, w.line = line;
    } else if (w.kind != kind || w.line != line || std::strcmp(w.file, file) != 0) {
        fail("lanes of one warp meet at different operations: " + place(w.file, w.line) + " and " + place(file, line));
    }
    uint8_t* deposits = w.deposits[w.generation % 2];
    if (bytes) std::memcpy(deposits + 32 * (block->current % 32), deposit, bytes);
    f.status = Status::at_collective, f.file = file, f.line = line;
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.generation, ++w.epoch;
        for (int i = 0; i < 32; ++i) block->fibres[static_cast<size_t>(warp * 32 + i)].status = Status::ready;
    }
    leave_fibre();
    return deposits;
}

void block_barrier(const char* file, int line) {
    Block& b = *block;
    Fibre& f = b.fibres[static_cast<size_t>(b.current)];
    if (b.at_barrier == 0) {
        b.barrier_file = file, b.barrier_line = line;
    } else if (b.barrier_line != line || std::strcmp(b.barrier_file, file) != 0) {
        fail("threads meet at different barriers: " + place(b.barrier_file, b.barrier_line) + " and " +
             place(file, line));
    }
    f.status = Status::at_barrier, f.file = file, f.line = line;
    if (++b.at_barrier == b.threads) {
        b.at_barrier = 0;
        ++b.epoch;
        for (Fibre& other : b.fibres) other.status = Status::ready;
    }
    leave_fibre();
}

uint8_t* shared_array(const char* file, int line, size_t bytes, size_t align) {
    Block& b = *block;
    const auto key = std::make_pair(std::string(file), line);
    const auto found = b.sites.find(key);
    if (found != b.sites.end()) return shared + found->second.offset;
    const size_t offset = (b.shared_used + align - 1) / align * align;
    if (offset + bytes > 232448) fail("more shared memory than a multiprocessor has");
    b.shared_used = offset + bytes;
    b.sites.emplace(key, Site{offset, bytes});
    return shared + offset;
}

uint8_t* dynamic_shared(size_t* bytes) {
    *bytes = block->dynamic_bytes;
    return shared;
}

namespace {

// Whether an earlier access, by `thread` at the given epochs, comes before the current one in every execution.
bool ordered(int thread, uint32_t block_epoch, uint32_t warp_epoch) {
    if (thread == block->current || block_epoch != block->epoch) return true;
    const int warp = block->current / 32;
    return thread >= 0 && thread / 32 == warp && warp_epoch != block->warps[static_cast<size_t>(warp)].epoch;
}

[[noreturn]] void race(const char* what, int other, size_t offset) {
    fail(std::string("race on shared memory byte ") + std::to_string(offset) + ": " + what + " thread " +
         std::to_string(other) + " with no barrier between");
}

}  // namespace

void note_read(const uint8_t* address, size_t bytes) {
    const size_t offset = static_cast<size_t>(address - shared);
    const uint32_t warp_epoch = block->warps[static_cast<size_t>(block->current / 32)].epoch;
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
        Shadow& s = shadow[i];
        if (s.writer >= 0 && !ordered(s.writer, s.write_block, s.write_warp))
            race("read of what was written by", s.writer, offset);
        const bool same_step = s.read_block == block->epoch;
        if (s.reader == -1 || !same_step || s.reader == block->current)
            s.reader = static_cast<int16_t>(block->current);
        else if (s.reader >= 0 && s.reader / 32 == block->current / 32 && s.read_warp != warp_epoch)
            s.reader = static_cast<int16_t>(block->current);
        else
            s.reader = s.reader >= 0 && s.reader / 32 == block->current / 32
                           ? static_cast<int16_t>(-2 - block->current / 32)
                           : (s.reader == -2 - block->current / 32 ? s.reader : INT16_MIN);
        s.read_block = block->epoch, s.read_warp = warp_epoch;
    }
}

void note_write(const uint8_t* address, size_t bytes) {
    const size_t offset = static_cast<size_t>(address - shared);
    const int warp = block->current / 32;
    const uint32_t warp_epoch = block->warps[static_cast<size_t>(warp)].epoch;
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
        Shadow& s = shadow[i];
        if (s.writer >= 0 && !ordered(s.writer, s.write_block, s.write_warp)) race("written also by", s.writer, offset);
        if (s.reader >= 0 && !ordered(s.reader, s.read_block, s.read_warp))
            race("overwrites what was read by", s.reader, offset);
        if (s.reader < -1 && s.read_block == block->epoch && !(s.reader == -2 - warp && s.read_warp != warp_epoch))
            race("overwrites what was read by several threads, not", block->current, offset);
        s.writer = static_cast<int16_t>(block->current), s.write_block = block->epoch, s.write_warp = warp_epoch;
        s.reader = -1;
    }
}

namespace {

std::map<std::string, ptx::Program> programs;
const ptx::Program* program = nullptr;  // what launches run in place of the host's kernels
std::map<uint64_t, std::string> symbols;

const ptx::Kernel& ptx_kernel(const void* function) {
    Dl_info library = {};
    dladdr(reinterpret_cast<const void*>(&run), &library);
    const auto offset = reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    const std::string& name = symbols[offset];
    const ptx::Kernel* kernel = program->find(name);
    if (!kernel) throw deltaic::Error("no PTX of the kernel '" + name + "'");
    return *kernel;
}

}  // namespace

void load_ptx(const std::string& name, const std::vector<std::string>& files,
              const std::map<uint64_t, std::string>& names) {
    ptx::Program& loaded = programs[name];
    loaded = {};
    for (const std::string& text : files) loaded.add(text);
    symbols = names;
}

void use_ptx(const std::string& name) { program = name.empty() ? nullptr : &programs.at(name); }

void run_ptx(const std::string& text, const std::string& kernel, unsigned blocks, unsigned threads,
             size_t dynamic_shared, const std::vector<uint64_t>& arguments) {
    ptx::Program one;
    one.add(text);
    std::vector<Argument> list;
    for (const uint64_t& argument : arguments) list.push_back({&argument, sizeof argument});
    Launch launch{kernel.c_str(), nullptr, {blocks}, {threads}, dynamic_shared, list.data(), list.size(), {}, {}};
    if (!one.find(kernel)) throw deltaic::Error("simt: no PTX of the kernel '" + kernel + "'");
    ptx::run(*one.find(kernel), launch, order, order_seed);
}

std::map<std::string, std::pair<size_t, std::vector<std::string>>> ptx_coverage(const std::string& name) {
    std::map<std::string, std::pair<size_t, std::vector<std::string>>> coverage;
    for (const auto& [kernel, found] : programs.at(name).kernels()) {
        auto& [all, missed] = coverage[kernel];
        all = found.code.size();
        for (const ptx::Instr& in : found.code)
            if (!in.ran) missed.push_back(ptx::location(found, in));
    }
    return coverage;
}

void run(const Launch& launch) {
    const dim3 grid = launch.grid, threads = launch.block;
    const size_t dynamic_bytes = launch.dynamic_shared;
    const auto refuse = [&](const std::string& message) {
        throw deltaic::Error(std::string("simt: ") + launch.name + ": " + message);
    };
    const unsigned count = threads.x * threads.y * threads.z;
    if (running) refuse("a kernel cannot launch a kernel here");
    if (count == 0 || count > kMaxThreads || count % 32)
        refuse("a block of " + std::to_string(count) + " threads, expected 32 to 1024 in steps of 32");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
        refuse("a grid of " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" + std::to_string(grid.z));
    if (dynamic_bytes > 232448) refuse("more dynamic shared memory than a block can have");
    if (program) {
        try {
            return ptx::run(ptx_kernel(launch.kernel), launch, order, order_seed);
        } catch (const deltaic::Error& error) {
            refuse(error.what());
        }
    }
    allocate_stacks();
    install_fault_handler();
    block = std::make_unique<Block>();
    Block& b = *block;
    b.threads = static_cast<int>(count);
    b.fibres.resize(count);
    b.warps.resize(count / 32);
    b.dynamic_bytes = dynamic_bytes;
    b.body = launch.body, b.context = launch.context, b.kernel = launch.name;
    gridDim = grid, blockDim = threads;
    std::mt19937_64 random(order_seed);
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> turns(blocks);
    for (uint64_t i = 0; i < blocks; ++i) turns[i] = order == Order::reverse ? blocks - 1 - i : i;
    if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
    running = true;
    if (!run_until_fault(turns, random)) b.error = std::string(fault_message) + " (" + thread_name() + ")";
    running = false;
    shared_dirty = kShared;
    if (!b.error.empty()) refuse(b.error);
}

void guarded_region(uint64_t address, uint64_t* begin, uint64_t* end, uint64_t* data, uint64_t* data_end,
                    std::string* name) {
    *begin = 0, *end = UINT64_MAX;
    for (const auto& [memory, g] : guarded) {
        const uint64_t first = reinterpret_cast<uintptr_t>(g.base), last = first + g.total;
        if (address >= last) {
            *begin = std::max(*begin, last);
        } else if (address < first) {
            *end = std::min(*end, first);
        } else {
            *begin = first, *end = last, *data = reinterpret_cast<uintptr_t>(memory), *data_end = *data + g.bytes;
            *name = g.name;
            return;
        }
    }
}

void* guarded_alloc(size_t bytes, const char* name) {
    install_fault_handler();
    constexpr size_t kGuard = 1 << 20;  // catches strides that jump far
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t data = (bytes + 15) / 16 * 16, pages = (data + page - 1) / page * page;
    void* p = mmap(nullptr, pages + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw deltaic::Error("simt: no memory for a guarded buffer");
    uint8_t* base = static_cast<uint8_t*>(p);
    if (pages && mprotect(base + kGuard, pages, PROT_READ | PROT_WRITE)) throw deltaic::Error("simt: mprotect failed");
    std::memset(base + kGuard, 0xCD, pages);
    const size_t offset = kGuard + pages - data;  // 16-byte aligned; up to 15 bytes of slack before the upper guard
    guarded.emplace(base + offset, Guarded{base, pages + 2 * kGuard, offset, bytes, name});
    return base + offset;
}

void guarded_free(void* data) {
    const auto it = guarded.find(static_cast<uint8_t*>(data));
    if (it == guarded.end()) return;
    const Guarded g = it->second;
    guarded.erase(it);
    ptx::forget(reinterpret_cast<uintptr_t>(data));
    bool intact = true;  // what lies before the data, and the slack after it, must still be poison
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (const uint8_t* p =
             g.base + (g.data_offset / page * page < (1 << 20) ? (1 << 20) : g.data_offset / page * page);
         p < g.base + g.data_offset; ++p)
        intact &= *p == 0xCD;
    for (const uint8_t* p = g.base + g.data_offset + g.bytes; p < g.base + g.total - (1 << 20); ++p)
        intact &= *p == 0xCD;
    munmap(g.base, g.total);
    if (!intact) throw deltaic::Error("simt: bytes beside device buffer '" + g.name + "' were overwritten");
}

}  // namespace simt
