"""How do mapped weights get into huge pages without anybody waiting for it? A thread moves them piece by piece, to the
same addresses, while they are used: a reader finds either the file's pages or a copy of them, so that nothing but the
time of a later read depends on how far it has come."""

from __future__ import annotations

import atexit
import mmap
import os
import threading
import weakref
from time import monotonic
from typing import Any

import numpy as np

_PIECE_BYTES = 4 << 20  # takes a millisecond or two
_LOOK_SECONDS = 0.002  # between two looks whether anything is computed
_WAIT_SECONDS = 0.05  # after so long a piece is moved although something is: a few percent of the time


class Settling:
    """Moves bytes [begin, end) of a mapped file into huge pages, as far as they are not in some already. Ends early if
    the system does not give memory or a thread, if the mapping is used no more, and when the process ends."""

    def __init__(self, mapping: mmap.mmap, file: int, begin: int, end: int, ops: Any):
        """file: its descriptor, of which a duplicate is kept meanwhile."""
        self._thread = threading.Thread(target=self._run, name="deltaic-settling", daemon=True)
        base = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
        page = ops.HUGE_PAGE
        # a neighbour's bytes on the first page come along
        self._begin = max(begin - (base + begin) % page, -base % page)
        self._end = end - (base + end) % page
        self._mapping = weakref.ref(mapping)
        self._ops = ops
        self._stop = threading.Event()
        self._file = os.dup(file)
        atexit.register(self.stop)
        try:
            self._thread.start()
        except RuntimeError:  # no thread to be had
            self._close()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is moved that can be, or for so many seconds; whether it is."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End after the piece at hand, and wait for that."""
        self._stop.set()
        self.join()

    def _run(self) -> None:
        try:
            for at in range(self._begin, self._end, _PIECE_BYTES):
                if not self._move(at, min(_PIECE_BYTES, self._end - at)):
                    break
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self._file)
        atexit.unregister(self.stop)

    def _move(self, at: int, nbytes: int) -> bool:
        """Whether it makes sense to go on."""
        mapping = self._mapping()
        if mapping is None:
            return False
        piece = np.frombuffer(mapping, np.uint8, nbytes, at)
        if self._ops.huge_bytes(piece) == nbytes:
            return not self._stop.is_set()
        del mapping, piece  # nobody has to keep the weights for the wait
        if not self._wait_for_gap() or (mapping := self._mapping()) is None:
            return False
        return bool(self._ops.move_to_huge_pages(np.frombuffer(mapping, np.uint8, nbytes, at), self._file, at))

    def _wait_for_gap(self) -> bool:
        """Until nothing is computed, or for long enough. False: stop."""
        deadline, seen = monotonic() + _WAIT_SECONDS, None
        while not self._stop.wait(_LOOK_SECONDS):
            now = self._ops.activity()
            if (now is not None and now == seen) or monotonic() > deadline:
                return True
            seen = now
        return False
