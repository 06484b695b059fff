"""What generation hands back: pieces while it runs, and one result when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one generated token under the model's own distribution (before penalties,
    temperature and truncation): of the chosen token, and of the most probable ones, best first, as (token id,
    log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """One step of a stream. Every generated token gives exactly one piece that carries its `token_id`; its `text` is
    what became certain with it and may be empty (half a character, a possible stop string, an end token). Further text
    that becomes certain without a new token comes with `token_id` None. `reasoning` is True for text inside the
    thinking part."""

    text: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished (or cancelled) generation.

    text                 the answer: without thinking, stop string and end token
    reasoning            the thinking part, None when the prompt did not open one
    token_ids            every generated token, thinking and end token included
    finish_reason        "stop" (end token or stop string), "length" (max_new_tokens), "cancelled" (closed or
                         interrupted)
    stop_string          the stop string that ended it, None otherwise
    prompt_tokens        tokens of the prompt, of which
    cached_tokens        came from the cache; only the others were read
    cache_miss_reason    why tokens that had been read before were read again, or why nothing was found; None where
                         only what is new was read
    completion_tokens    generated tokens
    time_to_first_token  seconds from the call to the first token: prompt preparation, pictures and prefill
    tokens_per_second    decoding speed after the first token, 0.0 with fewer than two tokens; a consumer's own time
                         between two pieces does not count
    logprobs             one TokenLogprobs per token where asked for, else None
    drafted              tokens that were drafted and verified (speculative decoding), of which
    accepted             were right: the model ran completion_tokens - 1 - accepted times after the prompt
    """

    text: str
    reasoning: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    stop_string: str | None
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    tokens_per_second: float
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    cache_miss_reason: str | None = None
    drafted: int = 0
    accepted: int = 0
