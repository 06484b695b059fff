"""Which requests run, and who computes? Several generations at once: requests join and leave between any two steps, and
what a step (`RunningBatch`) computes for one of them is what it would get alone, bit for bit."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arguments import integer
from ..errors import ArgumentError, StateError
from ..memory import default_sequence_bytes
from .batch import RunningBatch
from .chunked_prefill import ChunkedPrefill
from .request import Request
from .sequence import ScheduledSequence

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..model.state import State
    from .answer import Job
    from .result import StreamPiece
    from .runner import Runner

MAX_SEQUENCES = 8
PREFILL_TOKENS = 64  # prompts are read a tenth slower than with 128, and others wait half as long


@dataclass(frozen=True, slots=True)
class Load:
    """What a scheduler has to do. waiting, reading, decoding: requests that wait for room, whose prompt is being read,
    whose answer is being generated; reserved_bytes: memory set aside for the last two."""

    waiting: int
    reading: int
    decoding: int
    reserved_bytes: int


class Scheduler:
    """Computes the requests of many callers in common steps; made by `Model.scheduler`.

    A step feeds one token of every running sequence in one pass over the weights, and, where a prompt waits, one chunk
    of it: at most `prefill_tokens` rows (or one picture) as long as others are decoding, so that these keep their pace
    (whose chunk: see `ChunkedPrefill`).

    Requests start in the order in which they came, as soon as fewer than `max_sequences` run and the memory for all
    their tokens, prompt and `max_new_tokens`, fits into `max_bytes` beside that of the others; none is ever interrupted
    for another. An error ends the request that it belongs to and no other.

    Usable from many threads. It computes when `step` is called, when a request is iterated, or, after `start`, in a
    thread of its own.
    """

    def __init__(
        self,
        runner: Runner,
        blank: Callable[[], State],
        job: Callable[..., Job],
        *,
        max_sequences: int = MAX_SEQUENCES,
        max_bytes: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """blank: makes an empty state. job: checks and prepares a request (Model._job). max_sequences: how many run at
        a time. max_bytes: memory for their states, None: half of what is free now. prefill_tokens: see
        `ChunkedPrefill`."""
        self.max_sequences = integer("max_sequences", max_sequences, 1, 1024)
        self.prefill_tokens = integer("prefill_tokens", prefill_tokens, 1, 2**20)
        self.max_bytes = (
            default_sequence_bytes(runner.ops) if max_bytes is None else integer("max_bytes", max_bytes, 0, 2**62)
        )
        self._runner = runner
        self._job = job
        self._like = blank()
        self._step_lock = threading.Lock()  # held for a step; not re-entrant, so that no step begins inside another
        self._wake = threading.Condition()  # guards `_waiting`; notified when there is something to do
        self._waiting: deque[ScheduledSequence] = deque()
        self._cancelled: deque[ScheduledSequence] = deque()
        self._batch = RunningBatch(runner, ChunkedPrefill(runner, blank, self.prefill_tokens))
        self._thread: threading.Thread | None = None
        self._closed = False

    # ------------------------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Any,
        *,
        images: Any = None,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        notify: Callable[[], None] | None = None,
        **options: Any,
    ) -> Request:
        """Ask for a generation: prompt, images, thinking and tools as in `Model.prepare`, options as in
        `Model.generate`. Arguments are checked and the prompt is prepared at once, in the calling thread.

        notify: called, from the thread that steps, whenever pieces have been added and when the generation has ended;
        it must return quickly. Without max_new_tokens a generation may take all of max_bytes, if it needs it.

        Raises what `Model.generate` raises at its call, ArgumentError for a request that can never fit into max_bytes,
        StateError after `close`.
        """
        job = self._job(prompt, images, thinking, tools, options)
        self._runner.places(job.prompt)
        tokens = len(job.prompt)
        fitting = self._like.tokens_within(self.max_bytes) - tokens
        if options.get("max_new_tokens") is None:
            job.max_new_tokens = max(1, min(job.max_new_tokens, fitting))
        nbytes = self._like.bytes_for(tokens + job.max_new_tokens)
        if nbytes > self.max_bytes:
            raise ArgumentError(
                f"max_new_tokens: a prompt of {tokens} tokens and {job.max_new_tokens} new ones need "
                f"{nbytes / 2**20:.1f} MiB, all sequences of the scheduler may take {self.max_bytes / 2**20:.1f} MiB "
                "(max_bytes); ask for fewer, or give it more"
            )
        sequence = ScheduledSequence(job, nbytes, notify)
        with self._wake:
            if self._closed:
                raise StateError("the scheduler is closed; make a new one with Model.scheduler")
            self._waiting.append(sequence)
            self._wake.notify_all()
        return Request(sequence, self._next, self._cancel)

    @property
    def load(self) -> Load:
        """What there is to do at this moment."""
        running = list(self._batch.running)
        reading = sum(sequence.reads for sequence in running)
        return Load(len(self._waiting), reading, len(running) - reading, sum(s.nbytes for s in running))

    @property
    def busy(self) -> bool:
        """Some request has not ended."""
        return bool(self._waiting or self._batch.running or self._cancelled)

    def _cancel(self, sequence: ScheduledSequence) -> None:
        """May be called by the garbage collector, in the middle of a step of this very thread: never waits for one."""
        if sequence.ended or sequence.cancelled:
            return
        sequence.cancelled = True
        self._cancelled.append(sequence)
        self._reap_if_idle()

    def _reap_if_idle(self) -> None:
        """Whoever holds the step lock calls this after letting go of it: nobody's cancelled sequence is forgotten."""
        while self._cancelled and self._step_lock.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._step_lock.release()

    def _reap(self) -> None:
        while self._cancelled:
            sequence = self._cancelled.popleft()
            with self._wake, contextlib.suppress(ValueError):
                self._waiting.remove(sequence)
            if not sequence.ended:
                self._batch.end(sequence)

    # ------------------------------------------------------------------------------- stepping

    def step(self) -> bool:
        """Compute one step, and say whether there is more to do. An interruption (Ctrl-C) ends the sequences that are
        running; those that wait stay."""
        with self._step_lock:
            self._step()
        self._reap_if_idle()
        return self.busy

    def _next(self, sequence: ScheduledSequence) -> StreamPiece | None:
        """Called by a reader that has found nothing: its next piece, or None to look again."""
        if self._thread is not None:
            return sequence.pieces.get()
        with self._step_lock:  # another thread's step may just have made some
            if sequence.pieces.empty() and not sequence.ended:
                self._step()
        self._reap_if_idle()
        return None

    def _step(self) -> None:
        try:
            self._reap()
            self._admit()
            self._batch.step()
            self._reap()
        except BaseException as error:  # not one request's: what was computed and what was noted may not agree
            shown = error if isinstance(error, Exception) else StateError("the step was interrupted")
            for sequence in list(self._batch.running):
                self._batch.end(sequence, shown)
            if not isinstance(error, Exception):
                raise

    def _admit(self) -> None:
        """Start the requests that there is room for, in the order in which they came."""
        running = self._batch.running
        with self._wake:
            while (
                self._waiting
                and len(running) < self.max_sequences
                and self._batch.reserved_bytes + self._waiting[0].nbytes <= self.max_bytes
            ):
                running.append(self._waiting.popleft())

    # ------------------------------------------------------------------------------- a thread of its own

    def start(self) -> Self:
        """Compute in a thread of its own from now on, until `close`. Returns the scheduler."""
        with self._wake:
            if self._closed:
                raise StateError("the scheduler is closed; make a new one with Model.scheduler")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="deltaic-scheduler", daemon=True)
                self._thread.start()
        return self

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self.busy)
            if self._closed:
                return
            self.step()

    def close(self) -> None:
        """End every request, and the thread. Results then say "cancelled" where they had not finished."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._step_lock:
            with self._wake:
                left = [*self._batch.running, *self._waiting]
                self._waiting.clear()
            for sequence in left:
                self._batch.end(sequence)
        self._reap_if_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
