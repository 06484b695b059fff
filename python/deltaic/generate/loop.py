"""The loop: a prompt is prefilled in chunks, tokens are decoded one by one, and the ids become text. Three layers, each
usable alone: `Runner` computes, `generate_ids` yields tokens, `Stream` yields text."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PromptError, StateError
from .answer import Answer
from .cache import FeatureCache, image_places
from .prefill import PromptReader, begin_reading

if TYPE_CHECKING:
    from ..chat.image import ImageInput
    from ..chat.prompt import Prompt
    from ..model.graph import DecodeGraph
    from ..model.state import State
    from ..model.text import TextModel
    from ..model.vision import VisionModel
    from .answer import Job
    from .cache import Reading
    from .result import GenerationResult, StreamPiece, TokenLogprobs
    from .sampling import Sampler

# one lock per op set: its thread pool and thread count belong to the process, not to a model
_OPS_LOCKS: dict[str, Any] = {}


def ops_lock(ops: Any) -> Any:
    """The lock of an op set (re-entrant: a signal handler may use a model between two of its operators)."""
    return _OPS_LOCKS.setdefault(ops.__name__, threading.RLock())


class Runner:
    """Feeds sequences to one model on one op set, from any thread.

    The op set's lock is held for one chunk or one token at a time and never while a caller has the turn: several
    streams may be open at once and interleave, in one thread or in many, and one that is abandoned blocks nobody.
    """

    def __init__(
        self,
        text: TextModel,
        vision: VisionModel | None,
        ops: Any,
        *,
        threads: int,
        image_token_id: int | None,
        feature_bytes: int = 0,
    ) -> None:
        """feature_bytes: how much memory the features of pictures seen before may take."""
        self.text = text
        self.vision = vision
        self.ops = ops
        self.features = FeatureCache(feature_bytes)
        self._threads = threads
        self._image_token_id = image_token_id
        self._graph: DecodeGraph | None = None
        if getattr(ops, "device_resident", False):
            from ..model.graph import DecodeGraph

            self._graph = DecodeGraph(text, ops)
        self._lock = ops_lock(ops)

    def _set_threads(self) -> None:
        """Called with the lock held: another model may have used the op set with another number."""
        if self.ops.num_threads() != self._threads:
            self.ops.set_num_threads(self._threads)

    def places(self, prompt: Prompt, offset: int = 0) -> list[tuple[int, int, str]]:
        """(index of the first placeholder + offset, tokens, digest) of each picture. Raises PromptError if the model
        cannot see, or if placeholders and pictures do not match."""
        if not prompt.images:
            return []
        if self.vision is None:
            raise PromptError(
                "the prompt holds a picture, but this checkpoint has no vision tower; ask without pictures"
            )
        placeholders = int(np.count_nonzero(prompt.token_ids == self._image_token_id))
        needed = sum(image.num_tokens for image in prompt.images)
        if placeholders != needed:
            raise PromptError(
                f"the prompt has {placeholders} image placeholder tokens, its {len(prompt.images)} pictures need "
                f"{needed}; build prompts with Model.prepare"
            )
        return image_places(prompt, self._image_token_id, offset)

    def see(self, image: ImageInput) -> np.ndarray:
        """What the vision tower sees in a picture: float32 [tokens, H]. Each picture is encoded by itself, so that its
        features do not depend on which others are in the prompt or in the cache."""
        assert self.vision is not None  # places() has refused pictures
        features = self.features.get(image.digest)
        if features is None:
            with self._lock:
                self._set_threads()
                features = self.vision.forward([image])
            self.features.put(image.digest, features)
        return features

    def hidden(
        self, prompt: Prompt, state: State, pauses: Sequence[int], *, skip: int = 0, prefill: bool = True
    ) -> Iterator[np.ndarray]:
        """Feed the prompt to `state` and yield the hidden rows [t, H] (before the final norm) up to each of `pauses`:
        rising numbers of tokens of the prompt, the last one its length.

        skip: the state holds so many of the prompt's tokens already; else it may hold others, and positions go on where
        it stands (spec 9.2). prefill: see TextModel.forward. Pictures are encoded when they are reached.
        """
        reader = PromptReader(self, prompt, state, skip)
        for end in pauses:
            reader.look(end)
            yield self.read([(reader, end)], prefill=prefill)[0]

    def read(self, chunks: Sequence[tuple[PromptReader, int]], *, prefill: bool = True) -> list[np.ndarray]:
        """Read on in several prompts at once, each up to its number of tokens; the pictures up to there have been
        looked at. Hidden rows [t, H] (before the final norm) of each. prefill: see TextModel.forward."""
        parts = [reader.chunk(end) for reader, end in chunks]
        cuts = np.cumsum([0, *(len(part.ids) for part in parts)], dtype=np.int64)
        with self._lock:
            self._set_threads()
            x = self.text.embed(np.concatenate([part.ids for part in parts]))
            for part, first in zip(parts, cuts.tolist(), strict=False):
                for row, features in part.features:
                    x[first + row : first + row + len(features)] = features
            positions = np.concatenate([part.positions for part in parts])
            hidden = self.text.forward(x, positions, [reader.state for reader, _ in chunks], cuts, prefill=prefill)
            for reader, end in chunks:
                reader.advance(end)
        return [hidden[a:b] for a, b in zip(cuts.tolist(), cuts[1:].tolist(), strict=False)]

    def step(self, token: int, state: State) -> np.ndarray:
        """Feed one token; hidden row [1, H] (before the final norm)."""
        return self.decode([token], [state])

    def decode(self, tokens: Sequence[int], states: Sequence[State]) -> np.ndarray:
        """Feed one token to each of B states; hidden rows [B, H] (before the final norm)."""
        with self._lock:
            self._set_threads()
            if self._graph is not None and len(states) == 1:
                return self._graph.step(tokens[0], states[0])
            x = self.text.embed(np.array(tokens, np.int64))
            positions = np.array([[state.length + state.rope_delta] * 3 for state in states], np.int64)
            hidden = self.text.forward(x, positions, list(states), np.arange(len(states) + 1, dtype=np.int64))
            for token, state in zip(tokens, states, strict=True):
                state.token_ids.append(token)
        return hidden

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [n, vocab] of hidden rows [n, H]."""
        with self._lock:
            self._set_threads()
            return self.text.logits(hidden)


