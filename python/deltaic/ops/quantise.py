"""What do the packed int8 and int4 formats mean? The definition in numpy: numbers -> codes -> numbers, and where each
code lies in the packed bytes (csrc/core/view.h). The compiled packer may search scales in another order; the format is
the same.

Both formats cut a row into runs of 128 columns (the last one padded with zeros). All scales are float16 and multiply
small integers, so that a run is one exact integer dot product.

  int8  w = d * value, value in -127..127; one d per run: 8.125 bits per weight
  int4  w = d * s * value, value in -8..7; s in 1..16 per group of 16 columns, one d per run: 4.375 bits per weight
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

ROWS = 16  # rows of a block
RUN = 128  # columns that share d
GROUP = 16  # columns that share s

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_SLAB_VALUES = 1 << 20  # numbers that are quantised at once: bounds the memory of the search


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix [N, K] in n = ceil(K / 128) runs."""

    columns: int
    values: npt.NDArray[np.int8]  # [N, n * 128]; zero beyond K
    scales: npt.NDArray[np.uint8]  # [N, n * 8]: s of each group; all one in int8
    d: npt.NDArray[np.float16]  # [N, n]

    def decode(self) -> Floats:
        """The numbers [N, K] that the codes stand for."""
        N, padded = self.values.shape
        products = self.values.reshape(N, -1, GROUP).astype(np.float32) * self.scales[:, :, None].astype(np.float32)
        numbers = products.reshape(N, -1, RUN) * self.d.astype(np.float32)[:, :, None]
        return np.ascontiguousarray(numbers.reshape(N, padded)[:, : self.columns])


