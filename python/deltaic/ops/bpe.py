"""How are the bytes of a text merged into tokens? Byte-pair encoding in numpy: the table of merges that the compiled
operator searches, and what it computes."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

Ints = npt.NDArray[np.int64]

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # csrc/cpu/bpe.cpp has the same


def merge_key(left: Ints, right: Ints) -> Ints:
    """A pair of token ids as one number."""
    return left << 32 | right


def merge_slots(pairs: Ints) -> Ints:
    """The open-addressing table of `pairs` [m] (keys by `merge_key`, of rank 0, 1, ...): [s] int64, s a power of two,
    the rank of a pair at the first free place from its hash on, -1 elsewhere."""
    size = 1 << max(1, (2 * len(pairs)).bit_length())
    keys = pairs.astype(np.uint64) * _MULTIPLIER
    home = ((keys ^ (keys >> np.uint64(32))) & np.uint64(0x7FFFFFFF)).astype(np.int64) & (size - 1)
    slots = [-1] * size
    for rank, place in enumerate(home.tolist()):
        while slots[place] >= 0:
            place = (place + 1) & (size - 1)
        slots[place] = rank
    return np.array(slots, np.int64)


def bpe_merge(ids: Ints, begins: Ints, slots: Ints, pairs: Ints, merged: Ints) -> Ints:
    """Merges neighbouring tokens of each piece until no pair is in the table.

    ids [n]; begins [p+1]: piece i is ids[begins[i]:begins[i+1]]; pairs [m] by rank, merged [m]: the token of a pair.
    slots: see `merge_slots`. The pair of the lowest rank is merged first, the leftmost of equals. A pair waits with the
    rank it had when it came up; it counts as long as the tokens at its place merge into the same token.
    Source: tokenizers 0.23, models/bpe/word.rs, merge_all.
    """
    if len(begins) < 1 or begins[0] != 0 or begins[-1] != len(ids) or (np.diff(begins) < 0).any():
        raise ArgumentError("bpe_merge: begins must rise from 0 to the number of ids")
    rank_of = {pair: rank for rank, pair in enumerate(pairs.tolist())}
    out: list[int] = []
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        token = dict(enumerate(ids[begin:end].tolist()))
        follower = {i: i + 1 for i in range(end - begin - 1)}
        leader = {i + 1: i for i in range(end - begin - 1)}

        def rank_at(place: int, token: dict[int, int] = token, follower: dict[int, int] = follower) -> int:
            if place not in token or place not in follower:
                return -1
            return rank_of.get(token[place] << 32 | token[follower[place]], -1)

        queue = [(rank_at(i), i) for i in range(end - begin) if rank_at(i) >= 0]
        heapq.heapify(queue)
        while queue:
            waited, place = heapq.heappop(queue)
            rank = rank_at(place)
            if rank < 0 or merged[rank] != merged[waited]:
                continue
            token[place] = int(merged[rank])
            right = follower.pop(place)
            del token[right]
            if right in follower:
                follower[place] = follower.pop(right)
                leader[follower[place]] = place
            for neighbour in (leader.get(place), place):
                if neighbour is not None and rank_at(neighbour) >= 0:
                    heapq.heappush(queue, (rank_at(neighbour), neighbour))
        out += [token[i] for i in sorted(token)]
    return np.array(out, np.int64)
