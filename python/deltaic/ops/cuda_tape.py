"""How does a GPU repeat a hundred operators without the host? A tape is a captured graph with what it is given: one
buffer, filled in the host's memory and sent at once, holds the small numbers, and the addresses of everything else."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ArgumentError
from .cuda_memory import Constants, Tensor, address, device, keeping, new
from .cuda_weights import BlockTable, Pointers, TableBatch

if TYPE_CHECKING:
    import torch

FEWEST_BLOCKS = 16  # room for K/V blocks of each sequence, doubled as needed
MOST_JOBS = 4  # tensors that are copied in, and as many that are copied out
ALIGNED = 16  # bytes; a part of the buffer begins at a multiple

_made: weakref.WeakSet[Tape] = weakref.WeakSet()  # their graphs share memory: they run one after another

Run = Callable[..., tuple[Any, ...]]
Fill = Callable[[Any], None]  # puts an input where the graph finds it


class _Result(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Tape:
    """Calls of operators in a function of some inputs, which can be repeated on other inputs of the same shapes.

    What the function gets instead of an input, in device memory that stays:
      numpy array              a part of the buffer
      tensor                   a copy
      list of other tensors    a list of one `Pointers` to all of them: arrays of states, traces
      list of BlockTables      a list of one `TableBatch`
      None, empty list         the same
    It returns tensors, which the caller of the tape gets copies of, and parts of int64 arrays among the inputs that
    `sample_rows` has filled. The host reads these, all at once; nothing else waits for the device."""

    def __init__(self) -> None:
        self._device = device()
        self._constants: Constants = {}
        self._fill: list[Fill] = []  # one for each input
        self._given: list[Any] = []  # what the function gets
        self._fetched: list[Tensor] = []  # the copies among these
        self._results: list[_Result | slice] = []  # what it returns; slice: bytes of the buffer
        self._read: tuple[Tensor, Tensor] | None = None  # on the host and on the device, the bytes that hold all these
        self._sending = False  # the device may not have read the host's buffer yet
        self._graph: Any = None

    @staticmethod
    def shape(inputs: Sequence[Any]) -> Hashable:
        """What a graph depends on beside the shapes of arrays: how many K/V blocks it has room for, and their dtype."""
        return tuple((_room(value), value[0].blocks[0].dtype) for value in inputs if _is_tables(value))

    def record(self, inputs: Sequence[Any], run: Run) -> tuple[Any, ...]:
        """What run(*inputs) returns; it is called once for that, and once for the graph."""
        self._lay_out(inputs)
        self._put(inputs)
        self._send()
        with keeping(self._constants):
            outputs = self._fetch_and(run)
            self._settle()
            self._find(outputs)
            results = self._targets()
            self._send(slice(self._jobs.nbytes))  # the rest holds tokens by now
            self._deliver()
            found = self._finish(results)

            def whole() -> tuple[Any, ...]:
                outputs = self._fetch_and(run)
                self._deliver()
                return outputs

            pool = next((tape._graph.pool() for tape in _made if tape._device is self._device), None)
            self._graph, outputs = self._device.capture(whole, pool)
        self._settle()
        self._find(outputs)  # which are not kept: other graphs may have their memory in between
        _made.add(self)
        return found

    def replay(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The same on other inputs."""
        self._settle()
        self._put(inputs)
        results = self._targets()
        self._send()
        self._graph.replay()
        return self._finish(results)

    # ------------------------------------------------------------------------------------------------- what it is given

    def _lay_out(self, inputs: Sequence[Any]) -> None:
        """Make the buffer, the jobs of `relocate` first, and what stands for each input."""
        import torch

        parts: list[tuple[tuple[int, ...], Any]] = [((2 * MOST_JOBS, 3), np.int64)]
        for value in inputs:
            if isinstance(value, np.ndarray):
                parts.append((value.shape, value.dtype))
            elif isinstance(value, list) and value:
                parts.append(((len(value), _room(value) if _is_tables(value) else 1), np.int64))
        ends = np.cumsum(
            [-(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNED) * ALIGNED for shape, dtype in parts]
        )
        self._host = self._device.host_bytes(int(ends[-1]))
        self._buffer = new([int(ends[-1])], torch.uint8)
        self._bytes = self._host.numpy()
        self._bytes[:] = 0
        laid = self._parts(parts, [0, *ends.tolist()])
        self._jobs, self._jobs_on = next(laid)
        fill: Fill
        for value in inputs:
            if value is None or (isinstance(value, list) and not value):
                fill, given = _nothing, value
            elif isinstance(value, np.ndarray):
                host, given = next(laid)
                fill = _numbers(host)
            elif isinstance(value, list):
                fill, given = _addresses(value, *next(laid))
            else:
                fill, given = self._fetched_rows(value)
            self._fill.append(fill)
            self._given.append(given)

    def _parts(
        self, parts: Sequence[tuple[tuple[int, ...], Any]], begins: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The parts of the buffer, as the host has them and as the device has them."""
        import torch

        for (shape, dtype), begin in zip(parts, begins, strict=False):
            end = begin + math.prod(shape) * np.dtype(dtype).itemsize
            on_device = self._buffer[begin:end].view(getattr(torch, np.dtype(dtype).name)).reshape(shape)
            yield self._bytes[begin:end].view(dtype).reshape(shape), on_device

    def _fetched_rows(self, rows: Tensor) -> tuple[Fill, Tensor]:
        """What tells `relocate` where a tensor is, and the copy that it makes."""
        copy, job = new(rows.shape, rows.dtype), self._jobs[len(self._fetched)]
        job[1:] = address(copy), _nbytes(copy)
        self._fetched.append(copy)

        def fill(rows: Tensor) -> None:
            if rows.shape != copy.shape or rows.dtype != copy.dtype or not rows.is_contiguous():
                raise ArgumentError(
                    f"Tape: an input is {rows.dtype}{list(rows.shape)}, expected a contiguous "
                    f"{copy.dtype}{list(copy.shape)}"
                )
            job[0] = address(rows)

        return fill, copy

    def _put(self, inputs: Sequence[Any]) -> None:
        for fill, value in zip(self._fill, inputs, strict=True):
            fill(value)

    def _send(self, part: slice | None = None) -> None:
        whole = part is None
        self._device.send(self._buffer if whole else self._buffer[part], self._host if whole else self._host[part])
        self._sending = True

    def _settle(self) -> None:
        """Return when the host's buffer may be written."""
        if self._sending:
            self._device.wait()
            self._sending = False

    def _fetch_and(self, run: Run) -> tuple[Any, ...]:
        self._relocate(0, [_nbytes(copy) for copy in self._fetched])
        return run(*self._given)

    # ------------------------------------------------------------------------------------------------ what comes of it

    def _find(self, outputs: Sequence[Tensor]) -> None:
        """Where the outputs lie."""
        begin, job, self._results = address(self._buffer), MOST_JOBS, []
        for output in outputs:
            first = address(output) - begin
            if 0 <= first < len(self._bytes):
                self._results.append(slice(first, first + _nbytes(output)))
            else:
                self._results.append(_Result(tuple(output.shape), output.dtype, _nbytes(output)))
                self._jobs[job] = address(output), 0, _nbytes(output)
                job += 1
        tokens = [result for result in self._results if isinstance(result, slice)]
        self._read = None
        if tokens:
            span = slice(min(t.start for t in tokens), max(t.stop for t in tokens))
            self._read = self._host[span], self._buffer[span]

    def _targets(self) -> list[Any]:
        """New tensors for the results, and slices where they are tokens."""
        results: list[Any] = list(self._results)
        job = MOST_JOBS
        for i, result in enumerate(results):
            if isinstance(result, _Result):
                results[i] = new(result.shape, result.dtype)
                self._jobs[job, 1] = address(results[i])
                job += 1
        return results

    def _finish(self, results: list[Any]) -> tuple[Any, ...]:
        """The results, with tokens instead of slices."""
        if self._read is not None:
            self._device.receive(*self._read)
            self._sending = False
            for i, result in enumerate(results):
                if isinstance(result, slice):
                    results[i] = self._bytes[result].view(np.int64).copy()
        return tuple(results)

    def _deliver(self) -> None:
        self._relocate(MOST_JOBS, [result.nbytes for result in self._results if isinstance(result, _Result)])

    def _relocate(self, first: int, sizes: Sequence[int]) -> None:
        """Do the jobs of so many bytes each, from the `first` on."""
        jobs = address(self._jobs_on) + first * self._jobs[0].nbytes
        self._device.module.relocate(jobs, len(sizes), max(sizes, default=0), self._device.stream())


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], BlockTable)


