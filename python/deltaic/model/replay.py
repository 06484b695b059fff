"""How are a few rows decoded without Python in the way? The layers are the same calls for every token: they are
recorded once on a tape of the op set, and replayed on other rows and other states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy.typing as npt

Arrays = tuple[npt.NDArray[Any], ...]
MAX_ROWS = 32  # with more, the kernels take so long that the calls around them do not matter
MAX_TAPES = 64  # each holds the buffers of one layer or two; drafts have a shape for each depth and number of rows


class Replay:
    """A function of arrays and block tables that makes the same operator calls every time, one tape for each shape of
    its inputs. The caller holds the op set's lock: a tape being made is not shared.

    On an op set without tapes it is the function itself."""

    def __init__(self, ops: Any):
        self._tape: Any = getattr(ops, "Tape", None)
        self._tapes: OrderedDict[Hashable, tuple[Any, Arrays]] = OrderedDict()
        self.recordings = 0  # how many tapes have been made: a call that makes one takes several times as long

    def __call__(self, key: Hashable, rows: int, inputs: list[Any], run: Callable[[], Arrays]) -> Arrays:
        """What `run` returns, which calls operators of `inputs` and of what never changes. key: of their shapes, with
        the number of rows."""
        if self._tape is None or rows > MAX_ROWS:
            return run()
        found = self._tapes.get(key)
        if found is None:
            return self._record(key, inputs, run)
        self._tapes.move_to_end(key)
        tape, outputs = found
        replayed: Arrays = tape.replay(inputs, outputs)
        return replayed

    def _record(self, key: Hashable, inputs: list[Any], run: Callable[[], Arrays]) -> Arrays:
        self.recordings += 1
        tape = self._tape(inputs)
        with tape:
            outputs = run()
        self._tapes[key] = tape, outputs
        if len(self._tapes) > MAX_TAPES:
            self._tapes.popitem(last=False)
        return tuple(output.copy() for output in outputs)
