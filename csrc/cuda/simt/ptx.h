// A machine for PTX, the text that nvcc makes of the kernels: what the emulator cannot see because the host compiler
// takes other branches (inline assembly, intrinsics, CUDA's own shared memory) runs here. Semantics are those of
// NVIDIA's PTX ISA, and none of common.cuh's.
//
// The lanes of a warp run in lock-step while they are at the same instruction; of several groups the one furthest
// behind goes first, so that they meet again. Registers hold 32 lanes. An operand is the number of a slot of the
// register file; constants, special registers and addresses of variables are slots too.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/simt/simt.h"

namespace simt {
namespace ptx {

constexpr int kLanes = 32;
constexpr size_t kSlotBytes = kLanes * 4;  // a 64-bit register takes two slots
constexpr int kMaxOperands = 14;

// Where generic addresses of shared and local memory begin: no host pointer lies there.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{2} << 60;

enum class Space : uint8_t { generic, global, shared, local, parameter };
// `together` and `barrier` are operations that lanes, or warps, take part in together.
enum class Access : uint8_t { none, load, store, atomic };
enum class Kind : uint8_t { plain, branch, exit, together, barrier };

struct Warp;
struct Instr;
using Execute = void (*)(Warp&, const Instr&, uint32_t lanes);

struct Instr {
    Execute execute = nullptr;
    uint32_t r[kMaxOperands] = {};  // slots, results first
    int32_t guard = -1;             // slot of a predicate
    int32_t members = -1;           // slot of the mask of lanes that take part; none: all 32
    int32_t base = -1;              // slot of an address
    int32_t target = -1;            // of a branch
    int64_t offset = 0;             // added to an address
    uint32_t place = 0;
    Kind kind = Kind::plain;
    Space space = Space::generic;
    Access access = Access::none;
    uint8_t element = 0, count = 1;  // bytes of an element, elements of a vector access
    bool guard_not = false, wide_base = false;
    mutable bool ran = false;
    const std::string* name = nullptr;
};

// An opcode: what runs it, and the widths of its operands in bits, 1 for a predicate.
struct Opcode {
    Execute execute;
    std::vector<int> widths;
    Kind kind = Kind::plain;
};
// Null for one that the machine does not have. Loads, stores and atomics are looked up by what they do alone: see
// memory_opcode.
const Opcode* find_opcode(const std::string& name);
// For "ld", "st" or "atom.add" of elements of `type`, to or from registers of `width` bits.
Execute memory_opcode(const std::string& what, const std::string& type, int width);
// Bytes of a type such as "f32" or "u8"; 0 for what is none.
int type_bytes(const std::string& type);

struct Place {
    int file = 0, line = 0, outer_file = 0, outer_line = 0;
};

// Special registers: where a thread is.
constexpr const char* kSpecials[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                     "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                     "%nctaid.y", "%nctaid.z", "%laneid"};

struct Constant {
    uint32_t slot;
    int width;
    uint64_t value;
};

struct Kernel {
    std::string name;
    std::vector<Instr> code;
    std::vector<std::pair<size_t, size_t>> parameters;  // offset, bytes
    size_t parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
    uint32_t slots = 0;
    std::vector<Constant> constants;
    std::vector<std::pair<size_t, uint32_t>> specials;  // which of kSpecials, slot
    std::vector<Place> places;
    std::shared_ptr<std::map<int, std::string>> files;
    unsigned max_threads = 0;
    size_t shared_unit = 4, global_unit = 4;  // bytes: the smallest access to that memory, which may be generic
    int capability = 0;                       // of .target
    bool waits = false;                       // for the kernels before it, of which it may overlap the end
};

// Kernels by name, as the host compiler mangles them.
class Program {
  public:
    // Adds the kernels of a PTX file.
    void add(const std::string& text);
    const Kernel* find(const std::string& name) const;
    const std::map<std::string, Kernel>& kernels() const { return kernels_; }

  private:
    friend struct Parser;
    std::map<std::string, Kernel> kernels_;
    std::set<std::string> names_;  // of opcodes
    std::map<std::string, std::unique_ptr<uint8_t[]>> globals_;
};

// Opcode and place in the source.
std::string location(const Kernel& kernel, const Instr& in);

void run(const Kernel& kernel, const Launch& launch, Order order, uint64_t seed);
// A device buffer is freed: another may begin where it did.
void forget(uint64_t data);

// --- the state that instructions change

struct Group {
    int pc;
    uint32_t lanes;
    bool waits;  // at a `together` or `barrier` that not all lanes have reached
};

struct Block;

struct Warp {
    Block* block;
    int index;
    uint8_t* registers;
    std::vector<uint32_t> defined;  // lanes of a slot that were written with something that was
    uint32_t carry = 0;             // CC.CF
    uint8_t* local;
    std::vector<Group> groups;
    uint32_t live = 0;
    bool at_barrier = false;
    uint32_t synced = 0;  // time of its last __syncwarp
    uint32_t waited = 0;  // lanes for which the kernels before have ended

    template <class T>
    T* lanes(uint32_t slot) {
        return reinterpret_cast<T*>(registers + slot * kSlotBytes);
    }
    uint32_t& predicate(uint32_t slot) { return *lanes<uint32_t>(slot); }
};

// Where a lane's access goes.
uint64_t address_of(Warp& w, const Instr& in, int lane);
// Leaves the kernel with an error that names the place, and the thread of `lane`.
[[noreturn]] void refuse(const Warp& w, const Instr& in, int lane, const std::string& message);
// The memory of one lane's access, which is checked and noted, to find races.
uint8_t* memory(Warp& w, const Instr& in, Space space, uint64_t address, size_t bytes, int lane, bool write,
                bool atomic);
const uint8_t* parameter_memory(const Warp& w);
void sync_warp(Warp& w, uint32_t lanes);

}  // namespace ptx
}  // namespace simt
