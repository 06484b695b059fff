"""How is a token chosen from its row of logits, where that depends on nothing but the row and a random number?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Arguments of ops.reference.sample_rows. Equal ones are one object, which tapes are found by: see `choice_of`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    limit: int
    unused: Ints

    def choose(self, ops: Any, logits: Any, draws: Ints, tokens: Ints) -> None:
        """Fill tokens [T] with what is chosen from logits [T, n] of the first n ids, with random numbers draws [T]."""
        n = logits.shape[1]
        ops.sample_rows(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            limit=min(self.limit, n), unused=self.unused[self.unused < n], draws=draws, tokens=tokens,
        )  # fmt: skip


Choosing = tuple[Choice, Ints]  # how rows are to be chosen from, and the random number of each


@lru_cache(64)
def choice_of(
    temperature: float, top_k: int, top_p: float, min_p: float, limit: int, unused: tuple[int, ...]
) -> Choice:
    """The choice of these settings, the same object for the same ones; the filters do not matter to a greedy one."""
    if temperature == 0.0 and (top_k, top_p, min_p) != (0, 1.0, 0.0):
        return choice_of(0.0, 0, 1.0, 0.0, limit, unused)
    return Choice(temperature, top_k, top_p, min_p, limit, np.array(unused, np.int64))
