"""What has been read already? Checkpoints of sequence states, found again by their tokens and pictures, within one
budget of bytes.

A prompt is read in pieces whose ends depend on its tokens alone (`split_points`). A state at such a point is therefore
the same, bit for bit, for every prompt that begins with these tokens, and going on from it repeats the cold
computation. Op sets that give a row the same bits however the prompt is cut (`SPLIT_INVARIANT`) may go on anywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..model.state import State, copy_array, host_array

if TYPE_CHECKING:
    from ..chat.prompt import Prompt
    from .spill import SpillFolder

PREFILL_TOKENS = 512  # rows per forward call of a prompt at most: bounds the memory for activations
CHECKPOINT_TOKENS = 2048  # inside a long message a checkpoint is kept every so many tokens; a multiple of the above

Ints = npt.NDArray[np.int64]

_REMEMBERED = 4096  # checkpoints that were dropped and whose digest is kept, to say so when they are missed


# ------------------------------------------------------------------------------------------ where a prompt is cut


def message_borders(ids: Ints, border_id: int | None) -> Ints:
    """Where messages begin, rising, the first is 0: two tokens after each `border_id` (<|im_end|> and the line break
    that follows it). That a point is a border depends on the tokens before it alone."""
    ends = np.flatnonzero(ids == -1 if border_id is None else ids == border_id) + 2
    return np.concatenate([np.zeros(1, np.int64), ends[ends < len(ids)]])


def split_points(ids: Ints, border_id: int | None) -> list[tuple[int, bool]]:
    """Where the reading of the tokens `ids` pauses: (position, whether a checkpoint belongs there), rising, up to
    len(ids). Pauses are message borders, every PREFILL_TOKENS after each, and the end; checkpoints are borders, every
    CHECKPOINT_TOKENS after each, and the end."""
    borders = message_borders(ids, border_id).tolist()
    points: list[tuple[int, bool]] = []
    for first, last in zip(borders, [*borders[1:], len(ids)], strict=True):
        points += [(p, (p - first) % CHECKPOINT_TOKENS == 0) for p in range(first, last, PREFILL_TOKENS)]
    return [*points[1:], (len(ids), True)]


# ------------------------------------------------------------------------------------------ what identifies a prefix


def sequence_keys(ids: Ints, images: Iterable[tuple[int, int, str]]) -> Ints:
    """int64 [T] that two sequences share exactly as far as they share tokens and pictures: `ids`, where the
    placeholders of a picture (first, tokens, digest) hold negative numbers made of its digest."""
    keys = np.array(ids, np.int64)
    for first, count, digest in images:
        words = np.frombuffer(hashlib.sha256(digest.encode()).digest(), "<i8").astype(np.int64) | np.int64(-(2**63))
        part = keys[first : first + count]  # shorter where a sequence ends inside the picture
        part[:] = np.resize(words, count)[: len(part)]
    return keys


def image_places(prompt: Prompt, image_token_id: int | None, offset: int = 0) -> list[tuple[int, int, str]]:
    """(index of the first placeholder + offset, tokens, digest) of each picture of a prompt."""
    if not prompt.images:
        return []
    places = np.flatnonzero(prompt.token_ids == image_token_id)
    firsts = np.cumsum([0, *(image.num_tokens for image in prompt.images)])
    return [
        (int(places[first]) + offset, image.num_tokens, image.digest)
        for first, image in zip(firsts[:-1].tolist(), prompt.images, strict=True)
    ]


class PrefixDigest:
    """Digests of the beginnings of `keys`, for rising lengths; each key is hashed once."""

    def __init__(self, keys: Ints) -> None:
        self._keys = np.ascontiguousarray(keys)
        self._hash = hashlib.blake2b(digest_size=16)
        self._length = 0

    def __call__(self, length: int) -> bytes:
        self._hash.update(self._keys[self._length : length].tobytes())
        self._length = length
        return self._hash.copy().digest()


def shared_length(a: Ints, b: Ints) -> int:
    """How many keys `a` and `b` begin with alike."""
    total, start, step = min(len(a), len(b)), 0, 64
    while start < total:  # most pairs differ early: look at little first
        end = min(total, start + step)
        different = np.flatnonzero(a[start:end] != b[start:end])
        if len(different):
            return start + int(different[0])
        start, step = end, step * 4
    return total


# ------------------------------------------------------------------------------------------ the cache


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


# ------------------------------------------------------------------------------------------ one prompt and the cache


class Reading:
    """One prompt on its way through the cache: where its reading starts, and which checkpoints it leaves behind.

    cached_tokens, miss_reason  known after `begin`
    kept                        the newest checkpoints [before the last message, end of prompt, end of generation]
    """

    def __init__(
        self,
        cache: PrefixCache,
        prompt: Prompt,
        *,
        border_id: int | None,
        image_token_id: int | None,
        split_invariant: bool,
        canonical: bool = True,
        also: Sequence[Checkpoint] = (),
        keep: bool = False,
    ) -> None:
        """canonical: whether the prompt's positions are those that its tokens and pictures imply; if not it cannot be
        found or kept. also: checkpoints to look at beside the cache's. keep: make checkpoints even if the cache is off.
        """
        self.cached_tokens = 0
        self.miss_reason: str | None = None
        self.kept: list[Checkpoint] = []
        self._cache = cache
        self._also = also
        self._canonical = canonical
        self._stores = canonical and (keep or cache.budget > 0)
        self._prompt = prompt
        self._split_invariant = split_invariant
        self._border_id = border_id
        self._image_token_id = image_token_id
        self._generated = False

    def look(self) -> Checkpoint | None:
        """The checkpoint to go on from; sets `cached_tokens` and `miss_reason`."""
        self._digest = PrefixDigest(self._keys)
        if not self._canonical:
            self.miss_reason = "the positions of the prompt were made by hand"
            return None
        match = self._cache.find(self._keys, lambda c: c.generated or self._may_start_at(c.length), self._also)
        self.miss_reason = match.miss_reason
        if match.checkpoint is not None:
            self.cached_tokens = match.checkpoint.length
            self._generated = match.checkpoint.generated
        return match.checkpoint

    @cached_property
    def _points(self) -> list[tuple[int, bool]]:
        return split_points(self._prompt.token_ids, self._border_id)

    @cached_property
    def _keys(self) -> Ints:
        return sequence_keys(self._prompt.token_ids, image_places(self._prompt, self._image_token_id))

    def _may_start_at(self, position: int) -> bool:
        """Whether going on from a checkpoint there that was read repeats the cold computation."""
        return self._split_invariant or any(p == position for p, _ in self._points)

    def gains(self, other: Reading, at: int) -> int:
        """Up to which token this prompt need not be read once `other`, which has read `at` tokens of its own prompt,
        has left the checkpoints that are ahead of it; 0 if none of them serves."""
        if not (self._stores and other._stores):
            return 0
        shared = shared_length(self._keys, other._keys)
        ahead = (p for p, keep in reversed(other._points) if keep and at < p <= shared and self._may_start_at(p))
        return next(ahead, 0)

    def begin(self, blank: Callable[[], State]) -> tuple[State, Checkpoint | None]:
        """A state of its own that holds the first `cached_tokens` of the prompt, and the checkpoint it came from."""
        found = self.look()
        if found is None:
            return blank(), None
        if self._stores:
            self.kept.append(found)
        return found.state.fork(), found

    def pauses(self) -> list[tuple[int, bool]]:
        """The split points that are still ahead."""
        return [point for point in self._points if point[0] > self.cached_tokens]

    def mark(self, state: State, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a checkpoint of `state`, which has read the prompt up to one of the split points; hidden [1, H]."""
        if self._stores:
            n = state.length
            self._keep(Checkpoint(self._keys[:n], self._digest(n), state.fork(), copy_array(hidden), self._generated))

    def end(self, state: State, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a checkpoint of `state`, which has gone on with generated tokens."""
        if self._stores and state.intact and state.length > len(self._keys):
            more = np.array(state.token_ids[len(self._keys) :], np.int64)
            keys = np.concatenate([self._keys, more])
            self._keep(Checkpoint(keys, PrefixDigest(keys)(len(keys)), state.fork(), copy_array(hidden), True))

    def _keep(self, checkpoint: Checkpoint) -> None:
        self._cache.add(checkpoint)
        self.kept = [*self.kept[-2:], checkpoint]


class FeatureCache:
    """What the vision tower saw in a picture, float32 [tokens, H], by the picture's digest; least recently used first
    out. Usable from several threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._lock = threading.Lock()
        self._features: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def get(self, digest: str) -> npt.NDArray[np.float32] | None:
        with self._lock, contextlib.suppress(KeyError):
            self._features.move_to_end(digest)
            return self._features[digest]
        return None

    def put(self, digest: str, features: npt.NDArray[np.float32]) -> None:
        if features.nbytes > self.budget:
            return
        with self._lock:
            if digest not in self._features:
                self._features[digest] = features
                self.nbytes += features.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._features.popitem(last=False)[1].nbytes
