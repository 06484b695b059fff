"""What has been read already? Checkpoints of sequence states, found again by their tokens and pictures, within one
budget of bytes; and what the vision tower saw in pictures."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..model.state import State, host_array
from .prefix import Ints, PrefixDigest, shared_length

if TYPE_CHECKING:
    from .spill import SpillFolder

_REMEMBERED = 4096  # checkpoints that were dropped and whose digest is kept, to say so when they are missed


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state that nobody feeds any more. keys int64 [length]; digest: of keys; hidden [1, H]: the residual stream
    after the last token, as the op set has it, or float32 from a file; generated: whether some of its tokens were
    sampled one by one, not read."""

    keys: Ints
    digest: bytes
    state: State
    hidden: npt.NDArray[np.float32]
    generated: bool

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.keys)

    def host_hidden(self) -> npt.NDArray[np.float32]:
        """`hidden` as float32 in the host's memory."""
        hidden = host_array(self.hidden)
        return (hidden.astype(np.uint32) << 16).view(np.float32) if hidden.dtype == np.uint16 else hidden

    def buffers(self) -> Iterator[npt.NDArray[Any]]:
        """Arrays that hold its memory; checkpoints of one prompt share their keys' base and K/V blocks."""
        yield from self.state.buffers()
        yield self.hidden
        yield self.keys if self.keys.base is None else self.keys.base


@dataclass(frozen=True, slots=True)
class Match:
    """What `PrefixCache.find` says of a prompt: where to go on (None: from the start), and why not later."""

    checkpoint: Checkpoint | None
    miss_reason: str | None


