"""How do stored tensors become packed matrices? Reads the tensors of a checkpoint by name and packs them one after
another through an op set. At any time only the tensors of one packed matrix are mapped besides what is already packed,
so that loading never needs much more memory than the packed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from ..model.config import ModelConfig
from ..model.weights import Array, Weight
from .checkpoint import Checkpoint, Tensor
from .names import TensorTable, resolve
from .precision import ROUNDED, Precision
from .source import Transform, progress_bar

_COMPARE_ROWS = 4096

Stored = np.ndarray[Any, Any] | list[np.ndarray[Any, Any]]  # [N, K], [E, N, K], or the [N, K] of E experts


class Packer:
    """The tensors of a checkpoint as a `Source` (weights/source.py): each call reads, packs, gives the mapped pages
    back and moves the progress bar."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, ops: Any, precision: Precision):
        self.where = str(checkpoint.source)
        self.table: TensorTable = resolve(checkpoint, config)
        self.formats = precision.formats(self.table.specs, tied=config.text.tie_word_embeddings)
        self._ops = ops
        self._float_activations = precision.activations == "float32"
        self._bar: Any = None

    @property
    def has_mtp(self) -> bool:
        """Whether there is a multi-token-prediction layer."""
        return self.table.has_mtp

    @contextmanager
    def progress_bar(self, title: str, prefixes: tuple[str, ...] | None, progress: bool | None) -> Iterator[None]:
        """Counts the bytes of the tensors whose names start with one of `prefixes` while the block runs."""
        chosen = [t for name, t in self.table.tensors.items() if in_part(name, prefixes)]
        with progress_bar("Packing " + title, sum(t.nbytes for t in chosen), progress) as self._bar:
            yield

    def matrix(self, key: str, names: Sequence[str] | None = None) -> Weight:
        """Matrices that read the same input, packed as one: their rows follow each other in the order of `names`."""
        names = names or [key + ".weight"]
        formats = [self.formats[name] for name in names]
        return self._run(names, lambda arrays: self._pack(key, arrays, formats))

    def glu(self, key: str, prefix: str) -> Weight:
        """`gate_proj` and `up_proj` under `prefix` [I, K] -> (2I, K)."""
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        dtype = self._common_format(names)
        return self._run(names, lambda arrays: self._pack_glu(key, arrays[0], arrays[1], dtype))

    def experts(self, prefix: str, count: int) -> tuple[Weight, Weight]:
        """gate_up (E, 2I, K) and down (E, N, I) of all experts under `prefix`, stored fused or one by one."""
        if prefix + "gate_up_proj" in self.table.specs:
            return self._fused_gate_up(prefix), self.matrix(prefix + "down_proj", [prefix + "down_proj"])
        stems = [f"{prefix}{e}." for e in range(count)]
        gates = [stem + "gate_proj.weight" for stem in stems]
        ups = [stem + "up_proj.weight" for stem in stems]
        dtype = self._common_format(gates + ups)

        downs = [stem + "down_proj.weight" for stem in stems]
        down_dtype = self._common_format(downs)
        gate_up = self._run(
            gates + ups,
            lambda arrays: self._pack_glu(prefix + "gate_up_proj", arrays[:count], arrays[count:], dtype),
        )
        down = self._run(downs, lambda arrays: self._pack(prefix + "down_proj", [arrays], [down_dtype]))
        return gate_up, down

    def _fused_gate_up(self, prefix: str) -> Weight:
        """Experts stored as [E, 2I, K], gate rows first -> (E, 2I, K), from views: nothing is copied here."""
        name = prefix + "gate_up_proj"

        def halves(arrays: list[np.ndarray[Any, Any]]) -> Weight:
            middle = arrays[0].shape[1] // 2
            return self._pack_glu(name, arrays[0][:, :middle], arrays[0][:, middle:], self.formats[name])

        return self._run([name], halves)

    def affine(self, key: str, transform: Transform | None = None) -> tuple[Weight, Array]:
        """`key`.weight packed (after `transform`), and `key`.bias."""
        name = key + ".weight"

        def pack(arrays: list[np.ndarray[Any, Any]]) -> Weight:
            return self._pack(key, [transform(arrays[0]) if transform else arrays[0]], [self.formats[name]])

        return self._run([name], pack), self.vector(key + ".bias")

    def vector(self, name: str, transform: Transform | None = None) -> Array:
        """A contiguous float32 array of its own memory, after `transform`."""

        def convert(arrays: list[np.ndarray[Any, Any]]) -> Array:
            array = transform(arrays[0]) if transform else arrays[0]
            return self._keep_vector(name, np.array(array, dtype=np.float32, order="C", copy=True))

        result: Array = self._run([name], convert)
        return result

    def check_tied_head(self) -> None:
        """A head that is stored although it is tied must be the embedding, bit for bit."""
        head, embed = self.table.tensors.get("lm_head.weight"), self.table.tensors["embed_tokens.weight"]
        if head is None:
            return
        if not _equal_bits(head, embed):
            raise CheckpointError(
                f"{head.file.path} holds an lm_head.weight that differs from embed_tokens.weight, although config.json "
                f"says tie_word_embeddings = true; set it to false to use the stored head, or remove lm_head.weight"
            )
        self._finished([head])

    # what a subclass that writes files does differently

    def _pack(self, key: str, parts: Sequence[Stored], formats: list[str]) -> Weight:
        return self._with_activations(self._ops.pack([_joined(part) for part in parts], formats), formats)

    def _pack_glu(self, key: str, gate: Stored, up: Stored, dtype: str) -> Weight:
        return self._with_activations(self._ops.pack_glu(_joined(gate), _joined(up), dtype), [dtype])

    def _keep_vector(self, name: str, array: Array) -> Array:
        return array

    def _with_activations(self, weight: Any, formats: list[str]) -> Weight:
        if self._float_activations and any(name in ROUNDED for name in formats):
            weight.float_activations = True
        return weight

    def _common_format(self, names: Sequence[str]) -> str:
        """The format of tensors that are packed as one. Raises ArgumentError if patterns gave them different ones."""
        first = self.formats[names[0]]
        for name in names:
            if self.formats[name] != first:
                raise ArgumentError(
                    f"dtype: {names[0]} would be {first} and {name} {self.formats[name]}, but they are packed as one "
                    f"matrix; give patterns that treat them alike"
                )
        return first

    def _run(self, names: Sequence[str], work: Callable[[list[np.ndarray[Any, Any]]], Any]) -> Any:
        tensors = [self.table.tensors[name] for name in names]
        try:
            result = work([tensor.read() for tensor in tensors])
        except MemoryError:
            raise CheckpointError(
                f"not enough memory to pack {tensors[0].name} {list(tensors[0].shape)} of {tensors[0].file.path}; "
                f"free memory, or load a smaller model or dtype"
            ) from None
        self._finished(tensors)
        return result

    def _finished(self, tensors: Sequence[Tensor]) -> None:
        for file in {tensor.file for tensor in tensors}:
            file.release()
        if self._bar is not None:
            self._bar.update(sum(tensor.nbytes for tensor in tensors))


def in_part(name: str, prefixes: tuple[str, ...] | None) -> bool:
    """Whether a tensor belongs to a part of the model: the one under `prefixes`, or for None the decoder."""
    return name.startswith(prefixes) if prefixes else not name.startswith(("visual.", "mtp."))


def _joined(stored: Stored) -> np.ndarray[Any, Any]:
    return readable(np.stack(stored) if isinstance(stored, list) else stored)


def readable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Op sets pack float32 and bfloat16; float16 fits into float32 exactly."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _equal_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return False
    a, b = first.read(), second.read()
    bits = np.dtype(f"u{a.dtype.itemsize}")  # NaN equals itself, -0 differs from 0
    rows = range(0, a.shape[0], _COMPARE_ROWS)
    return all(np.array_equal(a[i : i + _COMPARE_ROWS].view(bits), b[i : i + _COMPARE_ROWS].view(bits)) for i in rows)
