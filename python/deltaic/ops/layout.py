"""How do things lie that several op sets share? The patches of a picture: one order for pixels, positions and angles. A
row of keys or values in a K/V block. The rows of several sequences. Arrays that begin a cache line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
CACHE_LINE = 64  # bytes
KV_GROUP = 64  # numbers of an int8 row that share a scale
KV_DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "bf16": np.uint16, "int8": np.uint8}


def kv_width(dtype: npt.DTypeLike, head_dim: int) -> int:
    """Elements of `dtype` that a row of `head_dim` numbers takes in a K/V block (see `reference.BlockTable`)."""
    return head_dim + 2 * -(-head_dim // KV_GROUP) if np.dtype(dtype) == np.uint8 else head_dim


def kv_head_dim(dtype: npt.DTypeLike, width: int) -> int:
    """The inverse of `kv_width`."""
    return width - 2 * -(-width // (KV_GROUP + 2)) if np.dtype(dtype) == np.uint8 else width


def line_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array that begins a cache line, so that 16 float32 numbers are one line (numpy's own large
    arrays begin 16 bytes behind one)."""
    return _on_line(np.empty, shape, dtype)


def line_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The same, of zeros."""
    return _on_line(np.zeros, shape, dtype)


def line_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy, C-contiguous, that begins a cache line."""
    copy = line_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _on_line(make: Callable[..., Any], shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = make(size + CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    array: npt.NDArray[Any] = memory[first : first + size].view(dtype).reshape(shape)
    return array


@lru_cache(256)
def row_bounds(*counts: int) -> Ints:
    """cu_seqlens of sequences of so many rows each, not to be written."""
    bounds = np.cumsum((0, *counts), dtype=np.int64)
    bounds.flags.writeable = False
    return bounds


def merge_order(grid_h: int, grid_w: int, merge_size: int) -> tuple[Ints, Ints]:
    """Row and column of each patch [P] of a grid: merge blocks row-major, the patches inside each block likewise.

    grid_h and grid_w are multiples of merge_size, so that merge_size^2 consecutive rows become one image token.
    """
    m = merge_size
    index = np.arange(grid_h * grid_w, dtype=np.int64).reshape(grid_h // m, m, grid_w // m, m)
    index = index.transpose(0, 2, 1, 3).ravel()
    return index // grid_w, index % grid_w