class PrefixCache:
    """Checkpoints by content, the least recently used dropped first. Usable from several threads.

    budget  bytes that all checkpoints may take together; what they share counts once. 0: nothing is kept
    spill   a folder that takes the checkpoints that are dropped, and gives them back
    """

    def __init__(self, budget: int, *, spill: SpillFolder | None = None) -> None:
        self.budget = budget
        self._spill = spill
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Checkpoint] = OrderedDict()  # least recently used first
        self._holders: dict[int, int] = {}  # id of a buffer -> checkpoints that hold it
        self._nbytes = 0
        self._dropped: OrderedDict[bytes, int] = OrderedDict()  # digest -> length
        self._pending: deque[Checkpoint] = deque()
        if spill is not None:
            atexit.register(_flush, weakref.ref(self))

    @property
    def nbytes(self) -> int:
        """Bytes that the checkpoints take together."""
        with self._lock:
            self._take_pending()
            return self._nbytes

    def __len__(self) -> int:
        with self._lock:
            self._take_pending()
            return len(self._entries)

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep `checkpoint`, dropping others where it needs their room; not if it is larger than the whole budget.

        Never waits: it may be called by the garbage collector while this very thread is in another method.
        """
        if self.budget <= 0:
            return
        self._pending.append(checkpoint)
        if self._lock.acquire(blocking=False):
            try:
                self._take_pending()
            finally:
                self._lock.release()

    def clear(self) -> None:
        """Drop everything from memory; a spill folder keeps its files."""
        with self._lock:
            self._take_pending()
            self._entries.clear()
            self._holders.clear()
            self._dropped.clear()
            self._nbytes = 0

    def flush(self) -> None:
        """Write what the spill folder does not have yet, for example before the process ends."""
        with self._lock:
            self._take_pending()
            if self._spill is not None:
                for checkpoint in self._entries.values():
                    self._spill.put(checkpoint)

    def find(self, keys: Ints, usable: Callable[[Checkpoint], bool], also: Sequence[Checkpoint] = ()) -> Match:
        """The longest checkpoint, of the cache or of `also`, that `keys` begin with and that is `usable`."""
        with self._lock:
            self._take_pending()
            held = {c.digest: c for c in also} | self._entries
            lengths = {c.length for c in held.values()} | set(self._dropped.values())
            if self._spill is not None:
                lengths |= self._spill.lengths()
            digest = PrefixDigest(keys)
            digests = [(n, digest(n)) for n in sorted(lengths) if 0 < n <= len(keys)]
            for n, key in reversed(digests):
                found = held.get(key)
                if found is None and self._spill is not None and self._spill.has(n, key):
                    found = self._spill.get(n, key, keys)
                    if found is not None:
                        self._insert(found)
                if found is not None and usable(found):
                    if key in self._entries:
                        self._entries.move_to_end(key)
                    return Match(found, self._reason(keys, n, digests, held))
            return Match(None, self._reason(keys, 0, digests, held))

    def _reason(
        self, keys: Ints, cached: int, digests: list[tuple[int, bytes]], held: dict[bytes, Checkpoint]
    ) -> str | None:
        """Why not more than `cached` of the prompt was found; None if nothing that was read before is read again."""
        if cached == len(keys):
            return None
        if self.budget <= 0 and not held:
            return "the cache is off (cache_bytes=0)"
        dropped = max((n for n, key in digests if key in self._dropped and n > cached), default=0)
        if dropped:
            return f"the checkpoint at token {dropped} was dropped to stay within cache_bytes"
        seen: dict[int, Ints] = {}  # the longest of the checkpoints that view the same keys
        for c in held.values():
            base = id(c.keys if c.keys.base is None else c.keys.base)
            if base not in seen or len(c.keys) > len(seen[base]):
                seen[base] = c.keys
        shared = max((shared_length(keys, other) for other in seen.values()), default=0)
        if shared <= cached:
            return None if cached else "no prompt that begins like this one has been read"
        place = f"the last checkpoint that can be used is at token {cached}" if cached else "there is no checkpoint"
        if shared == len(keys):
            return f"all of the prompt was read before, but {place}"
        return f"the prompt differs at token {shared} from what was read before, and up to there {place}"

    def _take_pending(self) -> None:
        while True:
            try:
                checkpoint = self._pending.popleft()
            except IndexError:
                return
            self._insert(checkpoint)

    def _insert(self, checkpoint: Checkpoint) -> None:
        old = self._entries.get(checkpoint.digest)
        if old is not None:
            self._entries.move_to_end(checkpoint.digest)
            if checkpoint.generated or not old.generated:
                return
            self._remove(old)  # one that was read is worth more: its bits are those of a cold read
        if sum(buffer.nbytes for buffer in checkpoint.buffers()) > self.budget:
            self._remember(checkpoint)
            return
        self._entries[checkpoint.digest] = checkpoint
        self._dropped.pop(checkpoint.digest, None)
        for buffer in checkpoint.buffers():
            holders = self._holders.get(id(buffer), 0)
            self._holders[id(buffer)] = holders + 1
            self._nbytes += 0 if holders else buffer.nbytes
        while self._nbytes > self.budget:
            oldest = next(iter(self._entries.values()))
            if self._spill is not None:
                self._spill.put(oldest)
            self._remove(oldest)
            self._remember(oldest)

    def _remove(self, checkpoint: Checkpoint) -> None:
        del self._entries[checkpoint.digest]
        for buffer in checkpoint.buffers():
            holders = self._holders[id(buffer)] - 1
            if holders:
                self._holders[id(buffer)] = holders
            else:
                del self._holders[id(buffer)]
                self._nbytes -= buffer.nbytes

    def _remember(self, checkpoint: Checkpoint) -> None:
        self._dropped[checkpoint.digest] = checkpoint.length
        if len(self._dropped) > _REMEMBERED:
            self._dropped.popitem(last=False)


def _flush(cache: weakref.ref[PrefixCache]) -> None:
    alive = cache()
    if alive is not None:
        alive.flush()


class FeatureCache:
    """What the vision tower saw in a picture, float32 [tokens, H], by the picture's digest; least recently used first
    out. Usable from several threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._lock = threading.Lock()
        self._features: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def get(self, digest: str) -> npt.NDArray[np.float32] | None:
        """The features of a picture, None where they are not held."""
        with self._lock, contextlib.suppress(KeyError):
            self._features.move_to_end(digest)
            return self._features[digest]
        return None

    def put(self, digest: str, features: npt.NDArray[np.float32]) -> None:
        """Hold the features of a picture, dropping others where they need their room."""
        if features.nbytes > self.budget:
            return
        with self._lock:
            if digest not in self._features:
                self._features[digest] = features
                self.nbytes += features.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._features.popitem(last=False)[1].nbytes
