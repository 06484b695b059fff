"""How does a state lie in a file? As a safetensors file: tensors written straight from the state's own arrays, and a
checksum as the last tensor.

    conv, delta  F32        token_ids  I64 [n]       kv.0, kv.1, ...  F32 or BF16, the K/V blocks as they are
    mtp.0, ...   the same for the MTP layer, where the state has entries of it
    checksum     U8 [32]    further tensors and metadata belong to whoever asked for them (sessions, cache)

`__metadata__` holds format, version, fingerprint, kv_dtype, length, rope_delta, mtp (first, length), context, images.
The checksum covers every byte before it: SHA-256 of the header and of one 64-bit sum per 256 KiB of a tensor's data,
words weighted by odd numbers modulo 2^64 (no change of a single word goes unseen; the sums run at memory speed where
SHA-256 would not).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import StateError
from ..fileio import read_at
from ..ops import memory
from ..ops.layout import KV_DTYPES
from .state import BLOCK_TOKENS, State, check_kv_dtype, host_array

FORMAT, VERSION = "deltaic-state", "1"
CHECKSUM = "checksum"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(np.uint16), "I64": np.dtype(np.int64), "U8": np.dtype(np.uint8),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_RANK, _MAX_TOKENS = 8, 1 << 40
_SUM_BYTES = 1 << 18  # a piece's weights and words stay in the second-level cache
_READERS = 2  # threads that read a file
_WEIGHTS = (np.arange(_SUM_BYTES // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)

Arrays = dict[str, npt.NDArray[Any]]


# ------------------------------------------------------------------------------------------------------------- a state


def save_state(
    state: State,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    durable: bool = True,
) -> None:
    """Write `state` to `path`, with further strings and arrays that `load_state` gives back (names must not clash).

    durable: wait until the disk has it. Raises StateError; a file that was at `path` is then as it was.
    """
    state.check_intact("save")
    used = -(-state.length // BLOCK_TOKENS)
    contents: Arrays = {"conv": host_array(state.conv), "delta": host_array(state.delta)}
    contents["token_ids"] = np.array(state.token_ids, np.int64)
    contents.update((f"kv.{i}", host_array(block)) for i, block in enumerate(state.kv.blocks[:used]))
    used = -(-state.mtp_length // BLOCK_TOKENS)
    contents.update((f"mtp.{i}", host_array(block)) for i, block in enumerate(state.mtp.blocks[:used]))
    contents.update((name, host_array(array)) for name, array in (arrays or {}).items())
    facts = {
        "fingerprint": state.fingerprint,
        "kv_dtype": state.kv_dtype,
        "kv_block": json.dumps(state._block),
        "length": str(state.length),
        "rope_delta": str(state.rope_delta),
        "mtp": json.dumps([state.mtp_first, state.mtp_length]),
        "context": str(state._max_tokens),
        "images": json.dumps(state.images),
    }
    write_arrays(path, {**facts, **(metadata or {})}, contents, durable=durable)


def load_state(path: str | os.PathLike[str], ops: ModuleType | None = None) -> tuple[State, dict[str, str], Arrays]:
    """The state in the file `path`, all metadata, and the arrays that are not the state's. Raises StateError."""
    metadata, arrays = read_arrays(path)
    try:
        state = _assemble(metadata, arrays, ops or _default_ops())
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: not a usable state: {error!r}"[:300]) from error
    except MemoryError as error:
        raise StateError(f"{path}: no memory on the device: {error}") from None
    return state, metadata, arrays


def _default_ops() -> ModuleType:
    try:
        from ..ops import cpu
    except ImportError:  # built without the extension
        from ..ops import reference

        return reference
    return cpu