def _room(tables: list[BlockTable]) -> int:
    """How many blocks of each of these a graph has room for."""
    most = max(map(len, tables))
    return FEWEST_BLOCKS if most <= FEWEST_BLOCKS else 1 << (most - 1).bit_length()


def _nbytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _nothing(value: Any) -> None:
    """Fills nothing."""


def _numbers(part: np.ndarray) -> Fill:
    def fill(value: np.ndarray) -> None:
        part[...] = value

    return fill


def _addresses(value: list[Any], part: np.ndarray, on_device: Tensor) -> tuple[Fill, list[Any]]:
    """What fills a part [B, room] of the buffer with the addresses of a list, and what stands for the list."""
    if _is_tables(value):
        block, rooms = value[0].blocks[0], [part.shape[1]] * len(value)

        def fill_tables(tables: list[BlockTable]) -> None:
            for row, table in zip(part, tables, strict=True):
                n = len(table)
                row[:n], row[n:] = table.addresses, 0

        return fill_tables, [TableBatch(on_device, tuple(block.shape), block.dtype, rooms)]
    shape = value[0].shape

    def fill(tensors: list[Tensor]) -> None:
        for row, tensor in zip(part, tensors, strict=True):
            if tensor.shape != shape:
                raise ArgumentError(f"Tape: an array of a state is {list(tensor.shape)}, expected {list(shape)}")
            row[0] = address(tensor)

    return fill, [Pointers(on_device.reshape(-1), tuple(shape))]
