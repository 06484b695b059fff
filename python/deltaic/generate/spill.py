"""Where do checkpoints go that have no room in memory? Into files of a folder, which may outlive the process."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ..errors import StateError
from ..model.state import State
from ..model.state_file import load_state, save_state
from .cache import Checkpoint
from .prefix import PrefixDigest, sequence_keys

SUFFIX = ".deltaic-state"


class SpillFolder:
    """Checkpoint files of one model: `folder`/<fingerprint>/<length>-<digest>.deltaic-state.

    budget: bytes that the files may take together; the least recently used are deleted. A file that is damaged, or that
    cannot be written or read, is as good as not there: it is a cache. Not for use from two threads at a time.
    """

    def __init__(self, folder: str | os.PathLike[str], blank: State, ops: ModuleType, budget: int | None) -> None:
        """blank: a state of the model, which tells whose files to use. budget None: a quarter of what is free on
        the disk, files of earlier processes included. Raises StateError without a usable folder."""
        self.folder = Path(folder) / blank.fingerprint[:16]
        self._blank = blank
        self._ops = ops
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [(path.stat().st_mtime_ns, path.name, path.stat().st_size) for path in self._files()]
        except (OSError, ValueError) as error:
            raise StateError(f"cache_folder: {folder} cannot be used: {getattr(error, 'strerror', error)}") from error
        self._sizes = {name: size for _, name, size in sorted(names)}  # least recently used first
        self.budget = budget if budget is not None else (shutil.disk_usage(self.folder).free + self.nbytes) // 4

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"*-*{SUFFIX}")

    @staticmethod
    def _name(length: int, digest: bytes) -> str:
        return f"{length}-{digest.hex()}{SUFFIX}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def lengths(self) -> set[int]:
        """Lengths of the sequences in the folder."""
        return {int(head) for head in (name.split("-")[0] for name in self._sizes) if head.isdigit()}

    def has(self, length: int, digest: bytes) -> bool:
        """Whether there is a file for a sequence of `length` keys with this digest."""
        return self._name(length, digest) in self._sizes

    def put(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint unless it is there already or the disk refuses it."""
        name = self._name(checkpoint.length, checkpoint.digest)
        if name in self._sizes or checkpoint.state.nbytes > self.budget:
            return
        facts = {"generated": str(int(checkpoint.generated))}
        try:
            save_state(
                checkpoint.state,
                self.folder / name,
                metadata=facts,
                arrays={"hidden": checkpoint.host_hidden()},
                durable=False,  # the checksum tells a file that a power cut left incomplete
            )
            self._sizes[name] = (self.folder / name).stat().st_size
        except (StateError, OSError):
            return
        while self.nbytes > self.budget:
            self._delete(next(iter(self._sizes)))

    def get(self, length: int, digest: bytes, keys: npt.NDArray[np.int64]) -> Checkpoint | None:
        """The checkpoint of the first `length` of `keys`; None, and the file deleted, if it is not that."""
        name = self._name(length, digest)
        try:
            state, metadata, arrays = load_state(self.folder / name, self._ops)
        except StateError:
            self._delete(name)
            return None
        found = sequence_keys(np.array(state.token_ids, np.int64), state.images)
        hidden, generated = arrays.get("hidden"), metadata.get("generated")
        of_this_model = state.fingerprint == self._blank.fingerprint and self._blank.fits(state)
        if not of_this_model or hidden is None or generated is None or PrefixDigest(found)(len(found)) != digest:
            self._delete(name)
            return None
        self._sizes[name] = self._sizes.pop(name)  # used last
        with contextlib.suppress(OSError):  # read-only, or deleted by another process: the order in memory holds
            os.utime(self.folder / name)
        state._max_tokens = self._blank._max_tokens
        return Checkpoint(keys[:length].copy(), digest, state, hidden, generated == "1")

    def _delete(self, name: str) -> None:
        self._sizes.pop(name, None)
        with contextlib.suppress(OSError):  # deleted by another process, or not ours to delete
            (self.folder / name).unlink()
