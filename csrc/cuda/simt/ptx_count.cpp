#include "cuda/simt/ptx_count.h"

#include <algorithm>
#include <bit>

namespace simt {
namespace ptx {
namespace {

constexpr uint32_t kSeveral = ~uint32_t{0};
constexpr int kBanks = 32, kBankBytes = 4;

uint64_t blocks_wanted = 0;
std::vector<LaunchTraffic> launches;

uint64_t access_bytes(const Instr& in) { return uint64_t{in.element} * in.count; }

const char* kind_of(const Instr& in, Space space) {
    static const char* const names[2][3] = {{"global load", "global store", "global atomic"},
                                            {"shared load", "shared store", "shared atomic"}};
    return names[space == Space::shared][static_cast<int>(in.access) - 1];
}

void unique(std::vector<uint64_t>& numbers) {
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

uint64_t divided_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

}  // namespace

void count_traffic(uint64_t blocks) { blocks_wanted = blocks, launches.clear(); }

std::vector<LaunchTraffic> take_traffic() { return std::exchange(launches, {}); }

std::unique_ptr<Counter> Counter::of(const Kernel& kernel, const Launch& launch, size_t shared_bytes) {
    if (!blocks_wanted) return nullptr;
    auto counter = std::unique_ptr<Counter>(new Counter(kernel));
    LaunchTraffic& l = counter->launch_;
    l.name = launch.name, l.kernel = kernel.name, l.grid = {launch.grid.x, launch.grid.y, launch.grid.z};
    l.threads = launch.block.x * launch.block.y * launch.block.z, l.shared_bytes = shared_bytes;
    const uint64_t row = uint64_t{launch.grid.y} * launch.grid.z;
    l.columns =
        static_cast<unsigned>(std::clamp<uint64_t>(blocks_wanted / row, std::min(launch.grid.x, 2u), launch.grid.x));
    counter->tallies_.resize(kernel.code.size());
    counter->of_warp_.resize(l.threads / kLanes);
    return counter;
}

void Counter::begin(const dim3& block) {
    ++block_, column_ = block.x + 1;
    std::fill(of_warp_.begin(), of_warp_.end(), 0);
}

void Counter::issue(Warp& w, const Instr& in, uint32_t lanes) {
    ++launch_.instructions, launch_.lanes += static_cast<uint64_t>(std::popcount(lanes));
    launch_.longest = std::max(launch_.longest, ++of_warp_[static_cast<size_t>(w.index)]);
    if (in.access == Access::none || lanes == 0) return;
    Space space = in.space;
    std::vector<uint64_t> addresses;
    for (uint32_t left = lanes; left; left &= left - 1) addresses.push_back(address_of(w, in, std::countr_zero(left)));
    if (space == Space::generic)
        space = addresses[0] >= kLocalWindow    ? Space::local
                : addresses[0] >= kSharedWindow ? Space::shared
                                                : Space::global;
    if (space != Space::global && space != Space::shared) return;
    Tally& tally = tallies_[static_cast<size_t>(&in - kernel_.code.data())];
    tally.kind = kind_of(in, space), ++tally.requests;
    if (space == Space::global)
        global(tally, in, addresses);
    else
        shared(tally, in, w, lanes);
}

Counter::Buffer& Counter::buffer_of(uint64_t address) {
    if (last_ && address >= last_->begin && address < last_->end) return *last_;
    uint64_t begin = 0, end = 0, data = 0, data_end = 0;
    std::string name = "constants";
    guarded_region(address, &begin, &end, &data, &data_end, &name);
    const auto [found, added] = buffers_.try_emplace(data);
    Buffer& buffer = found->second;
    if (added) {
        buffer.data = data;
        for (BufferTraffic& traffic : buffer.traffic)
            traffic.name = name, traffic.size = divided_up(data_end - data, kSector);
    }
    buffer.begin = begin, buffer.end = end;  // of the constants, the part around this address
    return *(last_ = &buffer);
}

void Counter::touch(Buffer& buffer, uint64_t sector, bool write) {
    BufferTraffic& traffic = buffer.traffic[write];
    ++traffic.requested;
    if (!traffic.size) return;
    std::vector<Touched>& touched = buffer.touched[write];
    touched.resize(traffic.size);
    Touched& here = touched.at(sector);
    traffic.per_block += here.block != block_;
    if (!here.column)
        ++traffic.alone;
    else if (here.column != column_ && here.column != kSeveral)
        --traffic.alone, ++traffic.shared;
    here = {block_, !here.column || here.column == column_ ? column_ : kSeveral};
}

void Counter::global(Tally& tally, const Instr& in, std::vector<uint64_t>& addresses) {
    unique(addresses);  // aligned to their size: two accesses are the same bytes, or have none in common
    const uint64_t bytes = addresses.size() * access_bytes(in);
    // Device memory begins at multiples of a sector, which guarded buffers here do not.
    std::vector<uint64_t> sectors;
    for (const uint64_t address : addresses) {
        const uint64_t data = buffer_of(address).data;
        sectors.push_back(data + (address - data) / kSector * kSector);
    }
    unique(sectors);
    for (const uint64_t sector : sectors) {
        Buffer& buffer = buffer_of(sector);
        if (in.access != Access::store) touch(buffer, (sector - buffer.data) / kSector, false);
        if (in.access != Access::load) touch(buffer, (sector - buffer.data) / kSector, true);
    }
    tally.bytes += bytes, tally.taken += sectors.size(), tally.at_least += divided_up(bytes, kSector);
}

void Counter::shared(Tally& tally, const Instr& in, Warp& w, uint32_t lanes) {
    const uint64_t size = access_bytes(in);
    const int together = static_cast<int>(kLanes / std::max<uint64_t>(size / kBankBytes, 1));
    std::vector<uint64_t> all;
    for (int first = 0; first < kLanes; first += together) {
        std::vector<uint64_t> words;
        for (int lane = first; lane < first + together; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const uint64_t address = address_of(w, in, lane) % kSharedWindow;
            all.push_back(address);
            for (uint64_t word = address / kBankBytes; word * kBankBytes < address + size; ++word)
                words.push_back(word);
        }
        if (in.access != Access::atomic) unique(words);  // atomics on the same word take turns
        uint64_t wanted[kBanks] = {};
        for (const uint64_t word : words) ++wanted[word % kBanks];
        tally.taken += *std::max_element(wanted, wanted + kBanks);
    }
    unique(all);
    tally.bytes += all.size() * size, tally.at_least += divided_up(all.size() * size, kBanks * kBankBytes);
}

void Counter::keep() {
    for (size_t i = 0; i < tallies_.size(); ++i)
        if (tallies_[i].requests) {
            launch_.places.push_back(tallies_[i]);
            launch_.places.back().place = location(kernel_, kernel_.code[i]);
        }
    for (const auto& [data, buffer] : buffers_) {
        if (buffer.traffic[0].requested) launch_.read.push_back(buffer.traffic[0]);
        if (buffer.traffic[1].requested) launch_.written.push_back(buffer.traffic[1]);
    }
    launches.push_back(std::move(launch_));
}

}  // namespace ptx
}  // namespace simt
