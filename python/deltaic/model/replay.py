"""How are a few rows decoded without Python in the way? The layers are the same calls for every token: they are
recorded once on a tape of the op set, and replayed on other rows and other states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy.typing as npt

A = TypeVar("A", bound=npt.NDArray[Any])
MAX_ROWS = 32  # with more, the kernels take so long that the calls around them do not matter
MAX_TAPES = 64  # each holds the buffers of one layer or two; drafts have a shape for each depth and number of rows


class Replay:
    """A function of arrays and block tables that makes the same operator calls every time, one tape for each shape of
    its inputs. The caller holds the op set's lock: a tape being made is not shared."""

    def __init__(self, ops: Any):
        self._ops = ops
        self._tapes: OrderedDict[Hashable, tuple[Any, npt.NDArray[Any]]] = OrderedDict()

    def __call__(self, key: Hashable, inputs: list[Any], run: Callable[[], A]) -> A:
        """What `run` returns, which calls operators of `inputs` and of what never changes. key: of their shapes."""
        found = self._tapes.get(key)
        if found is None:
            return self._record(key, inputs, run)
        self._tapes.move_to_end(key)
        tape, output = found
        y: A = tape.replay(inputs, output)
        return y

    def _record(self, key: Hashable, inputs: list[Any], run: Callable[[], A]) -> A:
        tape = self._ops.Tape(inputs)
        with tape:
            output = run()
        self._tapes[key] = tape, output
        if len(self._tapes) > MAX_TAPES:
            self._tapes.popitem(last=False)
        return output.copy()  # type: ignore[no-any-return]
