// patch_embed (pixels to normalised patches; bilinear positions onto the projected ones) and vision_attention.
#include "cuda/attend.cuh"
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace deltaic {
namespace cuda {
namespace {

struct Grid {
    int64_t patch, merge, height, width;  // height and width in patches

    // Row and column of patch i: merge blocks row-major, the patches inside each block likewise.
    __device__ __forceinline__ void place(int64_t i, int64_t* row, int64_t* column) const {
        const int64_t inside = i % (merge * merge), block = i / (merge * merge), blocks = width / merge;
        *row = block / blocks * merge + inside / merge;
        *column = block % blocks * merge + inside % merge;
    }
};

struct Colour {
    float mean[3], std[3];
};

// y [P, 3*p*p], columns (channel, y, x): (u8 / 255 - mean) / std. Block = patch.
template <class T>
__global__ void patches_kernel(const uint8_t* image, Grid grid, Colour colour, T* y) {
    grid_begin();
    const int64_t i = blockIdx.x, p = grid.patch, K = 3 * p * p;
    int64_t row, column;
    grid.place(i, &row, &column);
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
        const int64_t channel = k / (p * p), py = k / p % p, px = k % p;
        const float u = static_cast<float>(image[((row * p + py) * grid.width * p + column * p + px) * 3 + channel]);
        const float mean = channel == 0 ? colour.mean[0] : channel == 1 ? colour.mean[1] : colour.mean[2];
        const float std = channel == 0 ? colour.std[0] : channel == 1 ? colour.std[1] : colour.std[2];
        y[i * K + k] = from_float<T>((u / 255.0f - mean) / std);
    }
}

// y += the position table [side*side, V], bilinear with aligned corners. Block = patch.
template <class T>
__global__ void add_positions_kernel(const float* table, int64_t side, Grid grid, T* y, int64_t V) {
    grid_begin();
    int64_t row, column;
    grid.place(blockIdx.x, &row, &column);
    const float span = static_cast<float>(side - 1);
    const float r = static_cast<float>(row) * span / static_cast<float>(grid.height > 1 ? grid.height - 1 : 1);
    const float c = static_cast<float>(column) * span / static_cast<float>(grid.width > 1 ? grid.width - 1 : 1);
    const int64_t r0 = static_cast<int64_t>(floorf(r)), c0 = static_cast<int64_t>(floorf(c));
    const int64_t r1 = r0 + 1 < side ? r0 + 1 : side - 1, c1 = c0 + 1 < side ? c0 + 1 : side - 1;
    const float fr = r - static_cast<float>(r0), fc = c - static_cast<float>(c0);
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
        const float top = (1 - fc) * table[(r0 * side + c0) * V + v] + fc * table[(r0 * side + c1) * V + v];
        const float bottom = (1 - fc) * table[(r1 * side + c0) * V + v] + fc * table[(r1 * side + c1) * V + v];
        T* out = y + static_cast<int64_t>(blockIdx.x) * V + v;
        *out = from_float<T>(to_float(*out) + (1 - fr) * top + fr * bottom);
    }
}

// qkv [P, 3*V] -> rotated q (scaled), rotated k, v, each [heads][P][d].
template <class T>
__global__ void rotate_kernel(const T* qkv, const float* cosine, const float* sine, T* out, int64_t P, int64_t heads,
                              int64_t d) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, V = heads * d;
    if (i >= P * V) return;
    const int64_t p = i / V, h = i % V / d, j = i % d, half = d / 2, other = j < half ? j + half : j - half;
    const float c = cosine[p * half + j % half], s = j < half ? -sine[p * half + j % half] : sine[p * half + j % half];
    const T* q = qkv + p * 3 * V + h * d;
    T* to = out + (h * P + p) * d + j;
    to[0] = from_float<T>((to_float(q[j]) * c + to_float(q[other]) * s) * rsqrtf(static_cast<float>(d)));
    to[P * V] = from_float<T>(to_float(q[V + j]) * c + to_float(q[V + other]) * s);
    to[2 * P * V] = q[2 * V + j];
}

template <class T>
struct SegmentRows {
    const T* keys;
    const T* values;
    int64_t d;
    __device__ __forceinline__ const T* key(int64_t i) const { return keys + i * d; }
    __device__ __forceinline__ const T* value(int64_t i) const { return values + i * d; }
};

// Block (64 rows, head, segment) of 4 warps.
template <int D>
__global__ void __launch_bounds__(128)
    attend_segment_kernel(const bf16* rotated, const int64_t* cu_seqlens, int64_t P, int64_t heads, Partial out) {
    grid_begin();
    const int64_t head = blockIdx.y, begin = cu_seqlens[blockIdx.z], end = cu_seqlens[blockIdx.z + 1];
    const int64_t first = begin + (static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarp) * 16;
    if (first >= end) return;
    const int count = static_cast<int>(end - first < 16 ? end - first : 16);
    const bf16* q = rotated + head * P * out.D;
    const SegmentRows<bf16> rows{q + (P * heads + begin) * out.D, q + (2 * P * heads + begin) * out.D, out.D};
    attend_tile<D>(
        rows, count, end - begin, 0, out, [&](int r) { return q + (first + r) * out.D; },
        [&](int) { return end - begin; }, [&](int r) { return (first + r) * heads + head; });
}

