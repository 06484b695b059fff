"""What followed these words before? Drafts of one sequence from its own text."""

from __future__ import annotations

from collections.abc import Iterable

LOOKUP_DEPTH = 8
_SHORT = 2
MATCHES = (4, _SHORT)  # lengths of the n-grams that are looked up, the longest that is found counts
_PLACES = 1 << 17
_MULTIPLIER = 0x9E3779B1  # of the hash of a pair, which is looked up in every step; odd


class Lookup:
    """Drafts from the text itself: what followed the last few tokens when they were there before. Needs no weights."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = list(ids)  # the text; who has more of it appends
        # n-gram -> index after its last place. By hash, so that memory is bounded; of two with one hash the later stays
        self._after: list[dict[int, int]] = [{} for _ in MATCHES]
        self._noted = list(MATCHES)  # for each: indexes before this one are noted
        self.find()  # the pairs of the prompt, which are many, before the first token

    def find(self) -> tuple[int, int] | None:
        """(which of MATCHES, index of the token that followed the last tokens when they were there last), or None."""
        ids = self.ids
        short, length = len(MATCHES) - 1, len(ids)
        if length < _SHORT:
            return None
        after, end = self._after[short], self._noted[short]
        for a, b in zip(ids[end - 2 : length - 2], ids[end - 1 : length - 1], strict=True):
            after[(a * _MULTIPLIER + b) % _PLACES] = end  # the pair before `end` has a continuation now
            end += 1
        self._noted[short] = length
        place = after.get((ids[-2] * _MULTIPLIER + ids[-1]) % _PLACES)
        if place is None or ids[place - 1] != ids[-1] or ids[place - 2] != ids[-2]:
            return None  # then none of the longer ones was there either
        for i in range(short):
            longer = self._find(i)
            if longer is not None:
                return i, longer
        return short, place

    def _find(self, i: int) -> int | None:
        """The same for n-grams of one length."""
        ids, n, after = self.ids, MATCHES[i], self._after[i]
        for end in range(self._noted[i], len(ids)):
            after[hash(tuple(ids[end - n : end])) % _PLACES] = end
        self._noted[i] = max(self._noted[i], len(ids))
        place = after.get(hash(tuple(ids[-n:])) % _PLACES)
        return place if place is not None and ids[place - n : place] == ids[-n:] else None

    def drafts(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; where the text ends, it is taken to go on with what was drafted."""
        drafts = self.ids[place : place + count]
        while len(drafts) < count:
            drafts.append(drafts[len(drafts) - (len(self.ids) - place)])
        return drafts