def generate_ids(
    runner: Runner,
    prompt: Prompt,
    reading: Reading,
    sampler: Sampler,
    *,
    blank: Callable[[], State],
    end_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, TokenLogprobs | None]]:
    """Read what the cache does not hold of the prompt, then yield tokens up to and including an end token, at most
    `max_new_tokens`. The model runs only when the next token is asked for; the last token yielded has not been fed to
    the state. Leaves checkpoints at the pauses of the reading and where the generation ends or is closed.

    blank: makes the state for a prompt of which the cache holds nothing.
    """
    reader, hidden = begin_reading(runner, prompt, reading, blank)
    state = reader.state
    for end, keep in reading.pauses():
        reader.look(end)
        hidden = runner.read([(reader, end)])[0][-1:]
        if keep:
            reading.mark(state, hidden)
    assert hidden is not None  # a prompt has at least one token
    try:
        for produced in range(1, max_new_tokens + 1):
            token, logprobs = sampler.next(runner.logits(hidden)[0])
            yield token, logprobs
            if token in end_ids or produced == max_new_tokens:
                break
            hidden = runner.step(token, state)
    except GeneratorExit:
        reading.end(state, hidden)
        raise
    reading.end(state, hidden)


class Stream:
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

    def __iter__(self) -> Iterator[StreamPiece]:
        return self

    def __next__(self) -> StreamPiece:
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING:
            raise StateError("the stream is being read already; one reader at a time")
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
