#include "core/pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "core/pool.h"
#endif

namespace deltaic {

#if defined(__linux__)
namespace {

// The ioctl PAGEMAP_SCAN of Linux 6.7, which the headers of many a compiler do not have yet (linux/fs.h).
struct Region {
    uint64_t start, end, categories;
};
struct Scan {
    uint64_t size, flags, start, end, walk_end, regions, capacity, max_pages, inverted, mask, any_of, returned;
};
constexpr uint64_t kIsHuge = 1 << 6;

bool read_fully(int fd, char* to, size_t bytes, int64_t offset) {
    while (bytes) {
        const ssize_t n = pread(fd, to, bytes, static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        to += n, offset += n, bytes -= static_cast<size_t>(n);
    }
    return true;
}

// Most of the time goes into new pages, so all threads take their share.
bool fill(char* to, size_t bytes, int fd, int64_t offset) {
    std::atomic<bool> good{true};
    const OperatorScope scope;
    parallel_for(static_cast<int64_t>(bytes / kHugePage), 1, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * static_cast<int64_t>(kHugePage);
        const size_t n = static_cast<size_t>(end - begin) * kHugePage;
        if (!read_fully(fd, to + first, n, offset + first)) good = false;
    });
    return good;
}

}  // namespace

int64_t huge_bytes(const void* data, size_t bytes) {
    const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map < 0) return -1;
    Region regions[64];
    Scan scan{};
    scan.size = sizeof(scan);
    scan.start = reinterpret_cast<uint64_t>(data);
    scan.end = scan.start + bytes;
    scan.regions = reinterpret_cast<uint64_t>(regions);
    scan.capacity = 64;
    scan.mask = scan.returned = kIsHuge;
    int64_t found = 0;
    while (found >= 0 && scan.start < scan.end) {
        const int n = ioctl(map, _IOWR('f', 16, Scan), &scan);
        for (int i = 0; i < n; ++i) found += static_cast<int64_t>(regions[i].end - regions[i].start);
        if (n < 0 || scan.walk_end <= scan.start) found = -1;
        scan.start = scan.walk_end;
    }
    close(map);
    return found;
}

bool move_to_huge_pages(void* data, size_t bytes, int fd, int64_t offset) {
    const size_t room = bytes + kHugePage;  // the staging memory has to start at a multiple of a huge page too
    void* const whole = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return false;
    char* const first = static_cast<char*>(whole);
    char* const stage = first + (kHugePage - reinterpret_cast<uintptr_t>(whole) % kHugePage) % kHugePage;
    // mremap replaces the old mapping in one step: a reader that faults meanwhile waits for it.
    const bool moved = madvise(stage, bytes, MADV_HUGEPAGE) == 0 && fill(stage, bytes, fd, offset) &&
                       mprotect(stage, bytes, PROT_READ) == 0 &&
                       mremap(stage, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, data) == data;
    if (!moved) {
        munmap(whole, room);
        return false;
    }
    if (stage > first) munmap(first, static_cast<size_t>(stage - first));
    char* const rest = stage + bytes;
    if (rest < first + room) munmap(rest, static_cast<size_t>(first + room - rest));
    return true;
}

#else

int64_t huge_bytes(const void*, size_t) { return -1; }
bool move_to_huge_pages(void*, size_t, int, int64_t) { return false; }

#endif

}  // namespace deltaic
