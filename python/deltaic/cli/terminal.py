"""What does a person see? The answer on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..generate.result import GenerationResult
    from ..generate.stream import Stream


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def say(text: str, *, end: str = "\n") -> None:
    """Print on stderr."""
    print(text, end=end, file=sys.stderr, flush=True)


def dim(text: str) -> str:
    """Faint on a terminal that shows colours; as it is elsewhere."""
    return f"\x1b[2m{text}\x1b[0m" if text and sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


def write_answer(stream: Stream) -> GenerationResult:
    """Show an answer as it comes: thinking on stderr, the answer on stdout. Ends both with a line break."""
    thinking, last = False, "\n"
    for piece in stream:
        if not piece.text:
            continue
        if piece.reasoning:
            thinking = True
            say(dim(piece.text), end="")
            continue
        if thinking:
            say("\n")
            thinking = False
        print(piece.text, end="", flush=True)
        last = piece.text
    if thinking:
        say("")
    if not last.endswith("\n"):
        print(flush=True)
    return stream.result


def figures(result: GenerationResult) -> str:
    """Counts and speeds of an answer, in one line."""
    return (
        f"{result.prompt_tokens} prompt tokens"
        + (f" ({result.cached_tokens} from the cache)" if result.cached_tokens else "")
        + f", {result.completion_tokens} new tokens, "
        f"first token after {result.time_to_first_token:.2f} s, {result.tokens_per_second:.1f} tokens/s"
        + (", stopped at max_new_tokens" if result.finish_reason == "length" else "")
    )


def readable(name: str, value: Any) -> str:
    """A fact of `deltaic info` for people; its name tells the unit."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith(("bytes", "memory")):
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
    return f"{value:,}" if isinstance(value, int) else str(value)
