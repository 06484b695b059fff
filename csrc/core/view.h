// Plain-data views of the arrays that an operator reads and writes. No ownership, no strides: every array is
// C-contiguous.
#pragma once

#include <cstdint>

// Helpers that per-instruction-set files include must never be merged by the linker with a copy built for another
// instruction set, so they are always inlined.
#define DELTAIC_INLINE inline __attribute__((always_inline))

namespace deltaic {

enum class Dtype : int32_t { f32, u16, u8, i64 };  // u16 holds bfloat16 bits

struct View {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int32_t ndim = 0;
    int64_t shape[5] = {};

    DELTAIC_INLINE float* f32() const { return static_cast<float*>(data); }
    DELTAIC_INLINE uint16_t* u16() const { return static_cast<uint16_t*>(data); }
    DELTAIC_INLINE uint8_t* u8() const { return static_cast<uint8_t*>(data); }
    DELTAIC_INLINE int64_t* i64() const { return static_cast<int64_t*>(data); }
    DELTAIC_INLINE explicit operator bool() const { return data != nullptr; }
};

// One view per sequence of a batch.
struct Views {
    const View* data = nullptr;
    int64_t size = 0;
    DELTAIC_INLINE const View& operator[](int64_t i) const { return data[i]; }
};

// Packed number formats of weight matrices. A matrix is cut into blocks of 16 rows, so that one vector register holds
// the same column of 16 rows and a dot product needs no horizontal sum. Layout of one block, K columns:
//   f32   [K][16] float
//   bf16  [K/2][16][2] bfloat16 bits: two neighbouring columns of a row are one 32-bit lane
//   int8  n = ceil(K/128) runs of 128 columns: d [n][16] half, then q [n][32][16][4] uint8 (value + 128; four
//         neighbouring columns are one lane). w = d * value, value in -127..127. 8.125 bits per weight.
//   int4  d [n][16] half; then s [n][4][16] uint8: two 4-bit scales - 1 per byte, groups 2i (low) and 2i+1 (high); then
//         q [n][8][2][16][4] uint8: each run is 8 groups of 16 columns, each group 2 lines of 64 bytes whose low
//         nibbles hold four columns and whose high nibbles the next four (value + 8). w = d * s * value, s in 1..16,
//         value in -8..7. 4.375 bits per weight. s * value fits a signed byte, so a run of 128 columns is one exact
//         integer dot product.
// Scales come first: a block is then read from its first byte to its last, which is what processors fetch ahead.
enum class Format : int32_t { f32, bf16, int8, int4 };

constexpr int64_t kBlockRows = 16;
constexpr int64_t kRun = 128;   // columns that share d, and for which activations share one scale
constexpr int64_t kGroup = 16;  // columns that share s
constexpr int64_t kWordBytes =
    128;  // activations of one token that meet a run: 128 int8 or 64 bfloat16 numbers, 32 words
constexpr int64_t kInt4RunBytes = 1024 + 64 + 32;  // of a run of an int4 block, scales and d included
constexpr int64_t kFormBytes = kRun * kBlockRows;  // of a run of weights on its way through a kernel

DELTAIC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one block of 16 rows.
DELTAIC_INLINE int64_t block_bytes(Format format, int64_t columns) {
    switch (format) {
        case Format::f32:
            return columns * 64;
        case Format::bf16:
            return ceil_div(columns, 2) * 64;
        case Format::int8:
            return ceil_div(columns, kRun) * (2048 + 32);
        default:
            return ceil_div(columns, kRun) * kInt4RunBytes;
    }
}

// Where the parts of an int8 or int4 block begin.
struct BlockLayout {
    int64_t runs, scales, lines, line_bytes;  // d at 0; scales: int4 only; line_bytes: q of one run
    DELTAIC_INLINE BlockLayout(Format format, int64_t columns)
        : runs(ceil_div(columns, kRun)),
          scales(runs * 32),
          lines(format == Format::int4 ? runs * 96 : scales),
          line_bytes(format == Format::int4 ? 1024 : 2048) {}
};

// Rows that share one format. A `glu` segment of `rows` outputs holds 2 * ceil(rows / 16) blocks: gate, up, gate, up...
struct Segment {
    Format format = Format::f32;
    int64_t rows = 0;
    int64_t blocks = 0;
    const uint8_t* data = nullptr;
};

// A packed matrix [N, K], or `count` of them (experts) one after another inside each segment.
struct Weight {
    static constexpr int kMaxSegments = 8;
    int64_t count = 1, rows = 0, columns = 0;  // rows: sum over segments
    bool glu = false;
    bool float_activations = false;  // multiply with unrounded activations (slower)
    int segments = 0;
    Segment segment[kMaxSegments];

    DELTAIC_INLINE const uint8_t* block(int s, int64_t expert, int64_t index) const {
        const Segment& g = segment[s];
        return g.data + (expert * g.blocks + index) * block_bytes(g.format, columns);
    }
};

// Keys and values of one sequence for all attention layers, in blocks of a fixed number of tokens:
// block [layers][2 (K, V)][kv_heads][tokens][width]. A row of `width` elements holds head_dim numbers:
//   f32, u16 (bfloat16 bits)  width = head_dim
//   u8                        groups of 64 numbers, each a half d (2 bytes), then 64 bytes of value + 128; the number
//                             is d * value, value in -127..127. The last group may be shorter.
struct BlockTable {
    void* const* blocks = nullptr;
    int64_t size = 0;
    Dtype dtype = Dtype::f32;
    int64_t layers = 0, kv_heads = 0, tokens = 0, width = 0;

    // First element of the [tokens][width] matrix: which = 0 for K, 1 for V.
    DELTAIC_INLINE int64_t offset(int64_t layer, int64_t which, int64_t head) const {
        return ((layer * 2 + which) * kv_heads + head) * tokens * width;
    }
};

constexpr int64_t kKvGroup = 64;

// Elements of a row of `head_dim` numbers.
DELTAIC_INLINE int64_t kv_width(Dtype dtype, int64_t head_dim) {
    return dtype == Dtype::u8 ? head_dim + 2 * ceil_div(head_dim, kKvGroup) : head_dim;
}

struct Tables {
    const BlockTable* const* data = nullptr;
    int64_t size = 0;
    DELTAIC_INLINE const BlockTable& operator[](int64_t i) const { return *data[i]; }
};

}  // namespace deltaic
