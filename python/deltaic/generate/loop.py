"""The loop over one sequence: its prompt is read where the cache does not know it, then tokens follow one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from .prefill import begin_reading, read_prompt

if TYPE_CHECKING:
    from ..chat.prompt import Prompt
    from ..model.state import State
    from .reading import Reading
    from .result import TokenLogprobs
    from .runner import Runner, Verification
    from .sampling import Sampler
    from .speculate import Drafting, Speculator


def generate_ids(
    runner: Runner,
    prompt: Prompt,
    reading: Reading,
    sampler: Sampler,
    *,
    blank: Callable[[], State],
    end_ids: Collection[int],
    max_new_tokens: int,
    speculator: Speculator | None = None,
) -> Iterator[tuple[int, TokenLogprobs | None]]:
    """Read what the cache does not hold of the prompt, then yield tokens up to and including an end token, at most
    `max_new_tokens`. The model runs only when the next token is asked for; the last token yielded has not been fed to
    the state. Leaves checkpoints at the pauses of the reading and where the generation ends or is closed.

    blank: makes the state for a prompt of which the cache holds nothing. speculator: makes drafts, None for none.
    """
    reader = begin_reading(runner, prompt, reading, blank, mtp=speculator is not None and speculator.uses_mtp)
    state = reader.state
    read_prompt(runner, reader, reading)
    hidden = reader.last
    assert hidden is not None  # a prompt has at least one token
    steps = _Steps(runner, state, hidden, sampler, speculator)
    try:
        for produced in range(1, max_new_tokens + 1):
            token, logprobs = steps.next()
            yield token, logprobs
            if token in end_ids or produced == max_new_tokens:
                break
            steps.go_on(token, max_new_tokens - produced)
    except GeneratorExit:
        reading.end(state, steps.close())
        raise
    reading.end(state, steps.close())


class _Steps:
    """The steps of one sequence: each is a forward pass over a token and the drafts after it, and serves as many tokens
    as drafts turn out right, and one more. Its rows reach the state when their tokens have been asked for."""

    def __init__(
        self, runner: Runner, state: State, hidden: np.ndarray, sampler: Sampler, speculator: Speculator | None
    ) -> None:
        """hidden [1, H]: the row that the first token is sampled from; the state has it already."""
        self._runner, self._state, self._sampler, self._speculator = runner, state, sampler, speculator
        self._hidden = hidden
        self._drafts: list[int] = []
        self._row = 0
        self._verification: Verification | None = None
        self._chosen: list[int] | None = None  # the token after each row; None: to be chosen from its logits
        self._logits: np.ndarray | None = None
        self._seconds: float | None = None  # of this step, with all that drafts cost; None: not worth knowing

    def next(self) -> tuple[int, TokenLogprobs | None]:
        """The next token."""
        if self._chosen is not None:
            token = self._chosen[self._row]
            self._sampler.took(token)
            return token, None
        if self._logits is None:
            self._logits = self._runner.logits(self._hidden)
        return self._sampler.next(self._logits[self._row])

    def go_on(self, token: int, room: int) -> None:
        """`token` was chosen, and at most `room` more are wanted: the next row, or the next step."""
        if self._drafts:
            if self._row < len(self._drafts) and self._drafts[self._row] == token:
                self._row += 1
                return
        elif self._speculator is None or self._speculator.passes(self._hidden, token, self._seconds):
            self._plain(token)
            self._seconds = None
            return
        speculator, recordings, began = self._speculator, 0, 0.0
        if speculator is not None and speculator.measures:
            began, recordings = perf_counter(), self._runner.recordings
        rows, drafts, before = self._hidden, self._drafts, self._verification
        if before is not None:
            rows = rows[: self._row + 1]
            self._drafts, self._verification = [], None
            self._runner.count(before, [self._row + 1])
        plan: list[int] | Drafting = []
        if speculator is not None:
            speculator.learn(len(drafts), self._row, self._seconds)
            speculator.observe(rows, [*drafts[: self._row], token])
            space = self._state.context - self._state.length
            plan = speculator.draft(self._state, min(room, space) - 1)
        if plan:
            if isinstance(plan, list):
                if before is not None:
                    self._runner.write(before)
                choosing = self._sampler.choosing(1 + len(plan))
                v = self._runner.verify([self._state], [[token, *plan]], head=True, choosing=choosing)
            else:
                v = self._runner.draft_and_verify(plan, before)
            self._verification, self._drafts = v, v.tokens[0][1:]
            self._hidden, self._logits, self._chosen = v.hidden, v.logits, v.chosen
        else:
            if before is not None:
                self._runner.write(before)
            if began:
                began = perf_counter()  # most plain steps come without a look at the text
            self._plain(token)
        self._row, self._seconds = 0, None
        if began:
            self._runner.wait()
            if self._runner.recordings == recordings:
                self._seconds = perf_counter() - began

    def _plain(self, token: int) -> None:
        """A step without drafts."""
        self._hidden, self._logits, self._chosen = self._runner.decode(
            [token], [self._state], head=True, choosing=self._sampler.choosing(1)
        )

    def close(self) -> np.ndarray:
        """Leave the state as it is when the last token that was sampled has not been fed; its hidden row [1, H]."""
        rows = self._hidden[: self._row + 1]
        if self._verification is not None:
            self._runner.commit(self._verification, [self._row + 1])
            self._verification = None
        if self._speculator is not None:
            self._speculator.count(len(self._drafts), self._row)
            self._speculator.observe(rows[:-1], self._drafts[: self._row])
            self._speculator.close(self._state)
        return rows[-1:]