def _assemble(metadata: dict[str, str], arrays: Arrays, ops: ModuleType) -> State:
    """Take the state's tensors out of `arrays`. Raises KeyError, TypeError or ValueError where they do not fit."""
    move = getattr(ops, "from_host", None) or (lambda array: array)
    state = object.__new__(State)
    state._start(arrays.pop("conv"), arrays.pop("delta"), ops.BlockTable)
    state._zeros = getattr(ops, "zeros", np.zeros)
    ids = arrays.pop("token_ids")
    block, length = tuple(json.loads(metadata["kv_block"])), int(metadata["length"])
    state.kv_dtype, state.fingerprint = metadata["kv_dtype"], metadata["fingerprint"]
    dtype = KV_DTYPES[state.kv_dtype]
    check_kv_dtype(state.kv_dtype, ops)
    state.length, state.rope_delta = length, int(metadata["rope_delta"])
    state._max_tokens, state._block, state._mtp_block = int(metadata["context"]), block, (1, *block[1:])
    state.images = [(int(first), int(count), str(digest)) for first, count, digest in json.loads(metadata["images"])]
    kinds = [(array.ndim, array.dtype) for array in (state.conv, state.delta, ids)]
    if kinds != [(3, np.float32), (4, np.float32), (1, np.int64)] or len(state.conv) != len(state.delta):
        raise ValueError("conv, delta or token_ids have a wrong shape")
    if not 0 <= length <= _MAX_TOKENS or len(ids) > length or length > state._max_tokens:
        raise ValueError(f"length {length} does not fit {len(ids)} token ids and a context of {state._max_tokens}")
    state.token_ids = ids.tolist()
    for i in range(-(-length // BLOCK_TOKENS)):
        kv = arrays.pop(f"kv.{i}")
        if kv.shape != block or kv.dtype != dtype or block[1:4:2] != (2, BLOCK_TOKENS):
            raise ValueError(f"kv.{i} is {kv.dtype}{kv.shape}, expected {state.kv_dtype} {block}")
        state.kv.append(move(kv))
    state.mtp_first, state.mtp_length = (int(n) for n in json.loads(metadata.get("mtp", "[0, 0]")))
    if not 0 <= state.mtp_first <= state.mtp_first + state.mtp_length <= length:
        raise ValueError(f"entries {state.mtp_first} + {state.mtp_length} of the MTP layer, {length} tokens")
    for i in range(-(-state.mtp_length // BLOCK_TOKENS)):
        kv = arrays.pop(f"mtp.{i}")
        if kv.shape != state._mtp_block or kv.dtype != dtype:
            raise ValueError(f"mtp.{i} is {kv.dtype}{kv.shape}, expected {state.kv_dtype} {state._mtp_block}")
        state.mtp.append(move(kv))
    state.conv, state.delta = move(state.conv), move(state.delta)
    return state


# --------------------------------------------------------------------------------------------------- arrays in a file


def write_arrays(
    path: str | os.PathLike[str], metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]], *, durable: bool
) -> None:
    """Write a file of this module: complete or not at all, over a temporary file in the same folder."""
    path = _path(path)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **metadata}}
    end = 0
    for name, array in arrays.items():
        header[name] = _entry(_NAMES[array.dtype], array.shape, end, end + array.nbytes)
        end += array.nbytes
    header[CHECKSUM] = _entry("U8", (32,), end, end + 32)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    try:
        with _replacing(path, durable) as file, ThreadPoolExecutor(1) as beside:
            _write(file, memoryview(raw))
            sums = []
            for array in arrays.values():
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                sums.append(_beside(beside, _sums, data))
                _write(file, data.data)
            _write(file, memoryview(_digest(raw, sums)))
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise StateError(f"{path} cannot be written: {reason}; nothing was changed") from error


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, str], Arrays]:
    """(metadata, arrays) of a file of `write_arrays`. Raises StateError if anything about it is wrong."""
    path = _path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise StateError(f"{path} is not a regular file; expected a state file")
        with path.open("rb", buffering=0) as file:
            return _read_arrays(file, path)
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise StateError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except MemoryError:
        raise StateError(f"{path}: no memory for its {path.stat().st_size / 2**20:.0f} MiB") from None


