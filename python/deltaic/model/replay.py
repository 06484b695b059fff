"""How are a few rows decoded without Python in the way? The layers are the same calls for every token: they are
recorded once on a tape of the op set, and replayed on other rows and other states."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .text import Array, Batch, TextModel

MAX_ROWS = 32  # with more, the kernels take so long that the calls around them do not matter
MAX_TAPES = 16  # each holds the buffers of one layer or two


class Replay:
    """`TextModel.run_layers` for batches of few rows, one tape for each (rows, sequences, verified or not). The caller
    holds the op set's lock: a tape being made is not shared."""

    def __init__(self, text: TextModel, ops: Any):
        self._text, self._ops = text, ops
        self._tapes: OrderedDict[tuple[int, int, bool], tuple[Any, Array]] = OrderedDict()

    @staticmethod
    def serves(batch: Batch, rows: int) -> bool:
        """Whether a batch is one to replay: decoding, few rows."""
        return not batch.prefill and len(batch.states) <= rows <= MAX_ROWS

    def __call__(self, x: Array, batch: Batch) -> Array:
        """x [T, H] through all layers, as `run_layers`; the states change."""
        key = x.shape[0], len(batch.states), batch.trace is not None
        inputs = [x, batch.cos, batch.sin, batch.cu_seqlens, batch.starts]
        if batch.trace is not None:
            inputs.append(batch.trace)
        for state in batch.states:
            inputs += (state.conv, state.delta, state.kv)
        found = self._tapes.get(key)
        if found is None:
            return self._record(key, inputs, x, batch)
        self._tapes.move_to_end(key)
        tape, output = found
        y: Array = tape.replay(inputs, output)
        return y

    def _record(self, key: tuple[int, int, bool], inputs: list[Any], x: Array, batch: Batch) -> Array:
        tape = self._ops.Tape(inputs)
        with tape:
            output = self._text.run_layers(x, batch)
        self._tapes[key] = tape, output
        if len(self._tapes) > MAX_TAPES:
            self._tapes.popitem(last=False)
        return np.array(output)
