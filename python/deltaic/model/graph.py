"""How are a few rows decoded without the host in the way? Embedding and all layers are captured once per shape of a
step; everything that changes from step to step (tokens, positions, where the states lie) is in device memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .choice import Choosing
from .state import State
from .text import Batch, TextModel, advance, begin_writing

MAX_GRAPHS = 32
FEWEST_BLOCKS = 16  # room for K/V blocks of each sequence, doubled as needed


class _Layers:
    """Stands for `state.conv` or `state.delta`: item i tells where layer i of the current states lies."""

    def __init__(self, pointers: Any, addresses: Any, size: int):
        self._pointers, self._addresses, self._size = pointers, addresses, size

    def __getitem__(self, layer: int) -> Any:
        return self._pointers(self._addresses, layer * self._size)


class _Slot:
    """Stands for the states of all sequences inside the graph."""

    def __init__(self, conv: _Layers, delta: _Layers, kv: Any):
        self.conv, self.delta, self.kv = conv, delta, kv


class DecodeGraph:
    """Steps of B sequences with as many rows each, captured on first use; a graph serves every state of its shape.

    `ops` is deltaic.ops.cuda.
    """

    def __init__(self, text: TextModel, ops: Any):
        self._text, self._ops = text, ops
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool: Any = None  # memory that all graphs share: they run one after another

    def step(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[State],
        trace: Any = None,
        *,
        head: bool = False,
        choosing: Choosing | None = None,
    ) -> tuple[Any, Any, list[int] | None]:
        """`TextModel.step`, as a graph where there are few rows and as many of each sequence; tokens are then not
        chosen. On the device."""
        lengths = {len(ids) for ids in tokens}
        if len(lengths) != 1 or not 0 < sum(len(ids) for ids in tokens) <= self._ops.FEW:
            return self._text.step(tokens, states, trace, head=head, choosing=choosing)
        captured = self._captured(tokens, states, traced=trace is not None)
        if trace is None:
            begin_writing(states)
        hidden = captured.run(tokens, states)
        if trace is None:
            advance(states, [len(ids) for ids in tokens])
        else:
            trace.copy_(captured.trace)
        return hidden, self._text.logits(hidden) if head else None, None

    def _captured(self, tokens: Sequence[Sequence[int]], states: Sequence[State], *, traced: bool) -> _Captured:
        """The graph for a step, with room for it made in the states."""
        rows, room = len(tokens[0]), FEWEST_BLOCKS
        for state in states:
            state.check_intact("step")
            state.reserve(state.length + rows)
            while room < len(state.kv):
                room *= 2
        first = states[0]
        block = first.kv.blocks[0]
        key = (len(states), rows, traced, room, tuple(first.conv.shape), tuple(first.delta.shape), tuple(block.shape),
               block.dtype)  # fmt: skip
        captured = self._graphs.get(key)
        if captured is None:
            captured = _Captured(self._text, self._ops, len(states), rows, traced, room, first)
            self._pool = captured.capture(self._pool, first.kv_dtype)
            self._graphs[key] = captured
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return captured


class _Captured:
    """The buffers that a graph reads and writes, and the graph."""

    def __init__(self, text: TextModel, ops: Any, sequences: int, rows: int, traced: bool, room: int, like: State):
        import torch

        self._text, self._ops = text, ops
        self._rows, self._room, T = rows, room, sequences * rows
        dev = ops.device()
        # tokens, three positions of each, starts, lengths, addresses of conv and delta, then the block tables
        sizes = (T, 3 * T, sequences, sequences + 1, sequences, sequences, sequences * room)
        self._host = np.zeros(sum(sizes), np.int64)
        self._inputs = dev.empty([sum(sizes)], torch.int64).zero_()
        cuts = np.cumsum(sizes)[:-1].tolist()
        self._parts = np.split(self._host, cuts)
        device_parts = [self._inputs[a:b] for a, b in zip([0, *cuts], [*cuts, sum(sizes)], strict=True)]
        self._tokens, positions, self._starts, self._cu_seqlens, conv, delta, table = device_parts
        self._positions = positions.reshape(T, 3)
        self._parts[3][:] = np.arange(sequences + 1) * rows
        block = like.kv.blocks[0]
        self._slot = _Slot(
            _Layers(ops.Pointers, conv, int(np.prod(like.conv.shape[1:]))),
            _Layers(ops.Pointers, delta, int(np.prod(like.delta.shape[1:]))),
            ops.TableBatch(table.reshape(sequences, room), tuple(block.shape), block.dtype, [room] * sequences),
        )
        c = text.config
        self.trace = dev.empty([c.num_delta_layers, T, c.delta_trace_width], torch.float32) if traced else None
        self._frequencies, self._axes = ops.upload(text.rope.inverse_frequencies), ops.upload(text.rope.axes)
        self._hidden: Any = None
        self._graph: Any = None

    def capture(self, pool: Any, kv_dtype: str) -> Any:
        """Make the graph, in a pool of memory; returns the pool."""
        scratch = [State(self._text.config, self._ops, kv_dtype) for _ in self._parts[2]]  # states that nobody needs
        for state in scratch:
            state.reserve(self._rows)
        self._fill([[0] * self._rows] * len(scratch), scratch)
        self._graph, self._hidden = self._ops.device().capture(self._forward, pool)
        return self._graph.pool()

    def _forward(self) -> Any:
        text, ops = self._text, self._ops
        x = ops.embed(self._tokens, text.weights.embed)
        cos, sin = ops.rope_table(self._positions, self._frequencies, self._axes, text.rope.scale)
        counts = [self._rows] * len(self._parts[2])
        batch = Batch([self._slot], self._cu_seqlens, counts, self._starts, cos, sin, False, self.trace)  # type: ignore[list-item]
        return text.run_layers(x, batch)

    def _fill(self, tokens: Sequence[Sequence[int]], states: Sequence[State]) -> None:
        ids, positions, starts, _, conv, delta, table = self._parts
        ids[:] = np.concatenate([np.asarray(t, np.int64) for t in tokens])
        tables = table.reshape(len(states), self._room)
        tables[:] = 0
        for b, state in enumerate(states):
            first = state.length + state.rope_delta
            rows = np.arange(first, first + self._rows)
            positions.reshape(-1, self._rows, 3)[b] = rows[:, None]
            starts[b] = state.length
            conv[b], delta[b] = state.conv.data_ptr(), state.delta.data_ptr()  # type: ignore[attr-defined]
            tables[b, : len(state.kv)] = state.kv.addresses
        self._ops.copy_from_host(self._inputs, self._host)

    def run(self, tokens: Sequence[Sequence[int]], states: Sequence[State]) -> Any:
        self._fill(tokens, states)
        self._graph.replay()
        return self._ops.copy(self._hidden)  # the graph writes it anew in every step
