// Rows of a plain matrix -> blocks of 16 rows (layouts: core/view.h).
#include "core/error.h"
#include "core/pool.h"
#include "cpu/simd.h"

namespace deltaic {
namespace DELTAIC_ISA {

namespace {

// Element (row, column) of a float or bfloat16 matrix; rows past the end read as zero.
struct Source {
    View view;
    DELTAIC_INLINE float at(int64_t n, int64_t k) const {
        if (n >= view.shape[0]) return 0.0f;
        const int64_t i = n * view.shape[1] + k;
        return view.dtype == Dtype::f32 ? view.f32()[i] : bf16_to_float(view.u16()[i]);
    }
};

void pack_f32(const Source& source, int64_t n0, float* out) {
    const int64_t K = source.view.shape[1];
    for (int64_t k = 0; k < K; ++k)
        for (int r = 0; r < 16; ++r) out[k * 16 + r] = source.at(n0 + r, k);
}

void pack_bf16(const Source& source, int64_t n0, uint16_t* out) {
    const int64_t K = source.view.shape[1];
    for (int64_t k = 0; k < K; k += 2)
        for (int r = 0; r < 16; ++r) {
            out[k * 16 + 2 * r] = float_to_bf16(source.at(n0 + r, k));
            out[k * 16 + 2 * r + 1] = k + 1 < K ? float_to_bf16(source.at(n0 + r, k + 1)) : uint16_t{0};
        }
}

}  // namespace

// Block b of `source` becomes block first + b * step of `packed`.
void pack(View source, int64_t format, int64_t first, int64_t step, View packed) {
    if (format != static_cast<int64_t>(Format::f32) && format != static_cast<int64_t>(Format::bf16)) fail("pack", "unknown format");
    const int64_t blocks = ceil_div(source.shape[0], kBlockRows);
    const int64_t bytes = block_bytes(static_cast<Format>(format), source.shape[1]);
    if (first < 0 || step < 1 || (blocks > 0 && (first + (blocks - 1) * step + 1) * bytes > packed.shape[0]))
        fail("pack", "the packed array is too small for these blocks");
    const Source rows{source};
    parallel_for(blocks, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            uint8_t* out = packed.u8() + (first + b * step) * bytes;
            if (format == static_cast<int64_t>(Format::f32)) {
                pack_f32(rows, b * 16, reinterpret_cast<float*>(out));
            } else {
                pack_bf16(rows, b * 16, reinterpret_cast<uint16_t*>(out));
            }
        }
    });
}

}  // namespace DELTAIC_ISA
}  // namespace deltaic
