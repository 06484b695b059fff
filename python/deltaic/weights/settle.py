"""How do mapped weights get into huge pages without the first token waiting for it? Piece by piece between further
steps, to the same addresses. A reader finds either the file's pages or a copy of them: nothing but the time that
reading takes depends on how far it has come."""

from __future__ import annotations

import mmap
import os
import weakref
from time import perf_counter
from typing import Any

import numpy as np

_PIECE_BYTES = 4 << 20  # takes a millisecond, or several where a virtual machine has to get the memory first
_SHARE = 1 / 25  # of the time that goes by


class Settling:
    """Moves bytes [begin, end) of a mapped file into huge pages, as far as they are not in some already."""

    def __init__(self, mapping: mmap.mmap, file: int, begin: int, end: int, ops: Any):
        """file: its descriptor, of which a duplicate is kept until the end."""
        self._bytes = np.frombuffer(mapping, np.uint8)
        base, page = self._bytes.__array_interface__["data"][0], ops.HUGE_PAGE
        # a neighbour's bytes on the first page come along
        self._at = max(begin - (base + begin) % page, -base % page)
        self._end = end - (base + end) % page
        self._ops = ops
        self._next = 0.0  # when the next piece may move
        self._file = os.dup(file)
        self._close = weakref.finalize(self, os.close, self._file)

    def step(self) -> bool:
        """Move the next piece if that keeps to the share of the time; whether there are more. There are none either
        when the system gives no memory."""
        start = perf_counter()
        if start < self._next:
            return True
        while self._at < self._end:
            piece = self._bytes[self._at : min(self._at + _PIECE_BYTES, self._end)]
            at, self._at = self._at, self._at + len(piece)
            if self._ops.huge_bytes(piece) == len(piece):
                continue
            if not self._ops.move_to_huge_pages(piece, self._file, at):
                self._at = self._end
            break
        if self._at < self._end:
            end = perf_counter()
            self._next = end + (end - start) * (1 / _SHARE - 1)
            return True
        self._close()
        return False
