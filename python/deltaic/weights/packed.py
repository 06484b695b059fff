"""How do packed weights lie on disk? One safetensors file that is mapped, not read: every matrix as the bytes that the
compiled operators use (uint8, the layout of csrc/core/view.h, the same for all instruction sets), every vector as
float32, each at a multiple of 64 bytes. What the bytes mean, and a checksum of each tensor, stand in the header's
metadata.

Order of the data: decoder, multi-token-prediction layer, vision tower, so that each part is one range of the file. It
is written in whole huge pages: Linux then keeps it in huge pages in its file cache (ext4 from 6.16 on, XFS for longer),
and a mapping of it is read as fast as memory of one's own."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, CheckpointError
from ..fileio import read_at
from ..model.config import ModelConfig
from ..model.weights import Array, Weight
from ..ops.quantise import CHECKSUM_BYTES, ROWS, block_bytes
from .checkpoint import CheckpointFile, Tensor
from .names import PATCH, TensorSpec, expected_tensors
from .packer import in_part
from .precision import FORMATS, ROUNDED, Precision
from .source import Transform, progress_bar

PACKED_FILE = "deltaic.safetensors"
FORMAT_VERSION = "2"
ALIGNMENT = 64

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
_HUGE_PAGE = 2 << 20
_WRITE_BYTES = 4 * _HUGE_PAGE
_COPY_BYTES, _COPY_THREADS = 32 << 20, 4
_PIECE_BYTES = 128 * CHECKSUM_BYTES  # that are read at a time to be checked
_METADATA = {"format_version", "layout", "precision", "matrices", "checksums", "source", "digest"}
LAYOUT = "blocks of 16 rows, scales first"


@dataclass(frozen=True, slots=True)
class Matrix:
    """What the bytes of a packed matrix are: `parts` are (format, rows) row blocks of `count` experts of `columns`."""

    count: int
    columns: int
    glu: bool
    parts: tuple[tuple[str, int], ...]


class PackedFile:
    """The packed weights of a folder, mapped read-only: shared with other processes and the system's file cache.

    Raises CheckpointError if the file is missing, damaged, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._file = CheckpointFile(Path(folder) / PACKED_FILE, _DTYPES)
        self.path = self._file.path
        self._copy: tuple[int, np.ndarray[Any, Any]] | None = None  # first byte of the range that was copied, its bytes
        try:
            self._read_metadata()
        except BaseException:
            self._file.close()
            raise

    def _read_metadata(self) -> None:
        metadata = self._file.metadata
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} is packed in format version {version}, this deltaic reads version {FORMAT_VERSION}; pack "
                f"the original checkpoint again with `deltaic quantize`"
            )
        if set(metadata) != _METADATA or metadata["digest"] != _digest(metadata, self._file.tensors):
            raise self._damaged("its header does not match the digest in it")
        if metadata["layout"] != LAYOUT:
            raise CheckpointError(f"{self.path} has the layout {metadata['layout']!r}, expected {LAYOUT!r}")
        # The digest matches, so the rest is what a writer of this version wrote; a forged file still must not crash.
        try:
            self.precision = Precision.from_json(metadata["precision"])
            self.matrices = {key: _parse_matrix(entry) for key, entry in json.loads(metadata["matrices"]).items()}
            self._checksums = {name: int(text, 16) for name, text in json.loads(metadata["checksums"]).items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its metadata cannot be read: {error}") from error
        expected = {part_name(key, i) for key, matrix in self.matrices.items() for i in range(len(matrix.parts))}
        self.vectors = {name for name, tensor in self._file.tensors.items() if tensor.dtype == "F32"}
        if expected | self.vectors != set(self._file.tensors) or set(self._checksums) != set(self._file.tensors):
            raise self._damaged("its metadata and its tensors do not belong together")
        for name, tensor in self._file.tensors.items():
            if (self._file.data_start + tensor.begin) % ALIGNMENT:
                raise self._damaged(f"tensor {name} is not aligned to {ALIGNMENT} bytes")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; pack the original checkpoint again")

    @property
    def has_mtp(self) -> bool:
        """Whether the file holds the multi-token-prediction layer."""
        return "mtp.fc" in self.matrices

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._file.size

    @property
    def fingerprint(self) -> str:
        """Which checkpoint this was packed from: see weights/streaming.py."""
        return self._file.metadata["source"]

    @property
    def digest(self) -> str:
        """SHA-256 over the header, which holds a checksum of every tensor."""
        return self._file.metadata["digest"]

    def source(self, config: ModelConfig, ops: Any, activations: str = "int8") -> PackedSource:
        """The weights for an op set."""
        return PackedSource(self, config, ops, activations)

    def check_keys(self, matrices: Sequence[str], vectors: Sequence[str]) -> None:
        """Raises CheckpointError unless the file holds exactly the weights that the configuration asks for."""
        missing = [key for key in (*matrices, *vectors) if key not in self.matrices and key not in self.vectors]
        extra = [key for key in (*self.matrices, *self.vectors) if key not in {*matrices, *vectors}]
        if missing or extra:
            problem = f"{missing[0]} is missing" if missing else f"{extra[0]} is unexpected"
            raise CheckpointError(
                f"{self.path} does not fit config.json: {problem} ({len(missing)} missing, {len(extra)} unexpected); "
                f"was config.json changed since the folder was packed?"
            )

    def verify(self, ops: Any, prefixes: tuple[str, ...] | None, title: str, progress: bool | None) -> None:
        """Compare the checksums of the decoder (None) or of the part under `prefixes`: reads all its bytes.

        Raises CheckpointError with the first tensor that differs.
        """
        tensors = self._part(prefixes)
        if not tensors:
            return
        first, last = tensors[0], tensors[-1]
        if self._copy is None:
            self._file.read_ahead(first.begin, last.begin + last.nbytes - first.begin)
        with progress_bar("Checking " + title, sum(t.nbytes for t in tensors), progress) as bar:
            for tensor in tensors:
                if ops.checksum(self._padded_bytes(tensor)) != self._checksums[tensor.name]:
                    raise self._damaged(f"the bytes of {tensor.name} do not match their checksum")
                if bar is not None:
                    bar.update(tensor.nbytes)

    def copy(self, prefixes: tuple[str, ...] | None) -> None:
        """Copy a part (None: the decoder) into memory of its own, in huge pages where the system has them.

        Raises CheckpointError if there is not enough memory, or the file cannot be read.
        """
        from concurrent.futures import ThreadPoolExecutor  # takes milliseconds, and most loads do without

        tensors = self._part(prefixes)
        if not tensors:
            return
        first, last = tensors[0].begin, tensors[-1].begin + tensors[-1].nbytes
        try:
            size = -(-(last - first) // _HUGE_PAGE) * _HUGE_PAGE
            if hasattr(mmap, "MADV_HUGEPAGE"):
                arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                arena.madvise(mmap.MADV_HUGEPAGE)
            else:
                arena = mmap.mmap(-1, size)
            target, offset = memoryview(arena)[: last - first], self._file.data_start + first
            with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(_COPY_THREADS) as pool:

                def fill(at: int) -> bool:
                    piece = target[at : at + _COPY_BYTES]
                    return read_at(file, offset + at, piece) == len(piece)

                # one thread waits for the pages that it fills
                if not all(pool.map(fill, range(0, last - first, _COPY_BYTES))):
                    raise self._damaged("it ends early")
        except (OSError, ValueError) as error:  # ValueError: mmap beyond the address space
            raise CheckpointError(f"{self.path} cannot be copied into memory: {error}") from error
        self._copy = first, np.frombuffer(arena, np.uint8, last - first)

    def _part(self, prefixes: tuple[str, ...] | None) -> list[Tensor]:
        chosen = [tensor for name, tensor in self._file.tensors.items() if in_part(name, prefixes)]
        return sorted(chosen, key=lambda tensor: tensor.begin)

    def _padded_bytes(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        if self._copy is not None:
            first, data = self._copy
            if first <= tensor.begin and tensor.begin + tensor.nbytes <= first + len(data):
                return data[tensor.begin - first : tensor.begin - first + tensor.nbytes]
        return self._file.view(tensor, ahead=False).view(np.uint8).reshape(-1)

    def bytes_of(self, name: str, nbytes: int) -> np.ndarray[Any, Any]:
        """The first `nbytes` bytes of a tensor (the rest pads it), read-only.

        Raises CheckpointError if it has fewer, or more than its padding.
        """
        tensor = self._file.tensors[name]
        if tensor.nbytes != padded(nbytes):
            raise self._damaged(f"tensor {name} has {tensor.nbytes} bytes, expected {padded(nbytes)}")
        return self._padded_bytes(tensor)[:nbytes]

    def close(self) -> None:
        """Close the file. The mapping goes away with the last weight on it."""
        self._file.close()

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PackedSource:
    """A packed file as a `Source` (weights/source.py): views of its bytes, checked against the configuration."""

    def __init__(self, file: PackedFile, config: ModelConfig, ops: Any, activations: str):
        self.where = str(file.path)
        self.has_mtp = file.has_mtp
        self._file, self._ops = file, ops
        self._float_activations = activations == "float32"
        found = {"mtp.fc.weight"} if file.has_mtp else {"norm.weight"}
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in expected_tensors(config, found).values()}

    @contextmanager
    def progress_bar(self, title: str, prefixes: tuple[str, ...] | None, progress: bool | None) -> Iterator[None]:
        """Nothing is packed, so there is nothing to show."""
        yield

    def matrix(self, key: str, names: Sequence[str] | None = None) -> Weight:
        shapes = [self._specs[name].shape for name in names or [key + ".weight"]]
        return self._weight(key, shapes, glu=False)

    def glu(self, key: str, prefix: str) -> Weight:
        return self._weight(key, [self._specs[prefix + "gate_proj.weight"].shape], glu=True)

    def experts(self, prefix: str, count: int) -> tuple[Weight, Weight]:
        E, rows, columns = self._specs[prefix + "gate_up_proj"].shape
        gate_up = self._weight(prefix + "gate_up_proj", [(E, rows // 2, columns)], glu=True)
        return gate_up, self.matrix(prefix + "down_proj", [prefix + "down_proj"])

    def affine(self, key: str, transform: Transform | None = None) -> tuple[Weight, Array]:
        spec = self._specs[key + ".weight"]
        shape = spec.shape
        if spec.role == PATCH:  # summed over the frames
            shape = (shape[0], shape[1] * shape[3] * shape[4])
        return self._weight(key, [shape], glu=False), self.vector(key + ".bias")

    def vector(self, name: str, transform: Transform | None = None) -> Array:
        shape = self._specs[name].shape
        if transform is not None:
            shape = transform(np.empty(shape, np.float32)).shape
        if name not in self._file.vectors:
            raise CheckpointError(f"{self.where} lacks the vector {name}")
        size = int(np.prod(shape))
        data = self._file.bytes_of(name, 4 * size)
        array: Array = data.view(np.float32).reshape(shape)
        return array

    def check_tied_head(self) -> None:
        """Was checked when the folder was packed."""

    def _weight(self, key: str, shapes: Sequence[tuple[int, ...]], *, glu: bool) -> Weight:
        """The matrix `key`, whose parts have `shapes` [N_i, K] or [E, N_i, K]."""
        matrix = self._file.matrices.get(key)
        count, columns = (shapes[0][0] if len(shapes[0]) == 3 else 1), shapes[0][-1]
        wanted = Matrix(count, columns, glu, tuple(("", shape[-2]) for shape in shapes))
        if matrix is None or _shape(matrix) != _shape(wanted):
            found = "nothing" if matrix is None else str(_shape(matrix))
            raise CheckpointError(
                f"{self.where}: matrix {key} is {found}, config.json asks for {_shape(wanted)} (experts, columns, glu, "
                f"rows); was config.json changed since the folder was packed?"
            )
        parts = []
        for i, (dtype, rows) in enumerate(matrix.parts):
            blocks = count * -(-rows // ROWS) * (2 if glu else 1)
            data = self._file.bytes_of(part_name(key, i), blocks * block_bytes(dtype, columns))
            parts.append((dtype, rows, data))
        weight = self._ops.from_packed(parts, count, columns, glu)
        if self._float_activations and any(dtype in ROUNDED for dtype, _ in matrix.parts):
            weight.float_activations = True
        result: Weight = weight
        return result


def part_name(key: str, part: int) -> str:
    """Name of the tensor that holds one part of a matrix."""
    return f"{key}/{part}"


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _shape(matrix: Matrix) -> tuple[Any, ...]:
    return matrix.count, matrix.columns, matrix.glu, tuple(rows for _, rows in matrix.parts)


def _parse_matrix(entry: Any) -> Matrix:
    count, columns, glu, parts = entry["count"], entry["columns"], entry["glu"], entry["parts"]
    sizes = [count, columns, *(rows for _, rows in parts)]
    formats = [dtype for dtype, _ in parts]
    if not all(type(n) is int and 0 < n < 1 << 40 for n in sizes) or not all(name in FORMATS for name in formats):
        raise ArgumentError(f"expected sizes and formats, found {entry}")
    if type(glu) is not bool or not 0 < len(parts) <= 8 or (glu and len(parts) != 1):
        raise ArgumentError(f"expected glu and 1 to 8 parts, found {entry}")
    return Matrix(count, columns, glu, tuple((dtype, rows) for dtype, rows in parts))


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    entries = {name: [t.dtype, list(t.shape), t.begin, t.nbytes] for name, t in tensors.items()}
    facts = {name: value for name, value in metadata.items() if name != "digest"}
    return hashlib.sha256(json.dumps([facts, entries], sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


class PackedWriter:
    """Writes a packed file from front to back: tensors first, `finish` puts the header into the room left for it.

    keys: upper bound of the number of matrices and vectors, for that room.
    """

    def __init__(self, path: Path, keys: int):
        self._path = path
        self._data_start = -(-(16384 + 2048 * keys) // 4096) * 4096
        self._out = path.open("wb", buffering=0)
        self._out.seek(self._data_start)
        self._waiting = bytearray()  # not written yet
        self._tensors: dict[str, Tensor] = {}
        self._matrices: dict[str, Any] = {}
        self._open: tuple[str, int] | None = None
        self._position = 0

    def begin(self, name: str) -> None:
        """Start a tensor of bytes; `write` follows."""
        self._open = name, self._position

    def write(self, data: np.ndarray[Any, Any]) -> None:
        """Append bytes to the tensor that was begun."""
        self._append(data.reshape(-1).view(np.uint8).data)

    def end(self, dtype: str = "U8") -> None:
        """Finish the tensor: pad it to the alignment."""
        assert self._open is not None
        name, begin = self._open
        self._append(b"\0" * (padded(self._position) - self._position))
        nbytes = self._position - begin
        shape = (nbytes // _DTYPES[dtype].itemsize,)
        self._tensors[name] = Tensor(name, dtype, shape, begin, nbytes, None)  # type: ignore[arg-type]
        self._open = None

    def _append(self, data: bytes | memoryview) -> None:
        self._waiting += data
        self._position += len(data)
        written = self._data_start + self._position - len(self._waiting)
        # up to a border of huge pages in the file, as many as there are
        whole = (self._data_start + self._position) // _HUGE_PAGE * _HUGE_PAGE - written
        if whole >= _WRITE_BYTES:
            self._write_out(whole)

    def _write_out(self, count: int) -> None:
        with memoryview(self._waiting) as waiting:
            done = 0
            while done < count:  # the system may take a part only
                done += self._out.write(waiting[done:count])
        del self._waiting[:count]

    def vector(self, name: str, array: Array) -> None:
        """A float32 array, flat and padded: its shape follows from the configuration."""
        self.begin(name)
        self.write(np.ascontiguousarray(array))
        self.end("F32")

    def describe(self, key: str, count: int, columns: int, glu: bool, parts: Sequence[tuple[str, int]]) -> None:
        """What the parts of a matrix, written as tensors `part_name(key, i)`, are."""
        self._matrices[key] = {"count": count, "columns": columns, "glu": glu, "parts": [list(part) for part in parts]}

    def finish(self, precision: Precision, fingerprint: str, ops: Any) -> None:
        """Checksum what was written, write the header, and wait until all is on the disk."""
        self._write_out(len(self._waiting))
        checksums = {}
        with self._path.open("rb") as written:
            for name, tensor in self._tensors.items():
                written.seek(self._data_start + tensor.begin)
                total = 0
                for start in range(0, tensor.nbytes, _PIECE_BYTES):
                    piece = np.fromfile(written, np.uint8, min(_PIECE_BYTES, tensor.nbytes - start))
                    total += ops.checksum(piece, start // CHECKSUM_BYTES)
                checksums[name] = f"{total % (1 << 64):016x}"
        metadata = {
            "format_version": FORMAT_VERSION,
            "layout": LAYOUT,
            "precision": precision.to_json(),
            "matrices": json.dumps(self._matrices, separators=(",", ":")),
            "checksums": json.dumps(checksums, separators=(",", ":")),
            "source": fingerprint,
        }
        metadata["digest"] = _digest(metadata, self._tensors)
        header: dict[str, Any] = {"__metadata__": metadata}
        for name, tensor in self._tensors.items():
            offsets = [tensor.begin, tensor.begin + tensor.nbytes]
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        raw = json.dumps(header, separators=(",", ":")).encode()
        room = self._data_start - 8
        if len(raw) > room:
            raise CheckpointError(f"{self._path}: the header has {len(raw)} bytes, {room} were set aside")
        self._out.seek(0)
        self._waiting += room.to_bytes(8, "little") + raw.ljust(room)
        self._write_out(len(self._waiting))
        os.fsync(self._out.fileno())
        self._out.close()

    def abandon(self) -> None:
        """Close the file, unfinished."""
        self._out.close()
