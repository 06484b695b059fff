"""How does a prompt get into a state? In chunks, with its pictures encoded when they are reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..model.state import copy_array
from ..model.text import Mark
from ..ops.memory import empty
from . import prefix

if TYPE_CHECKING:
    from ..chat.prompt import Prompt
    from ..model.state import State
    from .reading import Reading
    from .runner import Runner

Ints = npt.NDArray[np.int64]
MARKS = 3  # checkpoints inside one forward pass at most


@dataclass(slots=True)
class Chunk:
    """The next rows of a prompt: ids [t], positions [t, 3], and what replaces the embedding of placeholders: (first
    row, features [n, H])."""

    ids: Ints
    positions: Ints
    features: list[tuple[int, Any]]


class PromptReader:
    """A prompt on its way into `state`; `at` of its tokens are there, and `last` is the hidden row [1, H] of the last
    one, where known."""

    def __init__(
        self, runner: Runner, prompt: Prompt, state: State, skip: int = 0, *, mtp: bool = False, last: Any = None
    ) -> None:
        """skip: the state holds so many of the prompt's tokens already; else it may hold others, and positions go on
        where it stands. mtp: make the entries of the MTP layer too. Raises PromptError if the model cannot
        see the prompt's pictures, or if placeholders and pictures do not match."""
        self.prompt, self.state, self.at = prompt, state, skip
        self.mtp, self.last = mtp, last
        self._runner = runner
        self._offset = state.length - skip
        shift = 0 if skip else state.length + state.rope_delta - int(prompt.position_ids[0, 0])
        self.positions = prompt.position_ids + shift
        self._places = runner.places(prompt, self._offset)
        self._features: dict[int, Any] = {}

    def unseen(self, end: int) -> list[int]:
        """Which pictures the next rows up to `end` show that have not been encoded."""
        spans = ((i, first - self._offset, count) for i, (first, count, _) in enumerate(self._places))
        return [i for i, first, n in spans if i not in self._features and first < end and first + n > self.at]

    def see(self, picture: int) -> None:
        """Encode a picture, or find it among those that were."""
        self._features[picture] = self._runner.see(self.prompt.images[picture])

    def look(self, end: int) -> None:
        """Encode the pictures that the next rows up to `end` show."""
        for picture in self.unseen(end):
            self.see(picture)

    def chunk(self, end: int) -> Chunk:
        """The rows up to `end`."""
        features = []
        for i, seen in self._features.items():
            first = self._places[i][0] - self._offset
            low, high = max(first, self.at), min(first + len(seen), end)
            if low < high:
                features.append((low - self.at, seen[low - first : high - first]))
        return Chunk(self.prompt.token_ids[self.at : end], self.positions[self.at : end], features)

    def rope_delta(self, end: int) -> int:
        """That of a state that has read the prompt up to `end`."""
        return int(self.positions[:end].max()) + 1 - (self._offset + end)

    def advance(self, end: int, hidden: Any) -> None:
        """The rows up to `end` have been fed, and became `hidden` [t, H]."""
        state = self.state
        self.last = copy_array(hidden[-1:])  # not the whole chunk
        state.token_ids.extend(self.prompt.token_ids[self.at : end].tolist())
        state.rope_delta = self.rope_delta(end)
        state.images += [place for place in self._places if self.at <= place[0] - self._offset < end]
        self._features = {
            i: seen for i, seen in self._features.items() if self._places[i][0] - self._offset + len(seen) > end
        }
        self.at = end


def begin_reading(
    runner: Runner, prompt: Prompt, reading: Reading, blank: Callable[[], State], *, mtp: bool
) -> PromptReader:
    """Take from the cache what it holds of the prompt, and return the reader of the rest. blank: makes the state for a
    prompt of which the cache holds nothing. mtp: see PromptReader."""
    runner.places(prompt)  # refuses a prompt made by hand before anything else is done with it
    state, found = reading.begin(blank)
    last = None if found is None else runner.rows(found.hidden)
    return PromptReader(runner, prompt, state, reading.cached_tokens, mtp=mtp, last=last)


def read_prompt(runner: Runner, reader: PromptReader, reading: Reading) -> None:
    """Read what is left of a prompt, and leave the checkpoints that belong on the way."""
    if not runner.ops.SPLIT_INVARIANT:
        for end, keep in reading.pauses():
            reader.look(end)
            runner.read([(reader, end)])
            if keep:
                reading.mark(reader.state, reader.last)
        return
    # Where a row gets the same bits wherever the prompt is cut, checkpoints need no cuts: passes are as few as can be.
    kept = [point for point, keep in reading.pauses() if keep and reading.stores]
    total = len(reader.prompt)
    while reader.at < total:
        first = reader.at
        end = min(first + prefix.PREFILL_TOKENS, total)
        inside = [point for point in kept if first < point < end]
        if len(inside) > MARKS:  # each holds matrices of its own meanwhile
            end = inside[MARKS]
            del inside[MARKS:]
        state = reader.state
        marks = [Mark(point - first, *(empty(a.shape, a.dtype) for a in (state.conv, state.delta))) for point in inside]
        reader.look(end)
        (hidden,) = runner.read([(reader, end)], marks=marks)
        for point, mark in zip(inside, marks, strict=True):
            length = state.length - end + point
            passed = state.earlier(length, mark.conv, mark.delta, reader.rope_delta(point))
            reading.mark(passed, hidden[mark.rows - 1 : mark.rows])
        if end in kept:
            reading.mark(state, reader.last)
