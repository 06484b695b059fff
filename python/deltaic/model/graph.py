"""How is a token decoded without the host in the way? One captured graph runs embedding and all layers;
everything that changes from token to token (the token, its positions, where the state lies) is in device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import StateError
from .state import BLOCK_TOKENS, State
from .text import Batch, TextModel


class _Layers:
    """Stands for `state.conv` or `state.delta`: item i tells where layer i of whatever state is current lies."""

    def __init__(self, pointers: Any, address: Any, size: int):
        self._pointers, self._address, self._size = pointers, address, size

    def __getitem__(self, layer: int) -> Any:
        return self._pointers(self._address, layer * self._size)


class _Slot:
    """Stands for a State inside the graph."""

    def __init__(self, conv: _Layers, delta: _Layers, kv: Any):
        self.conv, self.delta, self.kv = conv, delta, kv


class DecodeGraph:
    """One token of one sequence as a graph, captured on first use; it serves every state of the same shape.

    `ops` is deltaic.ops.cuda. On a device that cannot capture (the tests' emulator) the same calls run one by one.
    """

    def __init__(self, text: TextModel, ops: Any):
        self._text, self._ops = text, ops
        self._graphs: dict[Any, _Captured] = {}

    def step(self, token: int, state: State) -> Any:
        """Feed one token to `state`; its hidden row [1, H] before the final norm, on the device.

        Raises ContextLengthError or StateError as `TextModel.forward` does."""
        if not state.intact:
            raise StateError("step: the state was left half-written by an interrupted call; start a new one")
        state.reserve(state.length + 1)
        shape = (
            tuple(state.conv.shape),
            tuple(state.delta.shape),
            tuple(state.kv.blocks[0].shape),
            state.kv.blocks[0].dtype,
        )
        captured = self._graphs.get(shape)
        if captured is None:
            captured = self._graphs[shape] = _Captured(self._text, self._ops, state)
        state.intact = False
        hidden = captured.run(token, state)
        state.token_ids.append(token)
        state.length += 1
        state.intact = True
        return hidden


class _Captured:
    """The buffers that the graph reads and writes, and the graph."""

    def __init__(self, text: TextModel, ops: Any, state: State):
        import torch

        self._text, self._ops = text, ops
        dev = ops.device()
        blocks = -(-text.config.max_position_embeddings // BLOCK_TOKENS)
        # token, three positions, start, lengths (0, 1), addresses of conv and delta, then the block table
        self._inputs = dev.empty([16 + blocks], torch.int64).zero_()
        self._host = np.zeros(16 + blocks, np.int64)
        self._host[5:7] = 0, 1
        part = self._inputs
        conv = _Layers(ops.Pointers, part[7:8], int(np.prod(state.conv.shape[1:])))
        delta = _Layers(ops.Pointers, part[8:9], int(np.prod(state.delta.shape[1:])))
        first = state.kv.blocks[0]
        table = ops.TableBatch(part[16:].reshape(1, blocks), tuple(first.shape), first.dtype, [blocks])
        self._slot = _Slot(conv, delta, table)
        self._frequencies, self._axes = ops.upload(text.rope.inverse_frequencies), ops.upload(text.rope.axes)
        self._hidden: Any = None
        self._graph: Any = None
        if not dev.module.emulated:
            self._capture(text, ops, state)

    def _capture(self, text: TextModel, ops: Any, like: State) -> None:
        import torch

        # A run outside of the graph loads every kernel and fills torch's pools; it works on a state of its own.
        scratch = State(text.config, ops, like.kv_dtype)
        positions, lengths = np.zeros((1, 3), np.int64), np.array([0, 1], np.int64)
        text.logits(text.forward(text.embed(np.zeros(1, np.int64)), positions, [scratch], lengths))
        self._fill(0, scratch)
        self._forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._hidden = self._forward()
        self._graph = graph

    def _forward(self) -> Any:
        text, part = self._text, self._inputs
        x = self._ops.embed(part[0:1], text.weights.embed)
        cos, sin = self._ops.rope_table(part[1:4].reshape(1, 3), self._frequencies, self._axes, text.rope.scale)
        batch = Batch([self._slot], part[5:7], [1], part[4:5], cos, sin, prefill=False)  # type: ignore[list-item, arg-type]
        return text.run_layers(x, batch)

    def _fill(self, token: int, state: State) -> None:
        host, position = self._host, state.length + state.rope_delta
        host[:5] = token, position, position, position, state.length
        host[7:9] = state.conv.data_ptr(), state.delta.data_ptr()  # type: ignore[attr-defined]
        table = host[16:]
        table[:] = 0
        table[: len(state.kv)] = [block.data_ptr() for block in state.kv.blocks]
        self._ops.copy_from_host(self._inputs, host)

    def run(self, token: int, state: State) -> Any:
        self._fill(token, state)
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._hidden.clone()  # the graph writes it anew in every step
