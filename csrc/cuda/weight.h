// A packed matrix on the GPU as plain data, for host and device code.
#pragma once

#include <cstdint>

#include "core/view.h"

namespace deltaic {
namespace cuda {

using Stream = void*;  // a cudaStream_t, which is a pointer

struct Matrix {
    int64_t format = 0;  // enum Format
    int64_t rows = 0, columns = 0, stride = 0;
    const uint8_t* q = nullptr;
    const uint8_t* s = nullptr;
    const uint16_t* d = nullptr;
};

// A weight: parts that read the same input; their outputs follow each other. With `glu`, one part of 2 * I rows, gate
// rows first.
struct Matrices {
    static constexpr int kMaxParts = 8;
    int64_t count = 1;  // experts
    int64_t glu = 0;
    int64_t parts = 0;
    Matrix part[kMaxParts];
};

}  // namespace cuda
}  // namespace deltaic
