"""Which tensors are in these files? Reads the headers of one safetensors file or of all shards of an index, checks them
completely before a single number is touched, and hands out tensors as lazy read-only views of the mapped files. Knows
nothing about models.

File format: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets), data."""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_INDEX_BYTES = 256 << 20
_MAX_RANK = 8
_MAX_DIMENSION = 1 << 48


class CheckpointFile:
    """One memory-mapped safetensors file, its header checked: `tensors` by name, `metadata`, and `size` in bytes.

    dtypes: what its tensors may be; None: BF16, F16, F32. Raises CheckpointError on construction if the file cannot be
    read or its header is not exactly right.
    """

    def __init__(self, path: Path, dtypes: dict[str, np.dtype[Any]] | None = None):
        self.path = path
        self.dtypes = _float_dtypes() if dtypes is None else dtypes
        self._handle = _open_regular(path)
        try:
            self.size = os.fstat(self._handle.fileno()).st_size
            header_bytes = self._read_header()
            self.data_start = 8 + len(header_bytes)
            self.tensors, self.metadata = _parse_header(header_bytes, self, self.size - self.data_start)
            self._map = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux reads what is not in its cache in huge pages then
                self._map.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            self._handle.close()
            raise CheckpointError(f"{path} cannot be mapped: {error}") from error
        except BaseException:
            self._handle.close()
            raise

    def _read_header(self) -> bytes:
        prefix = self._handle.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path} has {self.size} bytes; a safetensors file has at least 8 (is the download complete?)"
            )
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER_BYTES or length > self.size - 8:
            raise CheckpointError(
                f"{self.path}: the header claims {length} bytes; the file has {self.size} and a header at most "
                f"{_MAX_HEADER_BYTES} (truncated, or not a safetensors file?)"
            )
        header = self._handle.read(length)
        if len(header) != length:
            raise CheckpointError(f"{self.path}: the header ends after {len(header)} of {length} bytes")
        return header

    def view(self, tensor: Tensor, *, ahead: bool = True) -> np.ndarray[Any, Any]:
        """The bytes of `tensor` as a read-only array over the mapping (a copy where the file misaligns them).

        `ahead`: tell the system that they will be read soon.
        """
        # A read past the end of a mapped file that shrank kills the process (SIGBUS), so look before every tensor.
        size = self._map.size()
        if size < self.size:
            raise CheckpointError(f"{self.path} shrank from {self.size} to {size} bytes while it was being read")
        dtype = self.dtypes[tensor.dtype]
        start = self.data_start + tensor.begin
        if ahead:
            self.read_ahead(tensor.begin, tensor.nbytes)
        flat = np.frombuffer(self._map, dtype=dtype, count=math.prod(tensor.shape), offset=start)
        array = flat.reshape(tensor.shape)
        if start % dtype.itemsize:
            array = array.copy()
            array.flags.writeable = False
        return array

    def read_ahead(self, begin: int, nbytes: int) -> None:
        """Tell the system that these bytes of the data will be read soon."""
        if hasattr(mmap, "MADV_WILLNEED") and nbytes:  # absent on Windows
            start = self.data_start + begin
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + nbytes - page)

    def release(self) -> None:
        """Give all mapped pages back to the system; a later read finds them again in the file.

        The whole file, because a page fault also maps the pages around it, which may belong to tensors already done.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file. Views of it stay valid, and more can be made; the mapping goes away with the last of them."""
        self._handle.close()


def _float_dtypes() -> dict[str, np.dtype[Any]]:
    import ml_dtypes  # takes milliseconds, and a packed folder does without

    return {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F16": np.dtype(np.float16),
        "F32": np.dtype(np.float32),
    }


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: what the header says, and the way to the numbers. `begin` counts from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    file: CheckpointFile

    def read(self) -> np.ndarray[Any, Any]:
        """A read-only array (bfloat16, float16 or float32) over the mapped file.

        Raises CheckpointError if the file became shorter since it was opened.
        """
        return self.file.view(self)


class Checkpoint:
    """All tensors of a folder by name, and `source`: the file that says which tensors there are (for messages)."""

    def __init__(self, source: Path, tensors: dict[str, Tensor], files: list[CheckpointFile]):
        self.source = source
        self.tensors = tensors
        self.files = files

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open `folder`/model.safetensors, or the shards named by `folder`/model.safetensors.index.json.

    Raises CheckpointError if the files are missing, truncated, malformed, contradictory, or hold other dtypes than
    BF16, F16 and F32.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; expected a folder with {SINGLE_FILE} or {INDEX_FILE}")
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if os.path.lexists(single):
        file = CheckpointFile(single)
        return Checkpoint(single, file.tensors, [file])
    if os.path.lexists(index):
        return _open_shards(folder, index)
    raise CheckpointError(_describe_absence(folder))


