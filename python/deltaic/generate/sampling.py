"""How is the next token chosen? By the sampler of its sequence, from logits, options, and what was said before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import unusable_logits
from ..model.choice import choice_of
from .options import SamplingParams
from .result import TokenLogprobs

if TYPE_CHECKING:
    from ..model.choice import Choice, Choosing

_DRAWN = 32  # random numbers that a sampler draws at a time


def choosing_together(rows: Iterable[tuple[Sampler, int]]) -> Choosing | None:
    """`Sampler.choosing` of several sequences, so many rows of each; None unless all of them choose alike."""
    found = [sampler.choosing(count) for sampler, count in rows]
    known = [choosing for choosing in found if choosing is not None]
    if len(known) < len(found) or len({choice for choice, _ in known}) != 1:
        return None
    return known[0][0], np.concatenate([draws for _, draws in known])


class Sampler:
    """Chooses the tokens of one sequence. Remembers the distinct generated ids and their counts (grown in place,
    constant time per token) and draws from a generator of its own, so that sequences do not disturb each other.

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
        self.params = params
        self._ops = ops
        self._limit = limit
        self._unused_ids = tuple(unused)
        index = np.array(unused, np.int64)
        self._unused = ops.upload(index) if hasattr(ops, "upload") else index
        self._logprobs = logprobs
        self._rng = np.random.default_rng(params.seed)
        # Drawn ahead, for drafts and because a call costs more than a number; those from `_at` on are not used up. A
        # double that numpy draws is a multiple of 2^-53, and is kept as such.
        self._draws = np.zeros(_DRAWN, np.int64)
        self._each = 0 if params.greedy else 1  # how many a token uses up
        self._at = _DRAWN * self._each
        repeats = params.repetition_penalty != 1.0
        self._prompt_ids = np.unique(prompt_ids).astype(np.int64) if repeats else np.empty(0, np.int64)
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.int64)

    def next(self, logits: np.ndarray) -> tuple[int, TokenLogprobs | None]:
        """The next token for `logits` [vocab] (float32), and its log-probabilities where asked for. The token is
        counted; those of ids that are never chosen are overwritten in place."""
        if len(self._unused):
            logits[self._unused] = -np.inf
        token = self._choose(logits, self._limit, self._uniform(0))
        self._at += self._each
        self._count(token)
        if self._logprobs is None:
            return token, None
        logprob, ids, values = self._ops.log_softmax_top(
            logits, limit=self._limit, k=min(self._logprobs, self._limit), token=token
        )
        return token, TokenLogprobs(token, float(logprob), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def draft(self, logits: np.ndarray, ahead: int) -> int:
        """What `next` would choose from `logits` (float32, of the first ids) after `ahead` other tokens, as well as it
        can be told now. The random number is the one that `next` will use, so that like distributions give like tokens;
        nothing is counted and nothing is used up."""
        return self._choose(logits, min(self._limit, logits.shape[0]), self._uniform(ahead))

    @cached_property
    def choice(self) -> Choice | None:
        """How `next` chooses, with `draws`; None where penalties make it depend on what was chosen before."""
        p = self.params
        if p.penalised:
            return None
        return choice_of(p.temperature, p.top_k, p.top_p, p.min_p, self._limit, self._unused_ids)

    def choosing(self, rows: int) -> Choosing | None:
        """How the next `rows` tokens may be chosen together by whoever computes their logits, instead of by `next`;
        `took` is then called for each that counts. None where each needs what comes before it, or its logits."""
        choice = self.choice
        return None if choice is None or self._logprobs is not None else (choice, self.draws(rows))

    def took(self, token: int) -> None:
        """The next token has been chosen as `choosing` says. ArgumentError if its logits let none be chosen."""
        if token < 0:
            raise unusable_logits("sample_rows")
        self._at += self._each

    def draws(self, count: int) -> np.ndarray:
        """The random numbers of the next `count` tokens as `sample_rows` takes them: int64 [count], not to be
        written."""
        end = self._at + count
        while end > len(self._draws):
            more = (self._rng.random(_DRAWN) * 2**53).astype(np.int64)  # the numbers of so many single calls
            self._draws = np.concatenate([self._draws[self._at :], more])
            self._at, end = 0, count
        return self._draws[self._at : end]

    def _uniform(self, ahead: int) -> float:
        return float(self.draws(ahead + 1)[ahead]) / 2**53

    def _choose(self, logits: np.ndarray, limit: int, uniform: float) -> int:
        p, seen = self.params, len(self._slots)
        return int(
            self._ops.sample(
                logits,
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                presence_penalty=p.presence_penalty,
                frequency_penalty=p.frequency_penalty,
                repetition_penalty=p.repetition_penalty,
                output_ids=self._ids[:seen],
                output_counts=self._counts[:seen],
                prompt_ids=self._prompt_ids,
                limit=limit,
                uniform=uniform,
            )
        )

    def _count(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1
