"""How is the next token chosen? By the sampler of its sequence, from logits, options, and what was said before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import unusable_logits
from ..model.choice import Choosing, Seen, choice_of
from ..ops.devices import ops_lock
from ..ops.layout import new_seen
from .options import SamplingParams
from .result import TokenLogprobs

_DRAWN = 32  # random numbers that a sampler draws at a time
_NONE = np.empty(0, np.int64)


def choosing_together(rows: Iterable[tuple[Sampler, int]]) -> Choosing | None:
    """`Sampler.choosing` of several sequences, so many rows of each; None unless all of them choose alike."""
    found = [sampler.choosing(count) for sampler, count in rows]
    known = [choosing for choosing in found if choosing is not None]
    if len(known) < len(found) or len({choosing.choice for choosing in known}) != 1:
        return None
    return _joined(known, np.concatenate([choosing.draws for choosing in known]))


def drafting_together(samplers: Sequence[Sampler], depth: int) -> Choosing:
    """`Sampler.drafting` of several sequences that choose alike, so many drafts of each, the first of all first."""
    found = [sampler.drafting(depth) for sampler in samplers]
    return _joined(found, np.stack([choosing.draws for choosing in found], axis=1).ravel())


def _joined(alike: Sequence[Choosing], draws: np.ndarray) -> Choosing:
    return Choosing(alike[0].choice, draws, [seen for choosing in alike for seen in choosing.seen])


class Sampler:
    """Chooses the tokens of one sequence. Remembers what its text holds where penalties ask for that (constant time per
    token), and draws from a generator of its own, so that sequences do not disturb each other.

    Ids without a token are never chosen: those from `limit` on, present in padded heads, and the `unused` ones below.
    """

    def __init__(
        self,
        ops: Any,
        params: SamplingParams,
        *,
        limit: int,
        prompt_ids: np.ndarray,
        unused: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> None:
        p = self.params = params
        self._ops = ops
        self._limit = limit
        self._copy = getattr(ops, "copy", np.copy)
        self.logprobs = logprobs
        self.choice = choice_of(
            p.temperature, p.top_k, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty,
            limit, tuple(unused),
        )  # fmt: skip
        self._rng = np.random.default_rng(params.seed)
        # Drawn ahead, for drafts and because a call costs more than a number; those from `_at` on are not used up. A
        # double that numpy draws is a multiple of 2^-53, and is kept as such.
        self._draws = np.zeros(_DRAWN, np.int64)
        self._each = 0 if params.greedy else 1  # how many a token uses up
        self._at = _DRAWN * self._each
        self._prompt_ids = prompt_ids if params.repetition_penalty != 1.0 else _NONE

    @cached_property
    def _seen(self) -> list[Seen]:
        """One, or none without penalties. Made when the first token is chosen: requests that wait take no memory."""
        if not self.params.penalised:
            return []
        array = new_seen(self._limit, self._prompt_ids[self._prompt_ids < self._limit])
        return [Seen(self._ops.upload(array) if hasattr(self._ops, "upload") else array)]

    def next(self, logits: np.ndarray) -> tuple[int, TokenLogprobs | None]:
        """The next token for `logits` [vocab] (float32), which may be overwritten, and its log-probabilities where
        asked for. The token is counted."""
        with ops_lock(self._ops):
            if self.logprobs is None:
                return self._next(logits), None
            kept = self._copy(logits)  # choosing may change the logits
            kept[self.choice.unused] = -np.inf
            token = self._next(logits)
            logprob, ids, values = self._ops.log_softmax_top(
                kept, limit=self._limit, k=min(self.logprobs, self._limit), token=token
            )
        return token, TokenLogprobs(token, float(logprob), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _next(self, logits: np.ndarray) -> int:
        (token,) = self.drafting(1).choose(self._ops, logits[None], [[-1]])
        self.took(token)
        return token

    def choosing(self, rows: int) -> Choosing | None:
        """How the next `rows` tokens may be chosen by whoever computes their logits, instead of by `next`; `took` is
        then called for each that counts. None where the log-probabilities are wanted, too."""
        return None if self.logprobs is not None else self.drafting(rows)

    def drafting(self, rows: int) -> Choosing:
        """The same for drafts of the next `rows` tokens. The random numbers are those that these tokens will use, so
        that like distributions give like tokens; nothing is used up."""
        return Choosing(self.choice, self.draws(rows), self._seen)

    def took(self, token: int) -> None:
        """The next token has been chosen as `choosing` says. ArgumentError if its logits let none be chosen."""
        if token < 0:
            raise unusable_logits("sample_rows")
        self._at += self._each
        for seen in self._seen:
            seen.said.append(token)

    def draws(self, count: int) -> np.ndarray:
        """The random numbers of the next `count` tokens as `sample_rows` takes them: int64 [count], not to be
        written."""
        end = self._at + count
        while end > len(self._draws):
            more = (self._rng.random(_DRAWN) * 2**53).astype(np.int64)  # the numbers of so many single calls
            self._draws = np.concatenate([self._draws[self._at :], more])
            self._at, end = 0, count
        return self._draws[self._at : end]
