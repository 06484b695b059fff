"""What is known of one request while it waits, reads and decodes: its state, its drafts, its answer so far."""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from .answer import Answer
from .prefill import begin_reading

if TYPE_CHECKING:
    from ..model.state import State
    from .answer import Job
    from .prefill import PromptReader
    from .result import StreamPiece
    from .runner import Runner
    from .speculate import Speculator


class ScheduledSequence:
    """A request inside the scheduler. Everything but `pieces`, `cancelled` and `ended` belongs to whoever steps."""

    def __init__(self, job: Job, nbytes: int, notify: Callable[[], None] | None) -> None:
        """nbytes: memory that is set aside for all its tokens. notify: see Scheduler.submit."""
        self.job = job
        self.nbytes = nbytes
        self.answer = Answer(job)
        self.pieces: queue.SimpleQueue[StreamPiece | None] = queue.SimpleQueue()  # None: look what has happened
        self.error: BaseException | None = None
        self.ended = self.cancelled = False
        self.reader: PromptReader | None = None
        self.pauses: deque[tuple[int, bool]] = deque()  # of the reading that are ahead
        self.hidden: Any = None  # [1 + drafts, H]: rows of the last step, of the token that was fed and of the drafts
        self.drafts: list[int] = []
        self.row = 0  # how many of these were right; `hidden[row]` is that of the last token the state has
        self.token: int | None = None  # chosen, not fed yet
        self._notify = notify
        self._mark = perf_counter()

    @property
    def state(self) -> State:
        """Known from `begin` to `end`."""
        assert self.reader is not None
        return self.reader.state

    # ------------------------------------------------------------------------------- its prompt

    @property
    def reads(self) -> bool:
        """Whether there is something of the prompt to be read."""
        return self.reader is None or bool(self.pauses)

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.job.prompt) - (0 if self.reader is None else self.reader.at)

    def begin(self, runner: Runner, blank: Callable[[], State]) -> PromptReader:
        """Take from the cache what it holds of the prompt; the reader of the rest. blank: makes an empty state."""
        speculator = self.job.speculator
        mtp = speculator is not None and speculator.uses_mtp
        self.reader = begin_reading(runner, self.job.prompt, self.job.reading, blank, mtp=mtp)
        self.pauses = deque(self.job.reading.pauses())
        self._prompt_progressed()
        return self.reader

    def has_read(self, end: int) -> None:
        """The prompt has been read up to `end`."""
        while self.pauses and self.pauses[0][0] <= end:
            self.pauses.popleft()
        self._prompt_progressed()

    def _prompt_progressed(self) -> None:
        if not self.pauses:
            assert self.reader is not None
            self.hidden = self.reader.last

    # ------------------------------------------------------------------------------- its tokens

    @property
    def room(self) -> int:
        """How many tokens may come after the one that has been chosen."""
        return min(self.job.max_new_tokens - len(self.answer.token_ids), self.state.context - self.state.length)

    def observe(self) -> Speculator | None:
        """Show the speculator, if there is one, what the last step has brought."""
        speculator = self.job.speculator
        if speculator is not None and self.token is not None:
            speculator.observe(self.hidden[: self.row + 1], [*self.drafts[: self.row], self.token])
        return speculator

    def step(self, hidden: Any, drafts: list[int]) -> None:
        """The token that had been chosen was fed, and `drafts` after it. hidden [1 + drafts, H] (before the final
        norm)."""
        self.hidden, self.drafts, self.row, self.token = hidden, drafts, 0, None

    def choose(self, logits: Any, chosen: list[int] | None = None) -> None:
        """Choose the tokens after the last one that was fed, as far as drafts turn out right, and pass on what they
        say. logits [1 + drafts, vocab]; chosen: the token after each row instead, where they have been chosen."""
        sampler = self.job.sampler
        for row in range(len(self.drafts) + 1):
            if chosen is None:
                self.token, logprobs = sampler.next(logits[row])
            else:
                self.token, logprobs = chosen[row], None
                sampler.took(self.token)
            self.row = row
            pieces = self.answer.push(self.token, logprobs)
            now = perf_counter()
            self.answer.took(now - self._mark)
            self._mark = now
            if self.answer.complete:
                pieces += self.answer.finish()
            for piece in pieces:
                self.pieces.put(piece)
            if self.answer.complete or row == len(self.drafts) or self.drafts[row] != self.token:
                break
        self._tell()

    def end(self, error: BaseException | None) -> None:
        """Leave a checkpoint, and let go of the state."""
        if self.reader is not None and self.hidden is not None and error is None and self.state.intact:
            speculator = self.job.speculator
            if speculator is not None:
                speculator.observe(self.hidden[: self.row], self.drafts[: self.row])
                with contextlib.suppress(StateError):  # no memory for the MTP layer: its entries are then missing
                    speculator.close(self.state)
            self.job.reading.end(self.state, self.hidden[self.row : self.row + 1])
        self.reader = self.hidden = None
        self.error, self.ended = error, True
        self.pieces.put(None)
        self._tell()

    def _tell(self) -> None:
        if self._notify is not None:
            with contextlib.suppress(Exception):  # its owner's trouble, for example an event loop that has ended
                self._notify()
