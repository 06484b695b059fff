"""Where arrays of a state lie: aligned, in slabs that are filled again and given back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from deltaic.ops import memory

BLOCK = (6, 2, 2, 128, 256)  # of the 0.8B model in bf16: 1.5 MiB, four of which fill three huge pages


@pytest.fixture(autouse=True)
def no_slabs():
    gc.collect()
    memory._slabs.clear()


def slabs() -> list[memory._Slab]:
    return [slab for some in memory._slabs.values() for slab in some]


@pytest.mark.parametrize("shape", [(0, 3), (), (5,), (18, 3, 128, 128), BLOCK, (17, 1 << 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_are_zero_aligned_and_writeable(shape, dtype):
    array = memory.zeros(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    assert array.ctypes.data % 64 == 0 or array.size == 0
    assert not array.any()
    array[...] = 1
    twin = memory.copy(array)
    assert twin.ctypes.data % 64 == 0 or array.size == 0
    np.testing.assert_array_equal(twin, array)
    assert not array.size or twin.ctypes.data != array.ctypes.data


def test_blocks_lie_side_by_side_in_huge_pages():
    blocks = [memory.zeros(BLOCK, np.uint16) for _ in range(8)]
    places = [block.ctypes.data for block in blocks]
    assert places[0] % (2 << 20) == 0
    assert np.diff(places[:4]).tolist() == [blocks[0].nbytes] * 3
    assert np.diff(places[4:]).tolist() == [blocks[0].nbytes] * 3


def test_memory_of_one_is_used_again_and_zeroed():
    first, second = (memory.zeros(BLOCK, np.uint16) for _ in range(2))
    first[...], second[...] = 7, 8
    place, view = first.ctypes.data, first[3]
    del first
    other = memory.zeros(BLOCK, np.uint16)
    other[...] = 9
    assert (view == 7).all()  # a view keeps it
    del view
    again = memory.zeros(BLOCK, np.uint16)
    assert again.ctypes.data == place
    assert not again.any()
    assert (second == 8).all()
    assert (other == 9).all()


def test_memory_goes_back_with_the_last_array():
    blocks = [memory.zeros(BLOCK, np.uint16) for _ in range(9)]  # two full slabs and one of a third
    del blocks[1], blocks[4]
    assert len(slabs()) >= 2
    blocks.append(memory.zeros(BLOCK, np.uint16))
    blocks.clear()
    assert slabs() == []


def test_no_memory(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="no memory for"):
        memory.zeros(BLOCK, np.uint16)
