"""What followed these words before? Drafts of one sequence from its own text."""

from __future__ import annotations

from collections.abc import Iterable

LOOKUP_DEPTH = 8
MATCHES = (4, 2)  # lengths of the n-grams that are looked up, the longest that is found counts
_PLACES = 1 << 17
_MULTIPLIER = 0x9E3779B1  # of the hash; odd


class Lookup:
    """Drafts from the text itself: what followed the last few tokens when they were there before. Needs no weights."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = list(ids)  # the text; who has more of it appends
        # n-gram -> index after its last place. By hash, so that memory is bounded; of two with one hash the later stays
        self._after: list[dict[int, int]] = [{} for _ in MATCHES]
        self._noted = list(MATCHES)  # for each: indexes before this one are noted

    def _find(self, i: int) -> int | None:
        """Index of the token that followed the last MATCHES[i] tokens when they were there last."""
        ids, n, after = self.ids, MATCHES[i], self._after[i]
        length = len(ids)
        if length < n:
            return None
        for end in range(self._noted[i], length):  # the n-gram before `end` has a continuation now
            after[_hash(ids, end, n)] = end
        self._noted[i] = length
        place = after.get(_hash(ids, length, n))
        return place if place is not None and ids[place - n : place] == ids[-n:] else None

    def find(self) -> tuple[int, int] | None:
        """(which of MATCHES, index of the token that followed), or None."""
        short = self._find(len(MATCHES) - 1)
        if short is None:  # then none of the longer ones was there either
            return None
        for i in range(len(MATCHES) - 1):
            place = self._find(i)
            if place is not None:
                return i, place
        return len(MATCHES) - 1, short

    def drafts(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; where the text ends, it is taken to go on with what was drafted."""
        drafts = self.ids[place : place + count]
        while len(drafts) < count:
            drafts.append(drafts[len(drafts) - (len(self.ids) - place)])
        return drafts


def _hash(ids: list[int], end: int, n: int) -> int:
    if n == 2:  # asked in every step
        return (ids[end - 2] * _MULTIPLIER + ids[end - 1]) % _PLACES
    return hash(tuple(ids[end - n : end])) % _PLACES
