"""What do the CUDA operators read besides activations? Packed matrices (layouts: csrc/cuda/weight.cuh), K/V blocks, and
where the states of sequences lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..errors import ArgumentError
from .cuda_memory import ACTIVATION_DTYPES, Tensor, address, check, device, small, upload

if TYPE_CHECKING:
    import torch

FORMATS = ("f32", "bf16", "int8", "int4")
RUN = 128  # columns that share one scale in int8 and int4


class Weight:
    """A packed matrix [N, K], or E matrices [E, N, K]; layouts in csrc/cuda/weight.cuh. Holds its device memory."""

    def __init__(self, parts: list[Part], count: int, glu: bool):
        self.parts, self.count, self.glu = parts, count, glu
        rows, columns = sum(part.rows for part in parts), parts[0].columns
        self.shape: tuple[int, ...] = (rows, columns) if count == 1 else (count, rows, columns)
        self.dtype = parts[0].format
        self.activation_dtype = (
            "float32" if self.dtype == "f32" else "bfloat16"
        )  # of what `embed`, `patch_embed` return
        self.float_activations = True  # always here, whatever is asked for: matrices are dequantised in registers
        self.float_output = False  # `linear` returns float32: a head
        self.joined: tuple[Weight, Weight] | None = (
            None  # of a router: the shared gate it was joined with, and the result
        )
        self.nbytes = sum(t.numel() * t.element_size() for part in parts for t in part.tensors)
        described = [(p.format, p.rows, p.columns, p.stride, *map(address, (p.q, p.s, p.d))) for p in parts]
        self.handle = device().module.Matrices(described, count, glu)


@dataclasses.dataclass(slots=True)
class Part:
    format: str
    rows: int
    columns: int
    stride: int
    q: Tensor  # f32, bf16: [E*N, stride] numbers; int8, int4: uint8 [E*N, bytes]
    s: Tensor | None = None
    d: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.q, self.s, self.d) if t is not None]


def pack(parts: Sequence[np.ndarray], dtype: str | Sequence[str]) -> Weight:
    """Packs matrices [N_i, K] (or [E, N_i, K]) that read the same input, each in its format, into one weight."""
    formats = [dtype] * len(parts) if isinstance(dtype, str) else list(dtype)
    if not parts or len(formats) != len(parts):
        raise ArgumentError(f"pack: {len(parts)} parts, {len(formats)} formats; expected as many of each, at least one")
    made = [_pack_part(np.asarray(part), format) for part, format in zip(parts, formats, strict=True)]
    return Weight(made, parts[0].shape[0] if parts[0].ndim == 3 else 1, False)


def pack_glu(gate: np.ndarray, up: np.ndarray, dtype: str) -> Weight:
    """Packs gate and up [I, K] (or [E, I, K]) into (2I, K) or (E, 2I, K), gate rows first, for `swiglu` and `moe`."""
    if gate.shape != up.shape:
        raise ArgumentError(f"pack_glu: gate is {gate.shape} and up is {up.shape}, expected equal shapes")
    joined = np.concatenate([gate, up], axis=-2)
    return Weight([_pack_part(joined, dtype)], gate.shape[0] if gate.ndim == 3 else 1, True)


def _pack_part(part: np.ndarray, format: str) -> Part:
    if format not in FORMATS:
        raise ArgumentError(f"pack: unknown weight format {format!r}, expected one of {', '.join(FORMATS)}")
    if part.ndim not in (2, 3) or 0 in part.shape:
        raise ArgumentError(f"pack: a part is {part.shape}, expected [N, K] or [E, N, K], none of them 0")
    rows, columns = part.shape[-2:]
    flat = part.reshape(-1, columns)
    if format in ("int8", "int4"):
        return _quantise(flat, format, rows)
    stride = -(-columns // 8) * 8
    kind = np.float32 if format == "f32" else ml_dtypes.bfloat16
    padded = flat.astype(kind)
    if stride != columns:
        padded = np.concatenate([padded, np.zeros((len(flat), stride - columns), kind)], axis=1)
    return Part(format, rows, columns, stride, upload(padded))


def _quantise(flat: np.ndarray, format: str, rows: int) -> Part:
    """Quantises with the CPU's packer, so that both devices hold the same numbers, and lays its blocks out anew."""
    from . import cpu

    _, total, packed = cpu.packed_parts(cpu.pack([flat], format))[0]
    part = _from_cpu_blocks(packed, format, 1, total, flat.shape[1], False)
    part.rows = rows
    return part


