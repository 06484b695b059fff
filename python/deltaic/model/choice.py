"""How is a token chosen by whoever computes its row of logits? By the options, a random number, and what the text holds
so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ops.layout import row_bounds

Ints = npt.NDArray[np.int64]
_NOTHING = np.empty((0, 0), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Arguments of ops.reference.sample_rows. Equal ones are one object, which tapes are found by: see `choice_of`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    limit: int
    unused: Ints

    @property
    def reach(self) -> int:
        """How many of the largest logits, penalties taken off, decide; 0: all may."""
        return 1 if self.temperature == 0.0 else self.top_k

    def top_logits(
        self, ops: Any, x: Any, screen: Any, norm: Any, eps: float, seen: list[Any], cu_seqlens: Ints, fed: Ints
    ) -> Any:
        """Logits [T, V] of hidden rows x [T, H] as far as they decide: see ops.reference.linear_top."""
        V = screen.head.shape[0]
        return ops.linear_top(
            x, screen, norm=norm, eps=eps, k=self.reach, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, repetition_penalty=self.repetition_penalty,
            limit=min(self.limit, V), unused=self.unused[self.unused < V], seen=seen, cu_seqlens=cu_seqlens, fed=fed,
        )  # fmt: skip

    def choose(
        self, ops: Any, logits: Any, draws: Ints, tokens: Ints, seen: list[Any], cu_seqlens: Ints, fed: Ints
    ) -> None:
        """Fill tokens [T] with what is chosen from logits [T, n] of the first n ids. draws, seen, cu_seqlens, fed: see
        ops.reference.sample_rows."""
        n = logits.shape[1]
        ops.sample_rows(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, limit=min(self.limit, n), unused=self.unused[self.unused < n],
            draws=draws, seen=seen, cu_seqlens=cu_seqlens, fed=fed, tokens=tokens,
        )  # fmt: skip


@lru_cache(64)
def choice_of(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
    limit: int,
    unused: tuple[int, ...],
) -> Choice:
    """The choice of these settings, the same object for the same ones; the filters do not matter to a greedy one."""
    penalties = presence_penalty, frequency_penalty, repetition_penalty
    if temperature == 0.0 and (top_k, top_p, min_p) != (0, 1.0, 0.0):
        return choice_of(0.0, 0, 1.0, 0.0, *penalties, limit, unused)
    return Choice(temperature, top_k, top_p, min_p, *penalties, limit, np.array(unused, np.int64))


@dataclass(slots=True)
class Seen:
    """What the text of one sequence holds, where penalties ask for that: an array of the op set (layout.new_seen), and
    the tokens that have been chosen since it was brought up to date."""

    array: Any
    said: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Choosing:
    """How the next rows of B sequences are to be chosen from. draws int64 [T]: the random number of each row; seen: of
    each sequence, none without penalties."""

    choice: Choice
    draws: Ints
    seen: Sequence[Seen] = ()

    def take(self) -> tuple[Ints, list[Any]]:
        """(said, seen): the tokens [B, S] that ops.count_tokens has to enter before anything is chosen, which are given
        out once, and where, which `Choice.choose` then gets. S is a power of two, so that there are few tapes, and 0
        without penalties."""
        if not self.seen:
            return _NOTHING, []
        most = max(1, *(len(seen.said) for seen in self.seen))
        said = np.full((len(self.seen), 1 << (most - 1).bit_length()), -1, np.int64)
        for row, seen in zip(said, self.seen, strict=True):
            row[: len(seen.said)] = seen.said
            seen.said = []
        return said, [seen.array for seen in self.seen]

    def choose(self, ops: Any, logits: Any, fed: Sequence[Sequence[int]]) -> list[int]:
        """The tokens after rows whose logits [T, n] are there, -1 for those of no use. fed: per sequence the ids that
        its rows belong to, of which the first is not a draft and does not matter."""
        said, seen = self.take()
        if seen:
            ops.count_tokens(said, seen)
        ids, tokens = np.array([token for rows in fed for token in rows], np.int64), np.empty(len(logits), np.int64)
        self.choice.choose(ops, logits, self.draws, tokens, seen, row_bounds(*map(len, fed)), ids)
        return tokens.tolist()
