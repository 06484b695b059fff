"""Where is a prompt cut, and what identifies its beginning?

A prompt is read in pieces whose ends depend on its tokens alone (`split_points`). A state at such a point is therefore
the same, bit for bit, for every prompt that begins with these tokens and pictures, and going on from it repeats the
cold computation. Op sets that give a row the same bits however the prompt is cut (`SPLIT_INVARIANT`) may go on
anywhere, and read several of these pieces in one pass that leaves the checkpoints between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..chat.prompt import Prompt

PREFILL_TOKENS = 512  # rows per forward call of a prompt at most: bounds the memory for activations
CHECKPOINT_TOKENS = 2048  # inside a long message a checkpoint is kept every so many tokens; a multiple of the above

Ints = npt.NDArray[np.int64]


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
