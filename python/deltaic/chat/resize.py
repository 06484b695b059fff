"""How is a picture resized exactly as in training? Antialiased bicubic on uint8, bit for bit as torch's CPU kernel does
it.

torch (and Pillow, with other constants) resamples one axis after the other in fixed point: horizontal first, rounded
and clamped to uint8, then vertical. Each output sample is a sum of a few integer weights times uint8 samples. All those
integers are small, so the sums are exact in floating point in any order, and a block of output samples is one small
dense matrix product: BLAS does the work, and the result does not depend on which BLAS it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CUBIC_A = -0.5  # Keys' cubic convolution coefficient used by antialiased resampling in torch and Pillow
MAX_PRECISION = 22  # fixed-point bits at most: 32 - 8 (a sample) - 2 (overshoot)
BLOCK = 16  # output samples per matrix product: small, because a block's matrix is mostly zeros
ROWS = 64  # picture rows per horizontal pass, so that the float copy stays in cache


@dataclass(frozen=True)
class AxisTaps:
    """Fixed-point filter of one axis: output i = clamp((2^(precision-1) + sum_j weights[i, j] * input[first[i] + j]) >>
    precision).

    first int64 [out], count int64 [out] (taps in use), weights int64 [out, max taps] (zero beyond count), precision in
    bits.
    """

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    weights: NDArray[np.int64]
    precision: int

    @property
    def float_type(self) -> type[np.floating]:
        """The narrowest float type in which every partial sum, and the rounding term, is an exact integer."""
        largest = 255 * int(np.abs(self.weights).sum(axis=1).max()) + (1 << self.precision >> 1)
        return np.float32 if largest < 1 << 24 else np.float64

    def matrix(self, start: int, stop: int) -> tuple[int, NDArray[np.floating]]:
        """Dense weights [stop - start, K] of outputs start..stop over the inputs k0..k0+K, divided by 2^precision
        (exact), and k0."""
        first, count = self.first[start:stop], self.count[start:stop]
        k0 = int(first[0])
        dense = np.zeros((stop - start, int((first + count).max()) - k0), self.float_type)
        for row in range(stop - start):
            offset, taps = int(first[row]) - k0, int(count[row])
            dense[row, offset : offset + taps] = self.weights[start + row, :taps]
        return k0, dense * dense.dtype.type(2.0**-self.precision)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic kernel with a = -0.5. The order of operations is torch's: the last bit matters where a weight is
    rounded."""
    a = CUBIC_A
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def axis_taps(size_in: int, size_out: int) -> AxisTaps:
    """Taps for resampling `size_in` samples to `size_out`, both positive. Computed in float64, as torch does for
    uint8."""
    scale = size_in / size_out
    support = 2.0 * scale if scale >= 1 else 2.0
    inverse = 1.0 / scale if scale >= 1 else 1.0
    centre = scale * (np.arange(size_out) + 0.5)
    first = np.maximum(np.trunc(centre - support + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(centre + support + 0.5).astype(np.int64), size_in)
    count = np.clip(last - first, 0, math.ceil(support) * 2 + 1)
    taps = np.arange(int(count.max()))
    weights = _cubic(((taps + first[:, None]) - centre[:, None] + 0.5) * inverse)
    weights[taps >= count[:, None]] = 0.0
    total = np.zeros(size_out)
    for tap in taps:  # in this order, not numpy's pairwise order
        total += weights[:, tap]
    weights /= np.where(total != 0, total, 1.0)[:, None]

    precision, largest = 0, float(weights.max())
    while precision < MAX_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    return AxisTaps(first, count, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64), precision)


def _round_into(out: NDArray[np.uint8], sums: NDArray[np.floating]) -> None:
    sums += 0.5
    np.clip(sums, 0, 255, out=sums)
    np.copyto(out, sums, casting="unsafe")  # truncates, which is floor here


def _resize_width(image: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    height, width_in, channels = image.shape
    taps = axis_taps(width_in, width)
    blocks = []
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        k0, dense = taps.matrix(start, stop)
        # each channel has the same weights: kron keeps the samples interleaved
        mixed = np.kron(dense.T, np.eye(channels, dtype=dense.dtype))
        blocks.append((start * channels, stop * channels, k0 * channels, k0 * channels + mixed.shape[0], mixed))
    out = np.empty((height, width * channels), np.uint8)
    samples = image.reshape(height, width_in * channels)
    sums = np.empty((min(ROWS, height), width * channels), taps.float_type)
    for top in range(0, height, ROWS):
        rows = samples[top : top + ROWS].astype(taps.float_type)
        part = sums[: len(rows)]
        for start, stop, k0, k1, mixed in blocks:
            np.matmul(rows[:, k0:k1], mixed, out=part[:, start:stop])
        _round_into(out[top : top + ROWS], part)
    return out.reshape(height, width, channels)


def _resize_height(image: NDArray[np.uint8], height: int) -> NDArray[np.uint8]:
    height_in, width, channels = image.shape
    taps = axis_taps(height_in, height)
    out = np.empty((height, width * channels), np.uint8)
    samples = image.reshape(height_in, width * channels)
    for start in range(0, height, BLOCK):
        stop = min(start + BLOCK, height)
        k0, dense = taps.matrix(start, stop)
        _round_into(out[start:stop], dense @ samples[k0 : k0 + dense.shape[1]].astype(taps.float_type))
    return out.reshape(height, width, channels)


def resize_bicubic(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize `image` uint8 [h, w, c] to [height, width, c], equal to torch's `interpolate(mode="bicubic",
    antialias=True)` on uint8 (the default image processors' kernel). An axis whose size stays is skipped."""
    image = np.ascontiguousarray(image)
    if width != image.shape[1]:
        image = _resize_width(image, width)
    if height != image.shape[0]:
        image = _resize_height(image, height)
    return image