// Block (row, head): one warp.
template <class T>
__global__ void attend_segment_row_kernel(const T* rotated, const int64_t* cu_seqlens, int64_t segments, int64_t P,
                                          int64_t heads, Partial out) {
    grid_begin();
    const int64_t p = blockIdx.x, head = blockIdx.y;
    int64_t segment = 0;
    while (segment < segments && p >= cu_seqlens[segment + 1]) ++segment;
    const int64_t begin = cu_seqlens[segment], end = cu_seqlens[segment + 1];
    const T* q = rotated + head * P * out.D;
    const SegmentRows<T> rows{q + (P * heads + begin) * out.D, q + (2 * P * heads + begin) * out.D, out.D};
    attend_row(rows, q + p * out.D, end - begin, 0, out, p * heads + head);
}

template <class T>
__global__ void finish_kernel(Partial partial, T* y, int64_t count) {
    grid_begin();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float total = partial.stat(i / partial.D, 0)[1];
    y[i] = from_float<T>(total > 0 ? partial.sums[i] / total : 0.0f);
}

}  // namespace

void patches(const uint8_t* image, int64_t grid_h, int64_t grid_w, int64_t patch, int64_t merge, float mean0,
             float mean1, float mean2, float std0, float std1, float std2, void* y, int64_t type, Stream stream) {
    if (grid_h < 1 || grid_w < 1 || merge < 1 || grid_h % merge || grid_w % merge || patch < 1)
        fail("patches", "the grid is not made of merge blocks");
    with_type("patches", type, [&](auto element) {
        using T = decltype(element);
        launch("patches", patches_kernel<T>, dim3(static_cast<unsigned>(grid_h * grid_w)), 256, 0, stream, image,
               Grid{patch, merge, grid_h, grid_w}, Colour{{mean0, mean1, mean2}, {std0, std1, std2}},
               static_cast<T*>(y));
    });
}

void add_positions(const float* table, int64_t side, int64_t grid_h, int64_t grid_w, int64_t merge, void* y, int64_t V,
                   int64_t type, Stream stream) {
    if (grid_h < 1 || grid_w < 1 || merge < 1 || grid_h % merge || grid_w % merge || side < 1)
        fail("add_positions", "impossible grid or table");
    with_type("add_positions", type, [&](auto element) {
        using T = decltype(element);
        launch("add_positions", add_positions_kernel<T>, dim3(static_cast<unsigned>(grid_h * grid_w)), 256, 0, stream,
               table, side, Grid{0, merge, grid_h, grid_w}, static_cast<T*>(y), V);
    });
}

void vision_attention(const void* qkv, const float* cosine, const float* sine, const int64_t* cu_seqlens,
                      int64_t segments, int64_t longest, void* rotated, float* sums, float* stats, void* y, int64_t P,
                      int64_t heads, int64_t d, int64_t type, Stream stream) {
    if (heads < 1 || d < 2 || d > 256 || d % 2) fail("vision_attention", "expected heads of an even width up to 256");
    if (P == 0 || segments == 0) return;
    const Partial partial{sums, stats, 1, d};
    with_type("vision_attention", type, [&](auto element) {
        using T = decltype(element);
        const int64_t count = P * heads * d;
        launch("vision_attention rotate", rotate_kernel<T>, blocks_for(count, 256), 256, 0, stream,
               static_cast<const T*>(qkv), cosine, sine, static_cast<T*>(rotated), P, heads, d);
        bool done = false;
        if constexpr (std::is_same_v<T, bf16>) {
            done = d % 8 == 0;
            const auto kernel = d <= 64    ? attend_segment_kernel<64>
                                : d <= 128 ? attend_segment_kernel<128>
                                           : attend_segment_kernel<256>;
            if (done)
                launch("vision_attention attend", kernel,
                       dim3(blocks_for(longest, 64), static_cast<unsigned>(heads), static_cast<unsigned>(segments)),
                       128, 0, stream, static_cast<const bf16*>(rotated), cu_seqlens, P, heads, partial);
        }
        if (!done)
            launch("vision_attention attend_row", attend_segment_row_kernel<T>,
                   dim3(static_cast<unsigned>(P), static_cast<unsigned>(heads)), 32, 0, stream,
                   static_cast<const T*>(rotated), cu_seqlens, segments, P, heads, partial);
        launch("vision_attention finish", finish_kernel<T>, blocks_for(count, 256), 256, 0, stream, partial,
               static_cast<T*>(y), count);
    });
}

}  // namespace cuda
}  // namespace deltaic