def from_packed(parts: Sequence[tuple[str, int, np.ndarray]], count: int, columns: int, glu: bool) -> Weight:
    """A weight from bytes that the CPU's `pack` or `pack_glu` made (csrc/core/view.h), laid out for the GPU."""
    return Weight([_from_cpu_blocks(data, dtype, count, rows, columns, glu) for dtype, rows, data in parts], count, glu)


def _from_cpu_blocks(packed: np.ndarray, format: str, count: int, rows: int, columns: int, glu: bool) -> Part:
    """One part from the CPU's blocks of 16 rows; with glu, blocks of gate and up rows (`rows` each) alternate."""
    runs, pieces = -(-columns // RUN), -(-rows // 16)
    raw = np.asarray(packed).reshape(count * pieces * (2 if glu else 1), -1)

    def rows_of(plane: np.ndarray) -> np.ndarray:
        """[blocks, 16, n] -> [count * rows, n], gate rows of an expert before its up rows."""
        plane = plane.reshape(count, pieces, 2 if glu else 1, 16, -1).transpose(0, 2, 1, 3, 4)
        plane = plane.reshape(count, 2 if glu else 1, pieces * 16, -1)[:, :, :rows]
        return np.ascontiguousarray(plane).reshape(-1, plane.shape[-1])

    total = (2 if glu else 1) * rows
    if format in ("f32", "bf16"):
        kind, pair = (np.float32, 1) if format == "f32" else (np.uint16, 2)
        numbers = np.ascontiguousarray(raw).view(kind).reshape(len(raw), -1, 16, pair).transpose(0, 2, 1, 3)
        numbers = rows_of(numbers.reshape(len(raw), 16, -1))[:, :columns]
        stride = -(-columns // 8) * 8
        padded = np.zeros((len(numbers), stride), kind)
        padded[:, :columns] = numbers
        return Part(format, total, columns, stride, upload(padded if pair == 1 else padded.view(ml_dtypes.bfloat16)))
    if format == "int8":
        q, scales = raw[:, runs * 32 :].reshape(-1, runs * 32, 16, 4), None
    else:
        q = raw[:, runs * 96 :].reshape(-1, runs * 16, 16, 4)
        scales = raw[:, runs * 32 : runs * 96].reshape(-1, runs * 4, 16)
    d = np.ascontiguousarray(raw[:, : runs * 32]).view(np.uint16).reshape(-1, runs, 16)
    return Part(
        format,
        total,
        columns,
        runs * RUN,
        upload(rows_of(q.transpose(0, 2, 1, 3).reshape(len(raw), 16, -1))),
        None if scales is None else upload(rows_of(scales.transpose(0, 2, 1))),
        upload(rows_of(d.transpose(0, 2, 1))),
    )


def first_rows(weight: Weight, rows: int) -> Weight:
    """The first `rows` (or all, if there are fewer) rows of a matrix of one part, on the same memory."""
    part = weight.parts[0]
    rows = min(rows, part.rows)
    q, s, d = (None if t is None else t[:rows] for t in (part.q, part.s, part.d))
    view = Weight([Part(part.format, rows, part.columns, part.stride, q, s, d)], 1, False)
    view.activation_dtype, view.float_output = weight.activation_dtype, weight.float_output
    return view


class BlockTable:
    """The K/V blocks of one sequence: tensors [L_attn, 2, Hkv, BLOCK, D], float32 or bfloat16, all alike."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self._addresses = np.zeros(16, np.int64)

    @property
    def addresses(self) -> np.ndarray:
        """Of the blocks, not to be written: int64."""
        return self._addresses[: len(self.blocks)]

    def __len__(self) -> int:
        return len(self.blocks)

    def append(self, block: Tensor) -> None:
        self.blocks.append(self._checked(block))
        n = len(self.blocks)
        if n > len(self._addresses):
            self._addresses = np.concatenate([self._addresses, np.zeros_like(self._addresses)])
        self._addresses[n - 1] = address(block)

    def replace(self, i: int, block: Tensor) -> None:
        if not 0 <= i < len(self.blocks):
            raise ArgumentError(f"BlockTable: block {i} of {len(self.blocks)} does not exist")
        self.blocks[i] = self._checked(block)
        self._addresses[i] = address(block)

    def _checked(self, block: Tensor) -> Tensor:
        check("BlockTable", "block", block, [None, 2, None, None, None], ACTIVATION_DTYPES)
        if self.blocks and (block.shape, block.dtype) != (self.blocks[0].shape, self.blocks[0].dtype):
            first = self.blocks[0]
            raise ArgumentError(
                f"BlockTable: block is {block.dtype}{tuple(block.shape)}, "
                f"the others are {first.dtype}{tuple(first.shape)}"
            )
        return block


@dataclasses.dataclass(slots=True)
class Pointers:
    """Instead of a list of float32 or int64 tensors of B sequences: their addresses in device memory, int64 [B], the
    shape of each, and how many elements behind its address it begins.

    A captured graph reads them when it runs, so one graph serves any sequence."""

    addresses: Tensor
    shape: tuple[int, ...]
    offset: int = 0

    def __getitem__(self, i: int) -> Pointers:
        """Item i of each."""
        return Pointers(self.addresses, self.shape[1:], self.offset + i * math.prod(self.shape[1:]))


def pointers(
    op: str, name: str, states: Any, shape: Sequence[int | None], dtype: str = "float32", *, shared: bool = False
) -> Pointers:
    """Where the tensors of a list are, or what stands for them in a list of one; each has this shape (None: any).

    shared: the offset need not be 0, so that the layers of the same arrays share one upload."""
    if len(states) == 1 and isinstance(states[0], Pointers):
        (found,) = states
        if len(found.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found.shape, strict=False)):
            raise ArgumentError(f"{op}: {name} are {found.shape}, expected {tuple(shape)}")
        return found
    for state in states:
        check(op, name, state, shape, [dtype])
    addresses = np.array([address(state) for state in states], np.int64)
    if not states:
        return Pointers(small(addresses), ())
    offset = states[0].storage_offset() if shared else 0
    return Pointers(small(addresses - offset * states[0].element_size()), tuple(states[0].shape), offset)


@dataclasses.dataclass(slots=True)
class TableBatch:
    """The block tables of B sequences as one device array of addresses [B, room]."""

    addresses: Tensor
    block_shape: tuple[int, ...]
    dtype: torch.dtype
    rooms: list[int]

    @staticmethod
    def of(tables: Sequence[BlockTable]) -> TableBatch:
        import torch

        first = next((table.blocks[0] for table in tables if table.blocks), None)
        if first is None:
            return TableBatch(
                small(np.zeros((len(tables), 1), np.int64)), (1, 2, 0, 1, 0), torch.float32, [0] * len(tables)
            )
        for table in tables:
            if table.blocks and (table.blocks[0].shape, table.blocks[0].dtype) != (first.shape, first.dtype):
                raise ArgumentError("gated_attention: the tables of a batch hold blocks of different shapes or dtypes")
        room = max(len(table) for table in tables)
        rows = np.zeros((len(tables), room), np.int64)
        for row, table in zip(rows, tables, strict=True):
            row[: len(table)] = table.addresses
        return TableBatch(small(rows), tuple(first.shape), first.dtype, [len(table) for table in tables])


def place(weights: Any, dtype: str) -> Any:
    """A dataclass of model/weights.py with its numpy arrays moved to the device, for a model loaded as `dtype`.

    Matrices that are stored in another format than the others (patches: always f32) get the model's activation dtype,
    and the head of a decoder returns float32 logits."""
    if isinstance(weights, np.ndarray):
        return upload(weights)
    if isinstance(weights, list):
        return [place(item, dtype) for item in weights]
    if isinstance(weights, Weight):
        weights.activation_dtype = "float32" if dtype == "f32" else "bfloat16"
    elif dataclasses.is_dataclass(weights) and not isinstance(weights, type):
        values = {field.name: place(getattr(weights, field.name), dtype) for field in dataclasses.fields(weights)}
        weights = dataclasses.replace(weights, **values)
        if hasattr(weights, "head"):
            weights.head.float_output = True
    return weights
