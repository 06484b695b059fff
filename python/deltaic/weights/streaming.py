"""How is a checkpoint packed that is larger than memory? Slab by slab, straight into the packed file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..model.config import ModelConfig
from ..model.weights import Array
from .build import mtp_weights, record_keys, text_weights, vision_weights
from .checkpoint import Checkpoint
from .packed import PackedWriter, part_name
from .packer import Packer, Stored, readable
from .precision import Precision

SLAB_BYTES = 8 << 20  # of the checkpoint, packed at a time


def write_packed(
    path: Path, checkpoint: Checkpoint, config: ModelConfig, ops: Any, precision: Precision, progress: bool | None
) -> None:
    """Write the packed file of a checkpoint: the decoder, the MTP layer and the vision tower, as far as they are there.
    progress: see `source.progress_bar`. Raises CheckpointError, ArgumentError and OSError; `path` may then be
    unfinished."""
    has_mtp = any(name.startswith("mtp.") for name in checkpoint.tensors)
    keys = record_keys(config, has_mtp=has_mtp)
    writer = PackedWriter(path, len(keys.matrices) + len(keys.vectors))
    try:
        packer = StreamingPacker(checkpoint, config, ops, precision, writer)
        text_weights(packer, config, progress)
        if packer.has_mtp:
            mtp_weights(packer, config, progress)
        if config.vision is not None:
            vision_weights(packer, config, progress)
        writer.finish(precision, packer.fingerprint(), ops)
    finally:
        writer.abandon()


class StreamingPacker(Packer):
    """Packs into a file. A slab of rows is packed, written and given back before the next one is read; slabs are whole
    blocks of 16 rows, so their bytes follow each other as if the matrix had been packed at once."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, ops: Any, precision: Precision, writer: PackedWriter
    ):
        super().__init__(checkpoint, config, ops, precision)
        self._writer = writer
        self._hash = hashlib.sha256()
        self._files = checkpoint.files
        for file in sorted(checkpoint.files, key=lambda file: file.path.name):
            entries = [(t.name, t.dtype, t.shape, t.begin) for t in file.tensors.values()]
            self._hash.update(repr((file.path.name, file.size, sorted(entries))).encode())

    def fingerprint(self) -> str:
        """SHA-256 of the tables of all files and of all vectors: tells two fine-tunes of one model apart."""
        return self._hash.hexdigest()

    def _pack(self, key: str, parts: Any, formats: list[str]) -> Any:
        described = []
        for i, (part, dtype) in enumerate(zip(parts, formats, strict=True)):
            experts = _experts(part)
            self._writer.begin(part_name(key, i))
            for matrix in experts:
                for rows in _slabs(matrix):
                    self._append(self._ops.pack([readable(matrix[rows])], dtype))
            self._writer.end()
            described.append((dtype, experts[0].shape[0]))
        self._writer.describe(key, len(experts), experts[0].shape[1], False, described)

    def _pack_glu(self, key: str, gate: Stored, up: Stored, dtype: str) -> Any:
        gates, ups = _experts(gate), _experts(up)
        self._writer.begin(part_name(key, 0))
        for first, second in zip(gates, ups, strict=True):
            for rows in _slabs(first):
                self._append(self._ops.pack_glu(readable(first[rows]), readable(second[rows]), dtype))
        self._writer.end()
        self._writer.describe(key, len(gates), gates[0].shape[1], True, [(dtype, gates[0].shape[0])])

    def _append(self, weight: Any) -> None:
        ((_, _, data),) = self._ops.packed_parts(weight)
        self._writer.write(data)
        for file in self._files:
            file.release()

    def _keep_vector(self, name: str, array: Array) -> Array:
        self._hash.update(array.tobytes())
        self._writer.vector(name, array)
        return array


def _experts(stored: Stored) -> list[np.ndarray[Any, Any]]:
    if isinstance(stored, list):
        return stored
    return list(stored) if stored.ndim == 3 else [stored]


def _slabs(matrix: np.ndarray[Any, Any]) -> Iterator[slice]:
    rows = max(1, SLAB_BYTES // (16 * max(1, matrix.shape[1] * matrix.itemsize))) * 16
    for first in range(0, matrix.shape[0], rows):
        yield slice(first, first + rows)