def _describe_absence(folder: Path) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}), which deltaic does not read because loading them can run "
            f"code; convert them, for example with transformers: save_pretrained(..., safe_serialization=True)"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"found {', '.join(others[:5])}" if others else "found no weight file"
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; {found} (is the download complete?)"


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    weight_map = _read_weight_map(index)
    files: dict[str, CheckpointFile] = {}
    try:
        for file_name in sorted(set(weight_map.values())):
            path = folder / file_name
            if not os.path.exists(path):
                wanted = [name for name, shard in weight_map.items() if shard == file_name]
                raise CheckpointError(
                    f"{index}: the shard {file_name} is missing; it should hold {len(wanted)} tensors, among them "
                    f"{wanted[0]} (is the download complete?)"
                )
            files[file_name] = CheckpointFile(path)
        tensors: dict[str, Tensor] = {}
        for name, file_name in weight_map.items():
            if name not in files[file_name].tensors:
                raise CheckpointError(f"{index}: tensor {_show(name)} should be in {file_name}, which does not hold it")
            tensors[name] = files[file_name].tensors[name]
        for file_name, file in files.items():
            for name in file.tensors:
                if weight_map.get(name) != file_name:
                    said = f"says it is in {weight_map[name]}" if name in weight_map else "does not list it"
                    raise CheckpointError(f"{file.path} holds tensor {_show(name)}, but {index.name} {said}")
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return Checkpoint(index, tensors, list(files.values()))


def _read_weight_map(index: Path) -> dict[str, str]:
    with _open_regular(index) as handle:
        raw = handle.read(_MAX_INDEX_BYTES + 1)
    if len(raw) > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{index} is larger than {_MAX_INDEX_BYTES} bytes; that is not a shard index")
    content = _parse_json(raw, str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected an object that maps tensor names to shard files")
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and file_name.endswith(".safetensors") and "\0" not in file_name
        if not plain or any(mark in file_name for mark in "/\\:"):
            raise CheckpointError(
                f"{index}: tensor {_show(name)} is said to be in {_show(file_name)}; expected the plain name of a "
                f".safetensors file beside the index"
            )
    return weight_map


def _open_regular(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise CheckpointError(f"{path} is not a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parse_json(raw: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where} holds the key {_show(twice)} twice")
        return entries

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except ValueError as error:  # also a number with too many digits, and text that is not UTF-8
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{where} is not usable JSON: it is nested too deeply") from None


def _parse_header(raw: bytes, file: CheckpointFile, data_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Header JSON -> tensors, metadata. Tensors must fill the data exactly: no overlap, no hole, no remainder."""
    where = f"{file.path}: header"
    entries = _parse_json(raw, where)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is {_show(metadata)}; expected an object of strings")
    tensors = {name: _parse_entry(name, entry, file, data_bytes) for name, entry in entries.items()}
    position, previous = 0, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != position:
            kind = "overlaps" if tensor.begin < position else "leaves a hole after"
            raise CheckpointError(
                f"{file.path}: tensor {_show(tensor.name)} {kind} {previous}: it begins at byte {tensor.begin} of the "
                f"data, expected {position}"
            )
        position, previous = position + tensor.nbytes, _show(tensor.name)
    if position != data_bytes:
        raise CheckpointError(
            f"{file.path}: the tensors take {position} bytes, the file holds {data_bytes} after the header"
        )
    return tensors, metadata


def _parse_entry(name: str, entry: Any, file: CheckpointFile, data_bytes: int) -> Tensor:
    where = f"{file.path}: tensor {_show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is described by {_show(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in file.dtypes:
        raise CheckpointError(
            f"{where} has dtype {_show(dtype)}; expected {', '.join(sorted(file.dtypes))} (checkpoints that others "
            f"quantised are not supported yet)"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(n, _MAX_DIMENSION) for n in shape):
        raise CheckpointError(f"{where} has shape {_show(shape)}; expected a list of at most {_MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n, data_bytes) for n in offsets):
        raise CheckpointError(
            f"{where} has data_offsets {_show(offsets)}; expected [begin, end] within the {data_bytes} bytes of data "
            f"(is the file truncated?)"
        )
    begin, end = offsets
    expected = math.prod(shape) * file.dtypes[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where} has data_offsets {offsets}, {end - begin} bytes; its shape {shape} in {dtype} takes {expected}"
        )
    return Tensor(name, dtype, tuple(shape), begin, expected, file)


def _is_size(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _show(value: Any) -> str:
    """A value from a file, short enough for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
