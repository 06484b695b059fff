"""Tokens become text: the iterator that a caller of `Model.stream` holds."""

from __future__ import annotations

import contextlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import StateError
from .answer import Answer
from .result import StreamPiece

if TYPE_CHECKING:
    from typing_extensions import Self

    from .answer import Job
    from .result import GenerationResult, TokenLogprobs


Item = TypeVar("Item")


class GenerationIterator(Iterator[Item], Generic[Item]):
    """An iterator that generates when it is asked for more; closing it, or leaving its `with` block, ends that."""

    @abstractmethod
    def close(self) -> None:
        """End the generation."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stream(GenerationIterator[StreamPiece]):
    """An iterator of `StreamPiece`, and the `result` so far. Closing it, leaving its `with` block, dropping it, or
    Ctrl-C while it computes ends the generation and frees its state; the model can be used again at once.

    `close` may be called from another thread than the one that iterates: the iteration then ends before the next token.
    """

    def __init__(
        self,
        tokens: Callable[[], Iterator[tuple[int, TokenLogprobs | None]]],
        job: Job,
        *,
        on_end: Callable[[GenerationResult | None], None] | None = None,
    ) -> None:
        """tokens: computes the job. on_end: called once, when the generation ends: with the result, or None after an
        error or before a start."""
        self.reading = job.reading
        self.ended = False
        self._answer = Answer(job)
        self._on_end = on_end
        self._closed = False
        self._pieces = self._run(tokens)

    def __next__(self) -> StreamPiece:
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING:
            raise StateError("the stream is being read already; one reader at a time")
        return next(self._pieces)

    def close(self) -> None:
        """End the generation; `result` then says "cancelled" unless it had finished."""
        self._closed = True
        # ValueError: it is running, in another thread or further up in this one; it then stops before the next token
        with contextlib.suppress(ValueError):
            self._pieces.close()
            self._end(None)  # of a stream that was never started

    def finish(self) -> GenerationResult:
        """Run to the end and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What has been generated up to now; `finish_reason` is "cancelled" until the end is reached."""
        return self._answer.result

    def _end(self, result: GenerationResult | None) -> None:
        if not self.ended:
            self.ended = True
            if self._on_end is not None:
                self._on_end(result)

    def _run(
        self, tokens: Callable[[], Iterator[tuple[int, TokenLogprobs | None]]]
    ) -> Generator[StreamPiece, None, None]:
        try:
            yield from self._generate(tokens)
        except (GeneratorExit, KeyboardInterrupt):
            self._end(self.result)
            raise
        except BaseException:
            self._end(None)
            raise
        self._end(self.result)

    def _generate(
        self, tokens: Callable[[], Iterator[tuple[int, TokenLogprobs | None]]]
    ) -> Generator[StreamPiece, None, None]:
        mark = perf_counter()
        for token, logprobs in tokens():
            pieces = self._answer.push(token, logprobs)
            self._answer.took(perf_counter() - mark)
            yield from pieces
            if self._closed:
                return
            if self._answer.stopped:
                break
            mark = perf_counter()
        yield from self._answer.finish()