def quantise(matrix: npt.NDArray, dtype: str) -> Codes:
    """Codes of a matrix [N, K] (any float type) in "int8" or "int4"."""
    N, K = matrix.shape
    runs = -(-K // RUN)
    search = {"int8": _search_int8, "int4": _search_int4}[dtype]
    codes = Codes(
        K,
        np.zeros((N, runs * RUN), np.int8),
        np.ones((N, runs * RUN // GROUP), np.uint8),
        np.zeros((N, runs), np.float16),
    )
    slab = max(1, _SLAB_VALUES // max(1, runs * RUN))
    for first in range(0, N, slab):
        rows = slice(first, min(first + slab, N))
        padded = np.zeros((rows.stop - first, runs * RUN), np.float32)
        padded[:, :K] = matrix[rows]
        values, scales, d = search(padded.reshape(-1, RUN))
        codes.values[rows] = values.reshape(padded.shape)
        codes.scales[rows] = scales.reshape(padded.shape[0], -1)
        codes.d[rows] = d.reshape(padded.shape[0], -1)
    return codes


def _search_int8(runs: Floats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, 128] -> values [R, 128], s [R, 8], d [R]: the largest number of a run becomes 127."""
    with np.errstate(over="ignore"):
        d = (np.abs(runs).max(axis=1) / np.float32(127)).astype(np.float16)
    values = np.clip(np.rint(runs * _inverse(d.astype(np.float32))[:, None]), -127, 127)
    return values.astype(np.int8), np.ones((len(runs), RUN // GROUP), np.uint8), d


def _search_int4(runs: Floats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, 128] -> values [R, 128], s [R, 8], d [R] with the least squared error among 10 values of d (both signs, since
    the values reach further below zero than above) and, for each, 6 values of s per group around the ideal one."""
    groups = runs.reshape(len(runs), -1, GROUP)
    amax = np.abs(groups).max(axis=2)  # [R, 8]
    best_error = np.full(len(runs), np.inf, np.float32)
    best_d = np.zeros(len(runs), np.float32)
    best_s = np.ones(amax.shape, np.float32)
    for trial in range(10):
        factor = np.float32((-1 if trial % 2 else 1) * (0.86 + 0.06 * (trial // 2)) / 128)
        with np.errstate(over="ignore"):
            d = (amax.max(axis=1) * factor).astype(np.float16).astype(np.float32)
        ideal = amax * np.float32(0.125) / np.maximum(np.abs(d), np.float32(1e-30))[:, None]
        least = np.full(amax.shape, np.inf, np.float32)
        chosen = np.ones(amax.shape, np.float32)
        for candidate in range(6):
            s = np.clip(np.rint(ideal * np.float32(0.80 + 0.075 * candidate)), 1, 16)
            step = (d[:, None] * s)[:, :, None]
            miss = groups - np.clip(np.rint(groups * _inverse(step)), -8, 7) * step
            error = np.einsum("rgk,rgk->rg", miss, miss)
            chosen, least = np.where(error < least, s, chosen), np.minimum(error, least)
        total = least.sum(axis=1)
        better = total < best_error
        best_error = np.where(better, total, best_error)
        best_d = np.where(better, d, best_d)
        best_s = np.where(better[:, None], chosen, best_s)
    step = (best_d[:, None] * best_s)[:, :, None]
    values = np.clip(np.rint(groups * _inverse(step)), -8, 7)
    return values.reshape(runs.shape).astype(np.int8), best_s.astype(np.uint8), best_d.astype(np.float16)


def _inverse(step: Floats) -> Floats:
    """1 / step, and 0 where step is 0 (a row of zeros)."""
    return np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)


# ---------------------------------------------------------------------------------------- where the codes lie in memory


def block_bytes(dtype: str, columns: int) -> int:
    """Bytes of one packed block of 16 rows."""
    runs = -(-columns // RUN)
    sizes = {"f32": columns * 64, "bf16": -(-columns // 2) * 64, "int8": runs * 2080, "int4": runs * 1120}
    if dtype not in sizes:
        raise ArgumentError(f"unknown weight format {dtype!r}, expected one of {', '.join(sizes)}")
    return sizes[dtype]


def unpack(packed: Bytes, dtype: str, count: int, rows: int, columns: int, *, glu: bool = False) -> Floats:
    """Packed bytes -> the numbers [count, rows, columns] that they stand for; rows are a part's rows.

    With `glu` each matrix has 2 * `rows` rows, gate then up, whose blocks of 16 rows alternate in the bytes.
    Raises ArgumentError if the number of bytes does not fit.
    """
    blocks = -(-rows // ROWS) * (2 if glu else 1)
    size = block_bytes(dtype, columns)
    if packed.shape != (count * blocks * size,):
        raise ArgumentError(f"unpack: {packed.shape} bytes, expected {count * blocks * size}")
    decode = {"f32": _read_f32, "bf16": _read_bf16, "int8": _read_int8, "int4": _read_int4}[dtype]
    numbers = decode(packed.reshape(count * blocks, size), columns).reshape(count, blocks, ROWS, columns)
    if not glu:
        return np.ascontiguousarray(numbers.reshape(count, -1, columns)[:, :rows])
    halves = [numbers[:, i::2].reshape(count, -1, columns)[:, :rows] for i in (0, 1)]
    return np.concatenate(halves, axis=1)


def _read_f32(blocks: Bytes, columns: int) -> Floats:
    """[B][K][16] float -> [B, 16, K]."""
    return blocks.view(np.float32).reshape(-1, columns, ROWS).transpose(0, 2, 1)


def _read_bf16(blocks: Bytes, columns: int) -> Floats:
    """[B][K/2][16][2] bfloat16: neighbouring columns of a row are neighbours -> [B, 16, K]."""
    numbers = (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32
    pairs = numbers.reshape(len(blocks), -1, ROWS, 2)
    return pairs.transpose(0, 2, 1, 3).reshape(len(blocks), ROWS, -1)[:, :, :columns]


def _read_int8(blocks: Bytes, columns: int) -> Floats:
    """d [n][16], then q [n][32][16][4] (value + 128) -> [B, 16, K]."""
    B, runs = len(blocks), -(-columns // RUN)
    q = blocks[:, runs * 32 :].reshape(B, runs * 32, ROWS, 4).transpose(0, 2, 1, 3).reshape(B, ROWS, runs, RUN)
    d = np.ascontiguousarray(blocks[:, : runs * 32]).view(np.float16).reshape(B, runs, ROWS).transpose(0, 2, 1)
    numbers = (q.astype(np.float32) - 128) * d.astype(np.float32)[..., None]
    return numbers.reshape(B, ROWS, -1)[:, :, :columns]


def _read_int4(blocks: Bytes, columns: int) -> Floats:
    """d [n][16], s [n][4][16] (s - 1 of two groups, the first in the low nibble), q [n][8][2][16][4] (low nibble: four
    columns, high nibble: the next four; value + 8) -> [B, 16, K]."""
    B, runs = len(blocks), -(-columns // RUN)
    q = blocks[:, runs * 96 :].reshape(B, runs, 8, 2, ROWS, 4)
    q = np.stack([q & 15, q >> 4], axis=4)  # [B, n, group, line, nibble, row, 4]
    q = q.transpose(0, 5, 1, 2, 3, 4, 6).reshape(B, ROWS, runs, 8, GROUP)
    s = blocks[:, runs * 32 : runs * 96].reshape(B, runs, 4, ROWS)
    s = np.stack([s & 15, s >> 4], axis=3).transpose(0, 4, 1, 2, 3).reshape(B, ROWS, runs, 8)
    d = np.ascontiguousarray(blocks[:, : runs * 32]).view(np.float16).reshape(B, runs, ROWS).transpose(0, 2, 1)
    integers = (q.astype(np.float32) - 8) * (s.astype(np.float32) + 1)[..., None]
    return (integers * d.astype(np.float32)[..., None, None]).reshape(B, ROWS, -1)[:, :, :columns]


# ------------------------------------------------------------------------------------------------------------- checksum

CHECKSUM_LINES = 1024  # lines of 64 bytes in one chunk
CHECKSUM_BYTES = 64 * CHECKSUM_LINES
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def checksum(data: Bytes, first: int = 0) -> int:
    """A 64-bit sum of bytes [n] (n a multiple of 64) that sees any flipped bit and any moved or zeroed line.

    The bytes are lines of eight little-endian 64-bit words; a chunk is 1024 lines, the last one may be shorter. In each
    chunk a[i] = sum of word i of its lines, b[i] = sum of a[i] after each line (as Fletcher's checksum). All 16 sums,
    and the chunk's number, are mixed by splitmix64; the checksum is the sum over the chunks. All modulo 2^64.

    first: number of the first chunk. Checksums of pieces of whole chunks, each told where it begins, add up (modulo
    2^64) to that of the whole.
    """
    if data.ndim != 1 or data.dtype != np.uint8 or data.size % 64:
        raise ArgumentError(f"checksum: data is {data.dtype}{data.shape}, expected uint8 [n], n a multiple of 64")
    words = data.view("<u8").reshape(-1, 8)
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for number, line in enumerate(range(0, len(words), CHECKSUM_LINES), first):
            chunk = words[line : line + CHECKSUM_LINES]
            weights = np.arange(len(chunk), 0, -1, dtype=np.uint64)
            state = np.uint64(number)
            sums = np.stack([chunk.sum(axis=0), (chunk * weights[:, None]).sum(axis=0)])
            for value in sums.ravel():
                state = _mix(state ^ value)
            total += state
    return int(total)


def _mix(x: np.uint64) -> np.uint64:
    x += _MIX[0]
    x = (x ^ (x >> np.uint64(30))) * _MIX[1]
    x = (x ^ (x >> np.uint64(27))) * _MIX[2]
    return x ^ (x >> np.uint64(31))
