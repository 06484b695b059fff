"""Several generations at once: requests join and leave between any two steps, and what a step computes for one of them
is what it would get alone, bit for bit (D13)."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..arguments import integer
from ..errors import ArgumentError, DeltaicError, StateError
from ..memory import default_sequence_bytes
from . import cache as cache_module
from .answer import Answer, Job
from .costs import Costs
from .prefill import PromptReader, begin_reading
from .result import GenerationResult, StreamPiece
from .speculate import draft_together

if TYPE_CHECKING:
    from ..model.state import State
    from .runner import Runner, Verification
    from .speculate import Speculator

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


class _Sequence:
    """A request inside the scheduler. Everything but `pieces`, `cancelled` and `ended` belongs to whoever steps."""

    def __init__(self, job: Job, nbytes: int, notify: Callable[[], None] | None) -> None:
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
        assert self.reader is not None
        return self.reader.state

    @property
    def reads(self) -> bool:
        return self.reader is None or bool(self.pauses)

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.job.prompt) - (0 if self.reader is None else self.reader.at)

    def begin(self, runner: Runner, blank: Callable[[], State]) -> None:
        speculator = self.job.speculator
        mtp = speculator is not None and speculator.uses_mtp
        self.reader = begin_reading(runner, self.job.prompt, self.job.reading, blank, mtp=mtp)
        self.pauses = deque(self.job.reading.pauses())

    def has_read(self, end: int) -> None:
        """The prompt has been read up to `end`."""
        assert self.reader is not None
        if end == self.pauses[0][0]:
            _, keep = self.pauses.popleft()
            if keep:
                self.job.reading.mark(self.state, self.reader.last)

    @property
    def room(self) -> int:
        """How many tokens may come after the one that has been chosen."""
        return min(self.job.max_new_tokens - len(self.answer.token_ids), self.state.context - self.state.length)

    def step(self, hidden: Any, drafts: list[int]) -> None:
        """The token that had been chosen was fed, and `drafts` after it."""
        self.hidden, self.drafts, self.row, self.token = hidden, drafts, 0, None

    def choose(self, logits: Any) -> None:
        """Choose the tokens after the last one that was fed, as far as drafts turn out right, and pass on what they
        say. logits [1 + drafts, vocab]."""
        for row in range(len(self.drafts) + 1):
            self.token, logprobs = self.job.sampler.next(logits[row])
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
        self.tell()

    def observe(self) -> Speculator | None:
        """Show the speculator, if there is one, what the last step has brought."""
        speculator = self.job.speculator
        if speculator is not None and self.token is not None:
            speculator.observe(self.hidden[: self.row + 1], [*self.drafts[: self.row], self.token])
        return speculator

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
        self.tell()

    def tell(self) -> None:
        if self._notify is not None:
            with contextlib.suppress(Exception):  # its owner's trouble, for example an event loop that has ended
                self._notify()


class Request:
    """One generation of a `Scheduler`: an iterator of `StreamPiece`, and the `result` so far.

    Where the scheduler has a thread of its own, iterating waits for it; else iterating makes it step, for all its
    requests. Closing it, leaving its `with` block or dropping it ends the generation and frees its state, at the latest
    when the step that is being computed ends. One thread may iterate while others close it.
    """

    def __init__(self, scheduler: Scheduler, sequence: _Sequence) -> None:
        self._scheduler = scheduler
        self._sequence = sequence

    def __iter__(self) -> Iterator[StreamPiece]:
        return self

    def __next__(self) -> StreamPiece:
        """The next piece. Raises the error that ended this generation, if one did."""
        sequence = self._sequence
        while True:
            try:
                piece = sequence.pieces.get_nowait()
            except queue.Empty:
                if sequence.ended and sequence.pieces.empty():
                    if sequence.error is not None:
                        raise sequence.error from None
                    raise StopIteration from None
                piece = self._scheduler._next(sequence)
            if piece is not None:
                return piece

    def take(self) -> list[StreamPiece]:
        """The pieces that are there, without waiting or computing."""
        pieces = []
        with contextlib.suppress(queue.Empty):
            while True:
                piece = self._sequence.pieces.get_nowait()
                if piece is not None:
                    pieces.append(piece)
        return pieces

    def finish(self) -> GenerationResult:
        """Run to the end and return the result. Raises the error that ended this generation, if one did."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """End the generation; `result` then says "cancelled" unless it had finished."""
        self._scheduler._cancel(self._sequence)

    @property
    def ended(self) -> bool:
        """Nothing more will be generated; pieces may still be waiting to be taken."""
        return self._sequence.ended

    @property
    def error(self) -> BaseException | None:
        """What ended the generation, if it was an error."""
        return self._sequence.error

    @property
    def result(self) -> GenerationResult:
        """What has been generated up to now; `finish_reason` is "cancelled" until the end is reached."""
        return self._sequence.answer.result

    def __enter__(self) -> Request:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Scheduler:
    """Computes the requests of many callers in common steps; made by `Model.scheduler`.

    A step feeds one token of every running sequence in one pass over the weights, and, where a prompt waits, one chunk
    of it: at most `prefill_tokens` rows (or one picture) as long as others are decoding, so that these keep their pace.
    Chunks go in turn to the prompt that came first and to the one that has the least left; a prompt that begins like
    one that is being read waits for that one's checkpoint instead of reading the same again.

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
        a time. max_bytes: memory for their states, None: half of what is free now. prefill_tokens: see the class; on an
        op set that is not SPLIT_INVARIANT chunks reach from one split point of the prompt to the next."""
        self.max_sequences = integer("max_sequences", max_sequences, 1, 1024)
        self.prefill_tokens = integer("prefill_tokens", prefill_tokens, 1, 2**20)
        self.max_bytes = (
            default_sequence_bytes(runner.ops) if max_bytes is None else integer("max_bytes", max_bytes, 0, 2**62)
        )
        self._runner = runner
        self._blank = blank
        self._job = job
        self._like = blank()
        self._step_lock = threading.Lock()  # held for a step; not re-entrant, so that no step begins inside another
        self._wake = threading.Condition()  # guards `_waiting`; notified when there is something to do
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in the order in which they started
        self._cancelled: deque[_Sequence] = deque()
        self._reserved = 0
        self._costs: dict[int, Costs] = {}
        self._seconds: float | None = None  # that the forward pass of this step took, if that is worth knowing
        self._oldest_first = True
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
        sequence = _Sequence(job, nbytes, notify)
        with self._wake:
            if self._closed:
                raise StateError("the scheduler is closed; make a new one with Model.scheduler")
            self._waiting.append(sequence)
            self._wake.notify_all()
        return Request(self, sequence)

    @property
    def load(self) -> Load:
        """What there is to do at this moment."""
        running = list(self._running)
        reading = sum(sequence.reads for sequence in running)
        return Load(len(self._waiting), reading, len(running) - reading, self._reserved)

    @property
    def busy(self) -> bool:
        """Some request has not ended."""
        return bool(self._waiting or self._running or self._cancelled)

    def _cancel(self, sequence: _Sequence) -> None:
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
                self._end(sequence)

    # ------------------------------------------------------------------------------- stepping

    def step(self) -> bool:
        """Compute one step, and say whether there is more to do. An interruption (Ctrl-C) ends the sequences that are
        running; those that wait stay."""
        with self._step_lock:
            self._step()
        self._reap_if_idle()
        return self.busy

    def _next(self, sequence: _Sequence) -> StreamPiece | None:
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
            decoded, verification = self._decode()
            self._choose(decoded, self._read(), verification)
            self._reap()
        except BaseException as error:  # not one request's: what was computed and what was noted may not agree
            for sequence in list(self._running):
                self._end(sequence, error if isinstance(error, Exception) else StateError("the step was interrupted"))
            if not isinstance(error, Exception):
                raise

    def _admit(self) -> None:
        with self._wake:
            while (
                self._waiting
                and len(self._running) < self.max_sequences
                and self._reserved + self._waiting[0].nbytes <= self.max_bytes
            ):
                sequence = self._waiting.popleft()
                self._running.append(sequence)
                self._reserved += sequence.nbytes

    def _end(self, sequence: _Sequence, error: BaseException | None = None) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._reserved -= sequence.nbytes
        sequence.end(error)

    @contextlib.contextmanager
    def _blaming(self, sequences: Sequence[_Sequence]) -> Iterator[None]:
        """An error inside ends these sequences."""
        try:
            yield
        except Exception as error:
            for sequence in sequences:
                self._end(sequence, error)

    def _decode(self) -> tuple[list[_Sequence], Verification | None]:
        """Feed the tokens that were chosen, and drafts of what may follow. The sequences that have new hidden rows, and
        what is to be committed when it is known which drafts are right."""
        chosen = [sequence for sequence in self._running if sequence.token is not None]
        drafts = self._draft(chosen)
        began, recordings = perf_counter(), self._runner.recordings
        fed = []
        for sequence in chosen:
            with self._blaming([sequence]):
                sequence.state.reserve(sequence.state.length + 1 + len(drafts.get(sequence, [])))
                fed.append(sequence)
        if not fed:
            return [], None
        verification = None
        with self._blaming(fed):
            tokens = [[sequence.token or 0, *drafts.get(sequence, [])] for sequence in fed]
            states = [sequence.state for sequence in fed]
            if any(len(ids) > 1 for ids in tokens):
                verification = self._runner.verify(states, tokens)
                hidden = verification.hidden
            else:
                hidden, _ = self._runner.decode([ids[0] for ids in tokens], states)
            row = 0
            for sequence, ids in zip(fed, tokens, strict=True):
                sequence.step(hidden[row : row + len(ids)], ids[1:])
                row += len(ids)
        self._seconds = perf_counter() - began if self._runner.recordings == recordings else None
        return fed, verification

    def _draft(self, chosen: list[_Sequence]) -> dict[_Sequence, list[int]]:
        """Drafts for the sequences that have a speculator."""
        drafting = [sequence for sequence in chosen if sequence.observe() is not None]
        if not drafting:
            return {}
        wanted = [(s.job.speculator, s.state, s.room - 1) for s in drafting if s.job.speculator is not None]
        try:
            drafts = draft_together(self._runner, wanted, len(chosen), self._costs_of(len(chosen)))
        except StateError:  # no memory for the MTP layer: plain steps need none
            return {}
        return dict(zip(drafting, drafts, strict=True))

    def _costs_of(self, sequences: int) -> Costs:
        """What steps of so many sequences cost, by 1 + the drafts of all."""
        return self._costs.setdefault(sequences, self._runner.costs if sequences == 1 else Costs())

    def _read(self) -> list[_Sequence]:
        """Read one chunk of prompts; the sequences whose prompt is complete."""
        waiting = [sequence for sequence in self._running if sequence.reads]
        if not waiting:
            return []
        alone = len(waiting) == len(self._running)
        if not self._oldest_first:
            least = min(waiting, key=lambda sequence: sequence.left)
            waiting = [least, *(sequence for sequence in waiting if sequence is not least)]
        self._oldest_first = not self._oldest_first
        invariant = self._runner.ops.SPLIT_INVARIANT
        room = cache_module.PREFILL_TOKENS if alone or not invariant else self.prefill_tokens
        chunks: list[tuple[_Sequence, int]] = []
        for sequence in waiting:
            with self._blaming([sequence]):
                if sequence.reader is None and not self._begin(sequence):
                    continue
                if not sequence.pauses:  # the cache held all of it
                    continue
                reader, end = sequence.reader, sequence.pauses[0][0]
                assert reader is not None
                if invariant:
                    end = min(end, reader.at + room)
                unseen = reader.unseen(end)
                if unseen and not alone:
                    if not chunks:  # a picture takes the time of a chunk
                        reader.see(unseen[0])
                        room = 0
                    break
                reader.look(end)
                sequence.state.reserve(end - reader.at + sequence.state.length)
                chunks.append((sequence, end))
                room -= end - reader.at
            if room <= 0 or (chunks and not invariant):
                break
        if chunks:
            with self._blaming([sequence for sequence, _ in chunks]):
                self._runner.read([(s.reader, end) for s, end in chunks if s.reader is not None])
                for sequence, end in chunks:
                    sequence.has_read(end)
        complete = [sequence for sequence in waiting if sequence.reader is not None and not sequence.pauses]
        for sequence in complete:
            assert sequence.reader is not None
            sequence.hidden = sequence.reader.last
        return complete

    def _begin(self, sequence: _Sequence) -> bool:
        """Let it take what the cache holds of its prompt. False if another one is about to leave more there."""
        reading = sequence.job.reading
        others = [other for other in self._running if other.reader is not None and other.pauses]
        ahead = max((reading.gains(other.job.reading, other.reader.at) for other in others if other.reader), default=0)
        if ahead:
            reading.look()
            if ahead > reading.cached_tokens:
                return False
        sequence.begin(self._runner, self._blank)
        return True

    def _choose(self, decoded: list[_Sequence], read: list[_Sequence], verification: Verification | None) -> None:
        """The next tokens of all sequences that have new hidden rows, from one product with the head."""
        ready = [sequence for sequence in (*decoded, *read) if not sequence.ended]
        if not ready:
            return
        began = perf_counter()
        logits = self._runner.logits(self._runner.joined(sequence.hidden for sequence in ready))
        if any(sequence.job.speculator is not None for sequence in ready):
            self._runner.wait()
        seconds = perf_counter() - began
        row = 0
        for sequence in ready:
            if not sequence.cancelled:
                with self._blaming([sequence]):
                    sequence.choose(logits[row : row + len(sequence.hidden)])
            row += len(sequence.drafts) + 1
        if verification is not None:
            began = perf_counter()
            self._runner.commit(verification, [sequence.row + 1 for sequence in decoded])
            seconds += perf_counter() - began
        if decoded and not read and self._seconds is not None:
            drafts = sum(len(sequence.drafts) for sequence in decoded)
            self._costs_of(len(decoded)).record_step(1 + drafts, self._seconds + seconds)
        for sequence in ready:
            if sequence.job.speculator is not None and not sequence.cancelled and sequence in decoded:
                sequence.job.speculator.record(len(sequence.drafts), sequence.row)
            if not sequence.ended and sequence.answer.complete:
                self._end(sequence)

    # ------------------------------------------------------------------------------- a thread of its own

    def start(self) -> Scheduler:
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
                left = [*self._running, *self._waiting]
                self._waiting.clear()
            for sequence in left:
                self._end(sequence)
        self._reap_if_idle()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class BatchStream:
    """The answers to several prompts while they are generated: an iterator of (index of the prompt, StreamPiece).
    Closing it, leaving its `with` block or dropping it ends all of them."""

    def __init__(
        self, scheduler: Scheduler, prompts: Sequence[Any], each: Sequence[Mapping[str, Any]], options: dict[str, Any]
    ) -> None:
        self._scheduler = scheduler
        self.requests: list[Request] = []
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                self.requests.append(scheduler.submit(prompt, **{**options, **own}))
            except DeltaicError as error:
                error.args = (f"prompts[{i}]: {error}", *error.args[1:])
                raise
        self._pieces = self._run()

    def __iter__(self) -> Iterator[tuple[int, StreamPiece]]:
        return self

    def __next__(self) -> tuple[int, StreamPiece]:
        return next(self._pieces)

    def _run(self) -> Iterator[tuple[int, StreamPiece]]:
        more = True
        while more:
            more = self._scheduler.step()
            for i, request in enumerate(self.requests):
                for piece in request.take():
                    yield i, piece

    @property
    def results(self) -> list[GenerationResult]:
        """What has been generated up to now, in the order of the prompts."""
        return [request.result for request in self.requests]

    @property
    def errors(self) -> list[BaseException | None]:
        """What ended each generation, where it was an error."""
        return [request.error for request in self.requests]

    def finish(self) -> list[GenerationResult]:
        """Run to the end and return the results. Raises the first error, after all others are finished."""
        for _ in self:
            pass
        for error in self.errors:
            if error is not None:
                raise error
        return self.results

    def close(self) -> None:
        """End all generations."""
        self._scheduler.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
