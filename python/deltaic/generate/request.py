"""What a caller of a scheduler holds: one request, or the answers to several prompts."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DeltaicError
from .result import GenerationResult, StreamPiece
from .stream import GenerationIterator

if TYPE_CHECKING:
    from .scheduler import Scheduler
    from .sequence import ScheduledSequence


class Request(GenerationIterator[StreamPiece]):
    """One generation of a `Scheduler`: an iterator of `StreamPiece`, and the `result` so far.

    Where the scheduler has a thread of its own, iterating waits for it; else iterating makes it step, for all its
    requests. Closing it, leaving its `with` block or dropping it ends the generation and frees its state, at the latest
    when the step that is being computed ends. One thread may iterate while others close it.
    """

    def __init__(
        self,
        sequence: ScheduledSequence,
        wait: Callable[[ScheduledSequence], StreamPiece | None],
        cancel: Callable[[ScheduledSequence], None],
    ) -> None:
        """wait: called where there is no piece; one, or None to look again. cancel: ends the sequence soon."""
        self._sequence = sequence
        self._wait = wait
        self._cancel = cancel

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
                piece = self._wait(sequence)
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
        self._cancel(self._sequence)

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

    def __del__(self) -> None:
        self.close()


class BatchStream(GenerationIterator[tuple[int, StreamPiece]]):
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
