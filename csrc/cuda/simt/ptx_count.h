// Counts what a launch on the PTX machine asks of memory, as NVIDIA describes its cards. A request is one instruction
// of a warp. In global memory it touches sectors of 32 bytes; in shared memory it takes a wavefront for every different
// word (4 bytes) that it wants of the same of 32 banks, where accesses of 8 bytes go in halves of the warp and those of
// 16 bytes in quarters. No caches, no time: see bench/cuda_traffic.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/simt/ptx.h"

namespace simt {
namespace ptx {

constexpr uint64_t kSector = 32;

// Of an instruction.
struct Tally {
    std::string place;      // opcode, file and line
    std::string kind;       // "global load", "shared store", "shared atomic" ...
    uint64_t requests = 0;  // of warps
    uint64_t bytes = 0;     // that lanes want, each counted once in a request
    uint64_t taken = 0;     // sectors or wavefronts
    uint64_t at_least = 0;  // the fewest for so many bytes
};

// Sectors of a device buffer.
struct BufferTraffic {
    std::string name;
    uint64_t size = 0;       // sectors that it has
    uint64_t requested = 0;  // by warps
    uint64_t per_block = 0;  // once for every block that touches them
    uint64_t shared = 0;     // once; of these those that blocks of several columns of the grid touch, and all others
    uint64_t alone = 0;
};

struct LaunchTraffic {
    std::string name, kernel;  // as launched; as the host compiler mangles it
    std::vector<unsigned> grid;
    unsigned threads = 0, columns = 0;  // of `grid[0]` that were run
    uint64_t shared_bytes = 0;
    uint64_t instructions = 0, lanes = 0, longest = 0;  // of warps; active lanes in them; instructions of one warp
    std::vector<Tally> places;
    std::vector<BufferTraffic> read, written;
};

// From here on launches are counted; `blocks`: of a larger grid about so many are run, those with the smallest x. 0: no
// more counting.
void count_traffic(uint64_t blocks);
// What was counted since the last call.
std::vector<LaunchTraffic> take_traffic();

class Counter {
  public:
    // Null where nothing is counted.
    static std::unique_ptr<Counter> of(const Kernel& kernel, const Launch& launch, size_t shared_bytes);
    bool runs(const dim3& block) const { return block.x < launch_.columns; }
    void begin(const dim3& block);
    void issue(Warp& w, const Instr& in, uint32_t lanes);
    // The launch has ended.
    void keep();

  private:
    explicit Counter(const Kernel& kernel) : kernel_(kernel) {}
    // Which blocks last touched a sector, and from which column of the grid: 0 for none, kSeveral for more than one.
    struct Touched {
        uint32_t block = 0, column = 0;
    };
    struct Buffer {
        uint64_t begin, end;  // of the addresses that belong to it
        uint64_t data;
        BufferTraffic traffic[2];  // read, written
        std::vector<Touched> touched[2];
    };
    Buffer& buffer_of(uint64_t address);
    void touch(Buffer& buffer, uint64_t sector, bool write);
    void global(Tally& tally, const Instr& in, std::vector<uint64_t>& addresses);
    void shared(Tally& tally, const Instr& in, Warp& w, uint32_t lanes);

    const Kernel& kernel_;
    LaunchTraffic launch_;
    std::vector<Tally> tallies_;  // by instruction
    std::map<uint64_t, Buffer> buffers_;
    Buffer* last_ = nullptr;
    uint32_t block_ = 0, column_ = 0;  // both from 1
    std::vector<uint64_t> of_warp_;    // instructions in this block
};

}  // namespace ptx
}  // namespace simt
