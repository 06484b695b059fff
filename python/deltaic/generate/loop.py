"""The loop: a prompt is prefilled in chunks, tokens are decoded one by one, and the ids become text. Three layers, each
usable alone: `Runner` computes, `generate_ids` yields tokens, `Stream` yields text."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PromptError, StateError
from .result import FinishReason, GenerationResult, StreamPiece, TokenLogprobs
from .stop import ReasoningSplit, StopStrings

if TYPE_CHECKING:
    from ..chat.prompt import Prompt
    from ..chat.tokenizer import DetokenizeStream
    from ..model.state import State
    from ..model.text import TextModel
    from ..model.vision import VisionModel
    from .sampling import Sampler

PREFILL_TOKENS = 512  # rows per forward call of a prompt: bounds the memory for activations

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
        self, text: TextModel, vision: VisionModel | None, ops: Any, *, threads: int, image_token_id: int | None
    ) -> None:
        self.text = text
        self.vision = vision
        self.ops = ops
        self._threads = threads
        self._image_token_id = image_token_id
        self._lock = ops_lock(ops)

    def _set_threads(self) -> None:
        """Called with the lock held: another model may have used the op set with another number."""
        if self.ops.num_threads() != self._threads:
            self.ops.set_num_threads(self._threads)

    def features(self, prompt: Prompt) -> np.ndarray | None:
        """What the vision tower sees in the prompt's pictures: float32 [placeholders, H] in placeholder order."""
        if not prompt.images:
            return None
        if self.vision is None:
            raise PromptError(
                "the prompt holds a picture, but this checkpoint has no vision tower; ask without pictures"
            )
        with self._lock:
            self._set_threads()
            features = self.vision.forward(prompt.images)
        placeholders = int(np.count_nonzero(prompt.token_ids == self._image_token_id))
        if placeholders != len(features):
            raise PromptError(
                f"the prompt has {placeholders} image placeholder tokens, its {len(prompt.images)} pictures need "
                f"{len(features)}; build prompts with Model.prepare"
            )
        return features

    def hidden(self, prompt: Prompt, state: State) -> Iterator[np.ndarray]:
        """Feed the prompt to `state` and yield the hidden rows [t, H] (before the final norm) of each chunk.

        Chunks end at multiples of PREFILL_TOKENS counted from the start of the sequence, so that the split depends on
        the tokens alone. Positions go on where the state stands (spec 9.2). Pictures are encoded before the first
        chunk.
        """
        ids, total = prompt.token_ids, len(prompt.token_ids)
        features = self.features(prompt)
        shift = state.length + state.rope_delta - int(prompt.position_ids[0, 0])
        positions = prompt.position_ids + shift
        start = feature = 0
        while start < total:
            end = min(total, start + PREFILL_TOKENS - state.length % PREFILL_TOKENS)
            chunk = ids[start:end]
            with self._lock:
                self._set_threads()
                x = self.text.embed(chunk)
                if features is not None:
                    rows = np.flatnonzero(chunk == self._image_token_id)
                    x[rows] = features[feature : feature + len(rows)]
                    feature += len(rows)
                hidden = self._advance(state, x, positions[start:end], chunk.tolist())
                state.rope_delta = int(positions[:end].max()) + 1 - state.length
            yield hidden
            start = end

    def prefill(self, prompt: Prompt, state: State) -> np.ndarray:
        """Feed the prompt; logits [vocab] after its last token."""
        for hidden in self.hidden(prompt, state):
            last = hidden[-1:]
        return self.logits(last)[0]

    def step(self, token: int, state: State) -> np.ndarray:
        """Feed one token; logits [vocab] after it."""
        with self._lock:
            self._set_threads()
            x = self.text.embed(np.array([token], np.int64))
            positions = np.full((1, 3), state.length + state.rope_delta, np.int64)
            return self.text.logits(self._advance(state, x, positions, [token]))[0]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [n, vocab] of hidden rows [n, H]."""
        with self._lock:
            self._set_threads()
            return self.text.logits(hidden)

    def _advance(self, state: State, x: np.ndarray, positions: np.ndarray, ids: list[int]) -> np.ndarray:
        hidden = self.text.forward(x, positions, [state], np.array([0, len(ids)], np.int64))
        state.token_ids.extend(ids)
        return hidden


def generate_ids(
    runner: Runner,
    prompt: Prompt,
    state: State,
    sampler: Sampler,
    *,
    end_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, TokenLogprobs | None]]:
    """Prefill, then yield tokens up to and including an end token, at most `max_new_tokens`. The model runs only when
    the next token is asked for; the last token yielded has not been fed to the state."""
    logits = runner.prefill(prompt, state)
    for produced in range(1, max_new_tokens + 1):
        token, logprobs = sampler.next(logits)
        yield token, logprobs
        if token in end_ids or produced == max_new_tokens:
            return
        logits = runner.step(token, state)


@dataclass(slots=True)
class TextRules:
    """How the ids of one generation become text: its detokeniser, where thinking ends, and the stop strings."""

    detokenizer: DetokenizeStream
    reasoning: ReasoningSplit
    stop: StopStrings

    def push(self, token: int) -> tuple[str, str]:
        """(reasoning, answer) that became certain with `token`."""
        return self._cut(self.reasoning.push(self.detokenizer.push(token)))

    def flush(self) -> tuple[str, str]:
        """(reasoning, answer) that was held back, when no more tokens will come."""
        reasoning, answer = self._cut(self.reasoning.push(self.detokenizer.flush()))
        if self.stop.found is None:
            rest, _ = self.reasoning.flush()
            reasoning += rest
            answer += self.stop.flush()
        return reasoning, answer

    def _cut(self, parts: tuple[str, str]) -> tuple[str, str]:
        reasoning, answer = parts
        return reasoning, self.stop.push(answer)


class Stream:
    """An iterator of `StreamPiece`, and the `result` so far. Closing it, leaving its `with` block, dropping it, or
    Ctrl-C while it computes ends the generation and frees its state; the model can be used again at once.

    `close` may be called from another thread than the one that iterates: the iteration then ends before the next token.
    """

    def __init__(
        self,
        tokens: Callable[[], Iterator[tuple[int, TokenLogprobs | None]]],
        rules: TextRules,
        *,
        end_ids: Collection[int],
        prompt_tokens: int,
        prepare_seconds: float,
    ) -> None:
        self._rules = rules
        self._end_ids = end_ids
        self._prompt_tokens = prompt_tokens
        self._prepare_seconds = prepare_seconds
        self._starts_in_thinking = rules.reasoning.thinking
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason = "cancelled"
        self._first_token_seconds = 0.0
        self._decode_seconds = 0.0
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

    def finish(self) -> GenerationResult:
        """Run to the end and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What has been generated up to now; `finish_reason` is "cancelled" until the end is reached."""
        decoded = len(self._ids) - 1
        return GenerationResult(
            text="".join(self._text),
            reasoning="".join(self._reasoning) if self._starts_in_thinking else None,
            token_ids=list(self._ids),
            finish_reason=self._finish_reason,
            stop_string=self._rules.stop.found,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self._ids),
            time_to_first_token=self._first_token_seconds,
            tokens_per_second=decoded / self._decode_seconds if decoded > 0 and self._decode_seconds > 0 else 0.0,
            logprobs=list(self._logprobs) if self._logprobs else None,
        )

    def _run(
        self, tokens: Callable[[], Iterator[tuple[int, TokenLogprobs | None]]]
    ) -> Generator[StreamPiece, None, None]:
        mark = perf_counter()
        finish: FinishReason = "length"
        for token, logprobs in tokens():
            self._ids.append(token)
            if logprobs is not None:
                self._logprobs.append(logprobs)
            ended = token in self._end_ids
            reasoning, answer = ("", "") if ended else self._rules.push(token)
            seconds = perf_counter() - mark
            if len(self._ids) == 1:
                self._first_token_seconds = self._prepare_seconds + seconds
            else:
                self._decode_seconds += seconds
            if ended or self._rules.stop.found is not None:
                finish = "stop"
            yield from self._emit(reasoning, answer, token, logprobs)
            if self._closed:
                return
            if finish == "stop":
                break
            mark = perf_counter()
        if self._rules.stop.found is None:
            reasoning, answer = self._rules.flush()
            if self._rules.stop.found is not None:
                finish = "stop"
            self._finish_reason = finish
            if reasoning or answer:
                yield from self._emit(reasoning, answer, None, None)
        self._finish_reason = finish

    def _emit(
        self, reasoning: str, answer: str, token: int | None, logprobs: TokenLogprobs | None
    ) -> Iterator[StreamPiece]:
        """One piece with the token; a second one without it when the token closed the thinking and began the answer."""
        if reasoning:
            self._reasoning.append(reasoning)
        if answer:
            self._text.append(answer)
        if reasoning or not answer:
            # a token that made nothing certain counts for the part that is being written
            thinking = bool(reasoning) or self._rules.reasoning.thinking
            yield StreamPiece(reasoning, token, logprobs, thinking)
            token = logprobs = None
        if answer:
            yield StreamPiece(answer, token, logprobs)