def _read_arrays(file: Any, path: Path) -> tuple[dict[str, str], Arrays]:
    size = os.fstat(file.fileno()).st_size
    prefix = bytearray(8)
    length = int.from_bytes(prefix, "little") if read_at(file, 0, memoryview(prefix)) == 8 else -1
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise StateError(f"{path} is not a state file of deltaic, or was cut off ({size} bytes)")
    raw = bytearray(length)
    read_at(file, 8, memoryview(raw))
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__")
        known = (metadata["format"], metadata["version"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StateError(f"{path} is not a state file of deltaic: its header cannot be read") from None
    if known != (FORMAT, VERSION) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateError(f"{path}: expected {FORMAT} version {VERSION}, found {str(known)[:80]}")
    shapes, end = _layout(header, path)
    if end != size - 8 - length:
        raise StateError(
            f"{path} was cut off or has grown: it holds {size - 8 - length} bytes of data, its header says {end}"
        )
    arrays: Arrays = {}
    position = 8 + length
    with ThreadPoolExecutor(_READERS) as readers:  # most of the time goes into making new memory usable
        sums = []
        for name, (dtype, shape) in shapes.items():
            arrays[name] = array = memory.empty(shape, dtype)
            data = array.reshape(-1).view(np.uint8)
            sums.append(_beside(readers, _read_and_sum, file, path, position, data))
            position += len(data)
        digest = _digest(bytes(prefix) + raw, sums[:-1])
        sums[-1].result()
    if arrays.pop(CHECKSUM).tobytes() != digest:
        raise StateError(f"{path} was altered or damaged: its contents do not match its checksum; it cannot be used")
    return metadata, arrays


def _layout(header: Any, path: Path) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...]]], int]:
    """dtype and shape of each tensor in file order, and the bytes of all. They follow each other without a gap."""
    shapes, position = {}, 0
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sizes_fit = len(shape) <= _MAX_RANK and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            if not sizes_fit or begin != position or end != position + math.prod(shape) * dtype.itemsize:
                raise ValueError(entry)
        except (KeyError, TypeError, ValueError):
            raise StateError(f"{path}: tensor {name[:80]!r} is not described as a state file has it") from None
        shapes[name], position = (dtype, tuple(shape)), end
    if next(reversed(shapes), None) != CHECKSUM or shapes[CHECKSUM] != (_DTYPES["U8"], (32,)):
        raise StateError(f"{path}: the checksum is missing; not a state file of deltaic")
    return shapes, position


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _digest(header: bytes, sums: Iterable[Future[bytes]]) -> bytes:
    """What the last tensor holds. The sums are made by another thread, while this one reads or writes."""
    digest = hashlib.sha256(header)
    for part in sums:
        digest.update(part.result())
    return digest.digest()


def _beside(threads: ThreadPoolExecutor, function: Callable[..., bytes], *arguments: Any) -> Future[bytes]:
    try:
        return threads.submit(function, *arguments)
    except RuntimeError:  # while the interpreter ends (the cache is flushed then) there are no new threads
        done: Future[bytes] = Future()
        done.set_result(function(*arguments))
        return done


def _sums(data: npt.NDArray[np.uint8]) -> bytes:
    """The sums of all pieces of `_SUM_BYTES`."""
    return b"".join(_sum(data[start : start + _SUM_BYTES]) for start in range(0, len(data), _SUM_BYTES))


def _sum(piece: npt.NDArray[np.uint8]) -> bytes:
    """Weighted sum modulo 2^64 of a piece's 64-bit little-endian words, the last one padded with zeros."""
    if len(piece) % 8:
        piece = np.concatenate([piece, np.zeros(-len(piece) % 8, np.uint8)])
    words = piece.view("<u8")
    return int(np.dot(words, _WEIGHTS[: len(words)])).to_bytes(8, "little")


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read_and_sum(file: Any, path: Path, position: int, data: npt.NDArray[np.uint8]) -> bytes:
    """Fill `data` from `position` of the file on; its sums."""
    if read_at(file, position, data.data) != len(data):
        raise StateError(f"{path} was cut off while it was read")
    return _sums(data)


@contextlib.contextmanager
def _replacing(path: Path, durable: bool) -> Iterator[BinaryIO]:
    """An unbuffered file that takes the place of `path` at the end, or vanishes if an exception ends the block."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", buffering=0) as file:
            yield file  # type: ignore[misc]
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise
    if durable and os.name == "posix":  # the new name is durable when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise StateError(f"path: expected a str or a path, found {type(path).__name__}") from None
