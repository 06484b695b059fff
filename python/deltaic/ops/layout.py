"""How do things lie that several op sets share? The patches of a picture: one order for pixels, positions and angles. A
row of keys or values in a K/V block. The rows of several sequences."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
KV_GROUP = 64  # numbers of an int8 row that share a scale
KV_DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "bf16": np.uint16, "int8": np.uint8}


def kv_width(dtype: npt.DTypeLike, head_dim: int) -> int:
    """Elements of `dtype` that a row of `head_dim` numbers takes in a K/V block (see `reference.BlockTable`)."""
    return head_dim + 2 * -(-head_dim // KV_GROUP) if np.dtype(dtype) == np.uint8 else head_dim


def kv_head_dim(dtype: npt.DTypeLike, width: int) -> int:
    """The inverse of `kv_width`."""
    return width - 2 * -(-width // (KV_GROUP + 2)) if np.dtype(dtype) == np.uint8 else width


@lru_cache(256)
def row_bounds(*counts: int) -> Ints:
    """cu_seqlens of sequences of so many rows each, not to be written."""
    bounds = np.cumsum((0, *counts), dtype=np.int64)
    bounds.flags.writeable = False
    return bounds


@lru_cache(256)
def row_counts(*counts: int) -> Ints:
    """The same numbers as an array, not to be written."""
    array = np.array(counts, np.int64)
    array.flags.writeable = False
    return array


def merge_order(grid_h: int, grid_w: int, merge_size: int) -> tuple[Ints, Ints]:
    """Row and column of each patch [P] of a grid: merge blocks row-major, the patches inside each block likewise.

    grid_h and grid_w are multiples of merge_size, so that merge_size^2 consecutive rows become one image token.
    """
    m = merge_size
    index = np.arange(grid_h * grid_w, dtype=np.int64).reshape(grid_h // m, m, grid_w // m, m)
    index = index.transpose(0, 2, 1, 3).ravel()
    return index // grid_w, index % grid_w


def new_seen(vocabulary: int, prompt_ids: Ints) -> Ints:
    """What penalties need to know of a text of which `prompt_ids` have been read: int64 [65, R], R = ceil(V / 64).

    Row 0 has bit id % 64 of its word id / 64 set where an id is in prompt or output; the rows after it say, one after
    another for 64 R ids, how often each was generated (`reference.count_tokens`)."""
    words = -(-vocabulary // 64)
    seen = np.zeros((65, words), np.int64)
    if len(prompt_ids):
        held = np.zeros(64 * words, np.bool_)
        held[prompt_ids] = True
        seen[0] = np.packbits(held, bitorder="little").view(np.int64)
    return seen
