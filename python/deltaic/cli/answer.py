"""One question, one answer: `deltaic run` and `deltaic demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from .arguments import generation_options, image_file, load_model, piped_stdin, user_message
from .terminal import dim, figures, say, write_answer

if TYPE_CHECKING:
    from ..generate.result import GenerationResult

MINIATURE = Path(__file__).parent.parent / "miniature"
DEMO_QUESTION = "Describe the picture."


def run(args: argparse.Namespace) -> int:
    """Answer a question, from the arguments or piped in."""
    options = generation_options(args)
    images = [image_file(name) for name in args.image]
    piped = piped_stdin()
    question = "\n\n".join(part for part in (args.question, piped and piped.strip()) if part)
    if not question:
        raise PromptError('no question: give one ("deltaic run MODEL QUESTION") or pipe text to stdin')
    model = load_model(args.model, args)
    with model.stream([user_message(question, images)], thinking=args.thinking, **options) as stream:
        result = stream.finish() if args.json else write_answer(stream)
    if args.json:
        print(json.dumps(_result_facts(result), ensure_ascii=False))
    say(dim(figures(result)))
    return 0


def _result_facts(result: GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "finish_reason": result.finish_reason,
        "stop_string": result.stop_string,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "cache_miss_reason": result.cache_miss_reason,
        "completion_tokens": result.completion_tokens,
        "time_to_first_token": round(result.time_to_first_token, 4),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "token_ids": result.token_ids,
    }


def demo(args: argparse.Namespace) -> int:
    """Let the bundled miniature look at a picture."""
    pictures = sorted((MINIATURE / "pictures").glob("*.png"))
    image = image_file(args.image) if args.image else pictures[0]
    model = load_model(str(MINIATURE), args)
    print(f"picture:  {image}\nquestion: {args.question}\nanswer:   ", end="", flush=True)
    with model.stream([user_message(args.question, [image])]) as stream:
        result = write_answer(stream)
    say(dim(figures(result)))
    return 0
