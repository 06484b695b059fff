"""How the tokens of one generation become pieces of text and, in the end, a result: the part that does not depend on
how the tokens are computed, one sequence at a time (`loop`) or many (`scheduler`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .result import FinishReason, GenerationResult, StreamPiece, TokenLogprobs
from .stop import ReasoningSplit, StopStrings

if TYPE_CHECKING:
    from ..chat.prompt import Prompt
    from ..chat.tokenizer import DetokenizeStream
    from .reading import Reading
    from .sampling import Sampler
    from .speculate import Speculator


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


@dataclass(slots=True)
class Job:
    """One generation, its arguments checked and its prompt prepared, ready to be computed."""

    prompt: Prompt
    reading: Reading
    sampler: Sampler
    rules: TextRules
    end_ids: Collection[int]
    max_new_tokens: int
    speculator: Speculator | None  # makes drafts
    prepare_seconds: float


class Answer:
    """What one generation has said up to now. Tokens go in with `push`; `finish` follows the last one."""

    def __init__(self, job: Job) -> None:
        self.token_ids: list[int] = []
        self._job = job
        self._starts_in_thinking = job.rules.reasoning.thinking
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._ended = False
        self._finish_reason: FinishReason = "cancelled"
        self._first_token_seconds = 0.0
        self._decode_seconds = 0.0

    @property
    def stopped(self) -> bool:
        """An end token or a stop string has come."""
        return self._ended or self._job.rules.stop.found is not None

    @property
    def complete(self) -> bool:
        """No more tokens are wanted."""
        return self.stopped or len(self.token_ids) >= self._job.max_new_tokens

    def push(self, token: int, logprobs: TokenLogprobs | None) -> list[StreamPiece]:
        """The pieces that `token` gives: one, or two where it closed the thinking and began the answer."""
        self.token_ids.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._ended = token in self._job.end_ids
        reasoning, answer = ("", "") if self._ended else self._job.rules.push(token)
        return self._pieces(reasoning, answer, token, logprobs)

    def took(self, seconds: float) -> None:
        """The token that was pushed last came so many seconds after the one before it, or after the prompt was
        prepared."""
        if len(self.token_ids) == 1:
            self._first_token_seconds = self._job.prepare_seconds + seconds
        else:
            self._decode_seconds += seconds

    def finish(self) -> list[StreamPiece]:
        """What was held back, now that no more tokens will come."""
        pieces: list[StreamPiece] = []
        if self._job.rules.stop.found is None:
            reasoning, answer = self._job.rules.flush()
            if reasoning or answer:
                pieces = self._pieces(reasoning, answer, None, None)
        self._finish_reason = "stop" if self.stopped else "length"
        return pieces

    def _pieces(
        self, reasoning: str, answer: str, token: int | None, logprobs: TokenLogprobs | None
    ) -> list[StreamPiece]:
        pieces = []
        if reasoning:
            self._reasoning.append(reasoning)
        if answer:
            self._text.append(answer)
        if reasoning or not answer:
            # a token that made nothing certain counts for the part that is being written
            thinking = bool(reasoning) or self._job.rules.reasoning.thinking
            pieces.append(StreamPiece(reasoning, token, logprobs, thinking))
            token = logprobs = None
        if answer:
            pieces.append(StreamPiece(answer, token, logprobs))
        return pieces

    @property
    def result(self) -> GenerationResult:
        """What has been generated up to now; `finish_reason` is "cancelled" until `finish`."""
        decoded, reading, speculator = len(self.token_ids) - 1, self._job.reading, self._job.speculator
        return GenerationResult(
            text="".join(self._text),
            reasoning="".join(self._reasoning) if self._starts_in_thinking else None,
            token_ids=list(self.token_ids),
            finish_reason=self._finish_reason,
            stop_string=self._job.rules.stop.found,
            prompt_tokens=len(self._job.prompt),
            cached_tokens=reading.cached_tokens,
            cache_miss_reason=reading.miss_reason,
            completion_tokens=len(self.token_ids),
            time_to_first_token=self._first_token_seconds,
            tokens_per_second=decoded / self._decode_seconds if decoded > 0 and self._decode_seconds > 0 else 0.0,
            logprobs=list(self._logprobs) if self._logprobs else None,
            drafted=speculator.drafted if speculator else 0,
            accepted=speculator.accepted if speculator else 0,
        )
