"""How are a few rows decoded without Python in the way? The operators are the same for every token: they are recorded
once on a tape of the op set (on the GPU: a captured graph), and replayed on other rows and other states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy.typing as npt

Arrays = tuple[npt.NDArray[Any], ...]
MAX_TAPES = 128  # each holds the buffers of one layer or two; drafts have a shape for each depth and number of rows


class Replay:
    """Functions of arrays and block tables that make the same operator calls every time, one tape for each shape of
    their inputs. The caller holds the op set's lock: a tape being made is not shared.

    On an op set without tapes, or with more than its TAPE_ROWS rows, it is the function itself."""

    def __init__(self, ops: Any):
        self._tape: Any = getattr(ops, "Tape", None)
        self._most = getattr(ops, "TAPE_ROWS", 0)
        self._shape: Callable[[list[Any]], Hashable] | None = getattr(self._tape, "shape", None)
        self._tapes: OrderedDict[Hashable, Any] = OrderedDict()
        self.recordings = 0  # how many tapes have been made: a call that makes one takes several times as long

    def __call__(self, key: Hashable, rows: int, inputs: list[Any], run: Callable[..., Arrays]) -> Arrays:
        """What run(*inputs) returns, which calls operators of its arguments and of what never changes.

        inputs: numpy arrays of this call alone, which may be written; rows of the op set; lists of what belongs to
        sequences (arrays of states, block tables, a trace); None. What `run` gets instead of a list may be shorter: one
        item that stands for all. Integers that it returns lie in an input. key: of the function and of all shapes."""
        if rows > self._most:
            return run(*inputs)
        if self._shape is not None:
            key = key, self._shape(inputs)
        tape = self._tapes.get(key)
        if tape is None:
            return self._record(key, inputs, run)
        self._tapes.move_to_end(key)
        replayed: Arrays = tape.replay(inputs)
        return replayed

    def _record(self, key: Hashable, inputs: list[Any], run: Callable[..., Arrays]) -> Arrays:
        self.recordings += 1
        tape = self._tape()
        recorded: Arrays = tape.record(inputs, run)
        self._tapes[key] = tape
        if len(self._tapes) > MAX_TAPES:
            self._tapes.popitem(last=False)
        return recorded
