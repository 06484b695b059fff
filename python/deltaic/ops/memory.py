"""Where do the arrays of a state lie in the host's memory? At the start of a line of the cache, so that no vector of 64
bytes is read from two; and K/V blocks side by side in huge pages, without which a token of a long context looks up a
hundred thousand pages."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

_LINE = 64
_HUGE_PAGE = 2 << 20
_CELLS = 16  # arrays of one size that share a slab, at most
_SHARED = range(128 << 10, 16 << 20)  # bytes of arrays that lie in slabs: smaller ones are too many, larger ones few
_WASTE = 1 / 16  # of a slab: below that its arrays need not be more


class _Slab:
    """Some huge pages, cut into cells of one size. It lives as long as any of them is in use."""

    def __init__(self, cell: int) -> None:
        counts = range(1, _CELLS + 1)
        self.cells = next((n for n in counts if -n * cell % _HUGE_PAGE <= _WASTE * n * cell), _CELLS)
        size = -(-self.cells * cell // _HUGE_PAGE) * _HUGE_PAGE
        try:  # a page more, so that huge ones fit whatever the address; what is not written takes no memory
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.madvise(mmap.MADV_HUGEPAGE)
            else:
                memory = mmap.mmap(-1, size + _HUGE_PAGE)
        except (OSError, ValueError) as error:
            raise MemoryError(f"no memory for {size} bytes: {error}") from None
        self.memory = np.frombuffer(memory, np.uint8)
        self.address = -(-self.memory.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE
        self.free = [(i * cell, False) for i in reversed(range(self.cells))]  # (place, whether it was written before)


_slabs: dict[int, list[_Slab]] = {}  # by the size of a cell: those with free ones. What changes it is atomic


class _Cell:
    """Owns the memory of one array: free again when the last view of it is gone."""

    def __init__(self, size: int) -> None:
        self.size = size
        while True:
            slabs = _slabs.setdefault(size, [])
            try:
                self.slab = slabs[0]
                self.place, self.used = self.slab.free.pop()
                return
            except IndexError:  # none, or the first one is full
                if slabs and not slabs[0].free:
                    self._drop(slabs, slabs[0])
                else:
                    slabs.append(_Slab(size))

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.slab.address + self.place, False), "version": 3}

    def __del__(self, by_size: dict[int, list[_Slab]] = _slabs) -> None:  # the module may be gone at exit
        if not hasattr(self, "place"):
            return  # there was no memory
        self.slab.free.append((self.place, True))
        slabs = by_size.setdefault(self.size, [])
        if len(self.slab.free) == self.slab.cells:
            self._drop(slabs, self.slab)  # and the memory goes back with this cell
        elif self.slab not in slabs:
            slabs.append(self.slab)

    @staticmethod
    def _drop(slabs: list[_Slab], slab: _Slab) -> None:
        with suppress(ValueError):  # another thread was first
            slabs.remove(slab)


def _allocate(shape: Sequence[int], dtype: npt.DTypeLike, zero: bool) -> npt.NDArray[np.generic]:
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes in _SHARED:
        cell = _Cell(-(-nbytes // _LINE) * _LINE)
        data = np.asarray(cell)
        if zero and cell.used:
            data.fill(0)
        start = 0
    else:
        data = (np.zeros if zero else np.empty)(nbytes + _LINE, np.uint8)
        start = -data.ctypes.data % _LINE
    return data[start : start + nbytes].view(dtype).reshape(shape)


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """`np.zeros`, for what operators read again and again. Raises MemoryError."""
    return _allocate(shape, dtype, True)


def empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """`np.empty`, likewise."""
    return _allocate(shape, dtype, False)


def copy(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A C-contiguous, writeable copy, likewise."""
    result = _allocate(array.shape, array.dtype, False)
    result[...] = array
    return result
