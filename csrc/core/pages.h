// Huge pages for what lies in a mapped file. Where the system has no such thing, these say so and change nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deltaic {

constexpr size_t kHugePage = size_t{2} << 20;

// How many of `bytes` from `data` on (both multiples of the page size) are mapped by huge pages; -1 where the system
// does not tell.
int64_t huge_bytes(const void* data, size_t bytes);

// Replaces [data, data + bytes), multiples of kHugePage in a read-only mapping of the file `fd` from `offset` on, by a
// copy in huge pages of this process at the same addresses. Others may read there meanwhile: they find the file's pages
// or the copy. False, and the mapping is as it was, if the file cannot be read or memory cannot be had.
bool move_to_huge_pages(void* data, size_t bytes, int fd, int64_t offset);

}  // namespace deltaic
