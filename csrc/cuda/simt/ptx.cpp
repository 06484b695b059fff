// Runs a kernel of the PTX machine: blocks, warps, groups of lanes, barriers, memory with its bounds and races.
#include "cuda/simt/ptx.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <random>
#include <set>

#include "core/error.h"
#include "cuda/simt/ptx_count.h"

namespace simt {
namespace ptx {

// Last accesses of one unit of memory.
struct Shadow {
    uint32_t written = 0, read = 0;           // when; 0: never
    int32_t write_block = 0, read_block = 0;  // a block of -1 stands for several
    int16_t writer = 0, reader = 0;  // thread; a reader below 0 stands for several of warp -1 - reader, or of any
    bool atomic = false;             // the write was one
};
constexpr int16_t kReadByManyWarps = -1000;

struct Block {
    const Kernel& kernel;
    const uint8_t* parameters;
    dim3 grid, size, index;
    int threads = 0;
    std::vector<Warp> warps;
    uint8_t* shared;
    size_t shared_bytes;
    std::vector<Shadow> shadow;
    // Time passes at barriers and __syncwarps. An access comes before all later ones where a barrier lies between, and
    // before those of its warp where a __syncwarp does. Shuffles, votes and products order nothing.
    uint32_t now = 1, barrier = 1;
    uint64_t steps = 0;
};

namespace {

constexpr uint64_t kMostSteps = uint64_t{1} << 31;  // of a block, in instructions of a warp

[[noreturn]] void race(const Warp& w, const Instr& in, int lane, const std::string& where, const char* what, int other,
                       int block) {
    const std::string who = other >= 0 ? "thread " + std::to_string(other) : "several threads";
    refuse(w, in, lane,
           "race on " + where + ": " + what + " " + who + " of block " + std::to_string(block) +
               " (of the grid) with no barrier between");
}

// Notes an access to units [first, end) of memory that `where()` names. `block`: 0 for shared memory, which each has
// for itself.
template <class F>
void note(Warp& w, const Instr& in, std::vector<Shadow>& shadow, size_t first, size_t end, int block, int lane,
          bool write, bool atomic, F where) {
    const Block& b = *w.block;
    const int thread = w.index * kLanes + lane;
    // Whether an access of a warp of a block at that time comes before this one.
    const auto before = [&](int other_block, int other_warp, uint32_t when) {
        return other_block == block && (when < b.barrier || (other_warp == w.index && when < w.synced));
    };
    for (size_t i = first; i < end; ++i) {
        Shadow& s = shadow[i];
        const bool own_write = s.write_block == block && s.writer == thread;
        if (s.written && !own_write && !(atomic && s.atomic) && !before(s.write_block, s.writer / kLanes, s.written))
            race(w, in, lane, where(i), write ? "written also by" : "read of what was written by", s.writer,
                 s.write_block);
        const int reader_warp = s.reader >= 0 ? s.reader / kLanes : s.reader == kReadByManyWarps ? -1 : -1 - s.reader;
        const bool nobody_else =
            !s.read || (s.read_block == block && s.reader == thread) || before(s.read_block, reader_warp, s.read);
        if (write) {
            if (!nobody_else) race(w, in, lane, where(i), "overwrites what was read by", s.reader, s.read_block);
            s.written = b.now, s.writer = static_cast<int16_t>(thread), s.write_block = block, s.atomic = atomic;
        } else {
            s.reader = nobody_else              ? static_cast<int16_t>(thread)
                       : s.read_block != block  ? kReadByManyWarps
                       : reader_warp == w.index ? static_cast<int16_t>(-1 - w.index)
                                                : kReadByManyWarps;
            s.read_block = nobody_else || s.read_block == block ? block : -1;
            s.read = b.now;
        }
    }
}

// The part of the address space around an address within which it lies in one device buffer, or in none.
struct Region {
    uint64_t begin = 1, end = 0;  // of the addresses
    uint64_t data = 0, data_end = 0;
    std::string name;
    std::vector<Shadow>* shadow = nullptr;  // of what this launch has written to
} region;
std::map<uint64_t, std::vector<Shadow>> global_shadow;  // by where the buffer begins
std::set<uint64_t> written;                             // by any launch, where they begin
Counter* counter = nullptr;                             // of this launch, where launches are counted

uint8_t* global_memory(Warp& w, const Instr& in, uint64_t address, size_t bytes, int lane, bool write, bool atomic) {
    const Block& b = *w.block;
    if (address < region.begin || address >= region.end) {
        region = {};
        if (address < 65536 || address >> 47)
            refuse(w, in, lane, "no memory has the address " + std::to_string(address));
        guarded_region(address, &region.begin, &region.end, &region.data, &region.data_end, &region.name);
        const auto found = global_shadow.find(region.data);
        if (found != global_shadow.end()) region.shadow = &found->second;
    }
    if (region.data_end == 0) return reinterpret_cast<uint8_t*>(address);
    if (address < region.data || address + bytes > region.data_end)
        refuse(w, in, lane,
               "access to byte " + std::to_string(static_cast<int64_t>(address - region.data)) + " of device buffer '" +
                   region.name + "' of " + std::to_string(region.data_end - region.data) + " bytes");
    // Blocks run one after another here, in any order there. What is read before the first write to a buffer is not
    // noted; another order of blocks shows that.
    const size_t unit = b.kernel.global_unit;
    if (b.kernel.waits && !(w.waited >> lane & 1) && (write || written.count(region.data)))
        refuse(w, in, lane,
               "device buffer '" + region.name + "', which kernels write, is used before those before have ended");
    if (write && !region.shadow) {
        written.insert(region.data);
        region.shadow = &global_shadow[region.data];
        region.shadow->resize((region.data_end - region.data) / unit + 1);
    }
    if (region.shadow) {
        const size_t offset = address - region.data;
        const int block = static_cast<int>((b.index.z * b.grid.y + b.index.y) * b.grid.x + b.index.x);
        note(w, in, *region.shadow, offset / unit, (offset + bytes + unit - 1) / unit, block, lane, write, atomic,
             [&](size_t i) { return "byte " + std::to_string(i * unit) + " of device buffer '" + region.name + "'"; });
    }
    return reinterpret_cast<uint8_t*>(address);
}

void poison_and_start(Block& b) {
    std::memset(b.shared, 0xCD, b.shared_bytes);
    b.barrier = ++b.now;
    b.steps = 0;
    for (Warp& w : b.warps) {
        w.groups.assign(1, Group{0, ~uint32_t{0}, false});
        w.live = ~uint32_t{0}, w.at_barrier = false, w.synced = b.barrier, w.waited = 0;
        std::fill(w.defined.begin(), w.defined.end(), 0);
        std::memset(w.local, 0xCD, b.kernel.local_bytes * kLanes);
        for (const Constant& c : b.kernel.constants) w.defined[c.slot] = ~uint32_t{0};
        for (const auto& [special, slot] : b.kernel.specials) {
            w.defined[slot] = ~uint32_t{0};
            for (int lane = 0; lane < kLanes; ++lane) {
                const unsigned n = static_cast<unsigned>(w.index * kLanes + lane);
                const unsigned values[] = {n % b.size.x,
                                           n / b.size.x % b.size.y,
                                           n / (b.size.x * b.size.y),
                                           b.size.x,
                                           b.size.y,
                                           b.size.z,
                                           b.index.x,
                                           b.index.y,
                                           b.index.z,
                                           b.grid.x,
                                           b.grid.y,
                                           b.grid.z,
                                           static_cast<unsigned>(lane)};
                w.lanes<uint32_t>(slot)[lane] = values[special];
            }
        }
    }
}

// The lanes that must be at an instruction before any of them executes it.
uint32_t members(const Warp& w, const Instr& in, uint32_t lanes) {
    if (in.members < 0) return ~uint32_t{0};
    const uint32_t slot = static_cast<uint32_t>(in.members);
    const uint32_t* masks = reinterpret_cast<const uint32_t*>(w.registers + slot * kSlotBytes);
    const int first = std::countr_zero(lanes);
    for (int i = first; i < kLanes; ++i)
        if (lanes >> i & 1) {
            if (!(w.defined[slot] >> i & 1)) refuse(w, in, i, "a mask of lanes that was never set");
            if (masks[i] != masks[first]) refuse(w, in, i, "lanes that give different masks");
            if (!(masks[i] >> i & 1)) refuse(w, in, i, "a lane that is not in its own mask");
        }
    return masks[first] & w.live;
}

// Runs a warp until it waits, ends, or has executed `budget` instructions.
void run_warp(Warp& w, uint64_t budget) {
    Block& b = *w.block;
    const Instr* code = b.kernel.code.data();
    for (;;) {
        // Groups that have met are one; the one furthest behind that does not wait goes on.
        std::sort(w.groups.begin(), w.groups.end(), [](const Group& x, const Group& y) { return x.pc < y.pc; });
        for (size_t i = 0; i + 1 < w.groups.size();)
            if (w.groups[i].pc == w.groups[i + 1].pc) {
                w.groups[i].lanes |= w.groups[i + 1].lanes, w.groups[i].waits = false;
                w.groups.erase(w.groups.begin() + static_cast<ptrdiff_t>(i) + 1);
            } else
                ++i;
        size_t current = 0;
        while (current < w.groups.size() && w.groups[current].waits) ++current;
        if (current == w.groups.size()) return;
        const int stop = current + 1 < w.groups.size() ? w.groups[current + 1].pc : INT32_MAX;
        int pc = w.groups[current].pc;
        const uint32_t active = w.groups[current].lanes;
        for (bool together = true; together;) {
            const Instr& in = code[pc];
            uint32_t lanes = active;
            if (in.guard >= 0) {
                const uint32_t slot = static_cast<uint32_t>(in.guard);
                if ((w.defined[slot] & active) != active)
                    refuse(w, in, std::countr_zero(active & ~w.defined[slot]), "a predicate that was never set");
                lanes &= in.guard_not ? ~w.predicate(slot) : w.predicate(slot);
            }
            ++b.steps;
            in.ran = true;
            if (counter && in.kind != Kind::together && in.kind != Kind::barrier) counter->issue(w, in, lanes);
            switch (in.kind) {
                case Kind::plain:
                    if (lanes) in.execute(w, in, lanes);
                    ++pc;
                    break;
                case Kind::branch:
                    if (lanes == active) {
                        pc = in.target;
                        if (w.groups.size() > 1) {  // perhaps to where another group waits
                            w.groups[current].pc = pc;
                            together = false;
                        }
                    } else if (lanes == 0) {
                        ++pc;
                    } else {
                        w.groups[current] = {pc + 1, active & ~lanes, false};
                        w.groups.push_back({in.target, lanes, false});
                        together = false;
                    }
                    break;
                case Kind::exit:
                    if (b.kernel.waits && (lanes & ~w.waited))
                        refuse(w, in, std::countr_zero(lanes & ~w.waited), "ends before the kernels before it have");
                    w.live &= ~lanes;
                    if (lanes == active)
                        w.groups.erase(w.groups.begin() + static_cast<ptrdiff_t>(current));
                    else
                        w.groups[current] = {pc + 1, active & ~lanes, false};
                    // Those that wait for the lanes that are gone may go on.
                    for (Group& g : w.groups) g.waits = false;
                    together = false;
                    break;
                case Kind::together:
                case Kind::barrier:
                    if (lanes) {
                        const uint32_t needed = members(w, in, lanes);
                        if ((lanes & needed) != needed) {
                            w.groups[current] = {pc, active, true};
                            together = false;
                            break;
                        }
                        if (in.kind == Kind::barrier) {
                            w.groups[current] = {pc, active, true};
                            w.at_barrier = true;
                            return;
                        }
                        if (counter) counter->issue(w, in, lanes);
                        in.execute(w, in, lanes);
                    }
                    ++pc;
                    break;
            }
            if (!together) break;
            if (pc >= stop || --budget == 0) {
                w.groups[current].pc = pc;
                together = false;
            }
            if (b.steps > kMostSteps) refuse(w, in, 0, "a block that does not end");
        }
        if (budget == 0) return;
    }
}

// Where a warp's groups wait, and for whom.
[[noreturn]] void report_waiting(Block& b) {
    int returned = 0;
    for (const Warp& w : b.warps) returned += kLanes - std::popcount(w.live);
    const Warp* stuck = nullptr;
    for (const Warp& w : b.warps)
        if (w.live && (!stuck || (!w.at_barrier && stuck->at_barrier))) stuck = &w;
    const Group& g = stuck->groups[0];
    std::string others;
    for (size_t i = 1; i < stuck->groups.size(); ++i)
        others += ", lane " + std::to_string(std::countr_zero(stuck->groups[i].lanes)) + " is at " +
                  location(b.kernel, b.kernel.code[static_cast<size_t>(stuck->groups[i].pc)]);
    refuse(*stuck, b.kernel.code[static_cast<size_t>(g.pc)], std::countr_zero(g.lanes),
           "some threads never reach a barrier or warp operation that others wait for" + others + ", " +
               std::to_string(returned) + " of " + std::to_string(b.threads) + " threads have returned");
}

void run_block(Block& b, Order order, std::mt19937_64& random) {
    poison_and_start(b);
    std::vector<size_t> turns(b.warps.size());
    for (size_t i = 0; i < turns.size(); ++i) turns[i] = order == Order::reverse ? turns.size() - 1 - i : i;
    for (;;) {
        if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
        bool progress = false, ended = true;
        for (const size_t i : turns) {
            Warp& w = b.warps[i];
            if (w.live) ended = false;
            if (!w.live || w.at_barrier) continue;
            const uint64_t before = b.steps;
            run_warp(w, order == Order::random ? 1 + random() % 400 : UINT64_MAX);
            progress |= b.steps != before || w.live == 0;
        }
        if (ended) return;
        if (progress) continue;
        for (const Warp& w : b.warps)
            if (!w.at_barrier) report_waiting(b);
        // All wait at a barrier, which must be the same.
        for (Warp& w : b.warps)
            if (w.groups[0].pc != b.warps[0].groups[0].pc)
                refuse(w, b.kernel.code[static_cast<size_t>(w.groups[0].pc)], 0,
                       "threads meet at different barriers, this and " +
                           location(b.kernel, b.kernel.code[static_cast<size_t>(b.warps[0].groups[0].pc)]));
        b.barrier = ++b.now;
        for (Warp& w : b.warps) w.at_barrier = false, w.groups[0].waits = false, ++w.groups[0].pc;
    }
}

// Bytes of shared memory that a block can have when the host has asked for them.
size_t shared_limit(int capability) {
    if (capability >= 120) return 99 * 1024;
    if (capability >= 90) return 227 * 1024;
    if (capability == 86 || capability == 89) return 99 * 1024;
    return capability >= 80 ? 163 * 1024 : 64 * 1024;
}

}  // namespace

std::string location(const Kernel& k, const Instr& in) {
    const Place& p = k.places[in.place];
    const auto line = [&](int file, int number) {
        const auto found = k.files->find(file);
        return (found == k.files->end() ? "?" : found->second) + ":" + std::to_string(number);
    };
    std::string text = *in.name;
    if (p.file) text += " of " + line(p.file, p.line);
    if (p.outer_file) text += " in " + line(p.outer_file, p.outer_line);
    return text;
}

void refuse(const Warp& w, const Instr& in, int lane, const std::string& message) {
    const Block& b = *w.block;
    throw deltaic::Error(message + " (" + location(b.kernel, in) + ", thread " +
                         std::to_string(w.index * kLanes + lane) + " of block (" + std::to_string(b.index.x) + "," +
                         std::to_string(b.index.y) + "," + std::to_string(b.index.z) + "))");
}

uint8_t* memory(Warp& w, const Instr& in, Space space, uint64_t address, size_t bytes, int lane, bool write,
                bool atomic) {
    if (address % bytes) refuse(w, in, lane, "address is not aligned to " + std::to_string(bytes) + " bytes");
    if (space == Space::generic) {
        space = address >= kLocalWindow ? Space::local : address >= kSharedWindow ? Space::shared : Space::global;
        address -= space == Space::local ? kLocalWindow : space == Space::shared ? kSharedWindow : 0;
    }
    Block& b = *w.block;
    if (space == Space::global) return global_memory(w, in, address, bytes, lane, write, atomic);
    if (space == Space::shared) {
        if (address + bytes > b.shared_bytes || address + bytes < bytes)
            refuse(w, in, lane,
                   "access to byte " + std::to_string(static_cast<int32_t>(address)) + " of " +
                       std::to_string(b.shared_bytes) + " bytes of shared memory");
        const size_t unit = b.kernel.shared_unit;
        note(w, in, b.shadow, address / unit, (address + bytes) / unit, 0, lane, write, atomic,
             [&](size_t i) { return "shared memory byte " + std::to_string(i * unit); });
        return b.shared + address;
    }
    if (space == Space::parameter) {
        if (write || address + bytes > b.kernel.parameter_bytes || address + bytes < bytes)
            refuse(w, in, lane, "access to byte " + std::to_string(address) + " of the parameters");
        return const_cast<uint8_t*>(b.parameters) + address;  // which is not written
    }
    if (address + bytes > b.kernel.local_bytes || address + bytes < bytes)
        refuse(w, in, lane, "access to byte " + std::to_string(address) + " of local memory");
    return w.local + static_cast<size_t>(lane) * b.kernel.local_bytes + address;
}

const uint8_t* parameter_memory(const Warp& w) { return w.block->parameters; }

void forget(uint64_t data) { written.erase(data); }

void sync_warp(Warp& w, uint32_t lanes) {
    if (lanes == w.live) w.synced = ++w.block->now;
}

void run(const Kernel& kernel, const Launch& launch, Order order, uint64_t seed) {
    const auto fail = [](const std::string& message) { throw deltaic::Error(message); };
    if (launch.count != kernel.parameters.size())
        fail("the kernel has " + std::to_string(kernel.parameters.size()) + " parameters, launched with " +
             std::to_string(launch.count));
    std::vector<uint64_t> parameters(kernel.parameter_bytes / 8 + 1);
    for (size_t i = 0; i < launch.count; ++i) {
        const auto& [offset, bytes] = kernel.parameters[i];
        if (bytes != launch.arguments[i].bytes)
            fail("parameter " + std::to_string(i) + " has " + std::to_string(bytes) + " bytes, launched with " +
                 std::to_string(launch.arguments[i].bytes));
        std::memcpy(reinterpret_cast<uint8_t*>(parameters.data()) + offset, launch.arguments[i].data, bytes);
    }
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    if (launch.block.z > 64) fail("a block of more than 64 layers");
    if (kernel.max_threads && threads > kernel.max_threads)
        fail(std::to_string(threads) + " threads, but __launch_bounds__ says " + std::to_string(kernel.max_threads));
    // `launch` of common.cuh asks for more than 48 KB where it needs more dynamic memory than that.
    const size_t dynamic = launch.dynamic_shared,
                 shared_bytes = dynamic ? (kernel.shared_bytes + 15) / 16 * 16 + dynamic : kernel.shared_bytes,
                 limit = dynamic > 48 * 1024 ? shared_limit(kernel.capability) : 48 * 1024;
    if (shared_bytes > limit)
        fail(std::to_string(shared_bytes) + " bytes of shared memory, " + std::to_string(dynamic) +
             " of them dynamic, where a block can have " + std::to_string(limit));

    const size_t file_bytes = kernel.slots * kSlotBytes, warps = threads / kLanes;
    const auto allocate = [](size_t bytes) {
        return std::unique_ptr<uint8_t, void (*)(void*)>(
            static_cast<uint8_t*>(std::aligned_alloc(1024, (bytes + 1024) / 1024 * 1024)), std::free);
    };
    const auto registers = allocate(file_bytes * warps), shared = allocate(shared_bytes),
               local = allocate(kernel.local_bytes * kLanes * warps);
    Block b{kernel, reinterpret_cast<const uint8_t*>(parameters.data()), launch.grid, launch.block, {}, 0, {}, {}, 0,
            {}};
    b.threads = static_cast<int>(threads), b.shared = shared.get(), b.shared_bytes = shared_bytes;
    b.shadow.resize(shared_bytes / kernel.shared_unit + 1);
    b.warps.resize(warps);
    for (size_t i = 0; i < warps; ++i) {
        Warp& w = b.warps[i];
        w.block = &b, w.index = static_cast<int>(i), w.registers = registers.get() + i * file_bytes;
        w.local = local.get() + i * kernel.local_bytes * kLanes;
        w.defined.resize(kernel.slots);
        for (const Constant& c : kernel.constants)
            for (int lane = 0; lane < kLanes; ++lane) {
                if (c.width == 64) w.lanes<uint64_t>(c.slot)[lane] = c.value;
                if (c.width == 32) w.lanes<uint32_t>(c.slot)[lane] = static_cast<uint32_t>(c.value);
                if (c.width == 16) w.lanes<uint16_t>(c.slot)[lane] = static_cast<uint16_t>(c.value);
                if (c.width == 1) w.predicate(c.slot) = c.value ? ~uint32_t{0} : 0;
            }
    }
    region = {};
    global_shadow.clear();
    std::mt19937_64 random(seed);
    const uint64_t blocks = static_cast<uint64_t>(b.grid.x) * b.grid.y * b.grid.z;
    std::vector<uint64_t> turns(blocks);
    for (uint64_t i = 0; i < blocks; ++i) turns[i] = order == Order::reverse ? blocks - 1 - i : i;
    if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
    const std::unique_ptr<Counter> counting = Counter::of(kernel, launch, shared_bytes);
    counter = counting.get();
    for (const uint64_t i : turns) {
        b.index = dim3(static_cast<unsigned>(i % b.grid.x), static_cast<unsigned>(i / b.grid.x % b.grid.y),
                       static_cast<unsigned>(i / b.grid.x / b.grid.y));
        if (counter && !counter->runs(b.index)) continue;
        if (counter) counter->begin(b.index);
        run_block(b, order, random);
    }
    if (counter) counter->keep();
}

}  // namespace ptx
}  // namespace simt
