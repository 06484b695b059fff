"""How does a checkpoint become a packed folder? Its matrices are packed slab by slab straight into the packed file, and
the small files (configuration, tokeniser, template) are copied, all into a temporary folder that is renamed at the end:
whoever looks sees the finished folder, the one before, or none."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from ..model.config import ModelConfig
from ..model.config_file import load_config
from ..model.weights import Array
from .build import mtp_weights, record_keys, text_weights, vision_weights
from .checkpoint import INDEX_FILE, Checkpoint, open_checkpoint
from .packed import PACKED_FILE, PackedWriter, part_name
from .packer import Packer, Stored, readable
from .precision import Precision

SLAB_BYTES = 8 << 20  # of the checkpoint, packed at a time

_COPIED_SUFFIXES = (".json", ".jinja", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")


def quantize(
    path_or_id: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | Mapping[str, str] = "int4",
    vision_dtype: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Pack a checkpoint into a folder that `deltaic.load` maps without further work, on any machine.

    path_or_id    a folder with config.json and safetensors, or a Hugging Face hub id
    output        the folder to make
    dtype         "int4", "int8", "bf16", "f32", or a mapping of name patterns (see Precision.parse)
    vision_dtype  format of the vision tower; None: bf16, or f32 where dtype is f32
    overwrite     replace `output` if it is a packed folder already
    threads       None: the physical cores this process may use

    Returns the folder. Needs little memory: one packed matrix passes through it slab by slab. The result is the same,
    bit for bit, as what `deltaic.load` packs in memory. Raises ArgumentError, ConfigError, CheckpointError,
    DeviceError.
    """
    from ..chat.prepared import write_prepared
    from ..ops.devices import op_set, use_threads
    from .hub import find_model

    precision = Precision.parse(dtype, vision_dtype)
    ops = op_set("cpu")
    use_threads(ops, threads)
    folder = find_model(path_or_id)
    if (folder / PACKED_FILE).exists():
        raise CheckpointError(f"{folder} is packed already; give the original checkpoint")
    target = Path(output)
    _check_target(target, folder, overwrite)
    config = load_config(folder)
    with open_checkpoint(folder) as checkpoint, _new_folder(target) as temporary:
        _copy_files(folder, temporary)
        _write(temporary / PACKED_FILE, checkpoint, config, ops, precision, progress)
        write_prepared(temporary)
    return target


def _write(
    path: Path, checkpoint: Checkpoint, config: ModelConfig, ops: Any, precision: Precision, progress: bool | None
) -> None:
    has_mtp = any(name.startswith("mtp.") for name in checkpoint.tensors)
    keys = record_keys(config, has_mtp=has_mtp)
    writer = PackedWriter(path, len(keys.matrices) + len(keys.vectors))
    try:
        packer = _StreamingPacker(checkpoint, config, ops, precision, writer)
        text_weights(packer, config, progress)
        if packer.has_mtp:
            mtp_weights(packer, config, progress)
        if config.vision is not None:
            vision_weights(packer, config, progress)
        writer.finish(precision, packer.fingerprint(), ops)
    finally:
        writer.abandon()


class _StreamingPacker(Packer):
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


# ----------------------------------------------------------------------------------------------------------- the folder


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ArgumentError(f"output: {target.parent} is not a folder; make it first")
    if not os.path.lexists(target):
        return
    if target.resolve() == source.resolve():
        raise ArgumentError(f"output: {target} is the checkpoint itself; give another folder")
    if not target.is_dir() or target.is_symlink():
        raise ArgumentError(f"output: {target} exists and is not a folder; give another name")
    if not any(target.iterdir()):
        return
    if not (target / PACKED_FILE).exists():
        raise ArgumentError(f"output: {target} exists and is not a packed folder; give another name")
    if not overwrite:
        raise ArgumentError(f"output: {target} is a packed folder already; remove it, or allow to overwrite it")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes if it does not."""
    with _as_checkpoint_error(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's are private
            _sync(temporary)
            _replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _replace(temporary: Path, target: Path) -> None:
    """Rename; a folder that is in the way moves aside first and is removed last."""
    if not target.exists():
        temporary.rename(target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(aside / target.name)
        try:
            temporary.rename(target)
        except BaseException:
            (aside / target.name).rename(target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _copy_files(source: Path, target: Path) -> None:
    """What is not weights: configuration, tokeniser, template, licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.stem in _COPIED_NAMES
        if wanted and path.name != INDEX_FILE and path.is_file():
            shutil.copyfile(path, target / path.name)


def _sync(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk (Windows cannot open folders, and keeps them by itself)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
