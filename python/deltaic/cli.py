"""The command line: `deltaic run | chat | demo | quantize | bench | info`. Holds no logic that the Python API lacks;
answers go to stdout, all else to stderr.

Exit codes: 0 done, 1 failed while running, 2 a wrong argument, file or prompt (one line on stderr), 130 Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ArgumentError, DeltaicError, ImageError, PromptError, StateError

if TYPE_CHECKING:
    from .api import Model
    from .generate.result import GenerationResult
    from .generate.stream import Stream
    from .session import Session

MINIATURE = Path(__file__).parent / "miniature"
DEMO_QUESTION = "Describe the picture."

_EXAMPLES = {
    None: """\
examples:
  deltaic demo                                      no download: a bundled miniature looks at a bundled picture
  deltaic run Qwen/Qwen3.5-0.8B "Why is the sky blue?"
  deltaic run ./my-checkpoint "What is on the sofa?" --image cat.jpg
  deltaic chat Qwen/Qwen3.5-0.8B
""",
    "run": """\
examples:
  deltaic run Qwen/Qwen3.5-0.8B "Why is the sky blue?"
  deltaic run Qwen/Qwen3.5-4B "What is on the sofa?" --image cat.jpg --no-thinking
  cat report.txt | deltaic run Qwen/Qwen3.5-0.8B "Summarise this in three sentences."
  deltaic run Qwen/Qwen3.5-0.8B "A word for happy" --temperature 0 --max-new-tokens 20 --json
""",
    "chat": """\
in the conversation:
  /image FILE   show a picture with the next message
  /undo         take back the last question and its answer
  /reset        forget the conversation
  /exit         leave (as does Ctrl-D); Ctrl-C stops an answer

examples:
  deltaic chat Qwen/Qwen3.5-0.8B
  deltaic chat Qwen/Qwen3.5-4B --no-thinking --threads 4
  deltaic chat Qwen/Qwen3.5-4B --session trip.chat      go on tomorrow where it stopped, without reading again
""",
    "demo": """\
examples:
  deltaic demo
  deltaic demo "How many objects are there?"
  deltaic demo --image drawing.png "What colour is the circle?"
""",
    "quantize": """\
examples:
  deltaic quantize Qwen/Qwen3.5-0.8B -o qwen-0.8b-int4
  deltaic quantize ./my-checkpoint -o packed --dtype int4,lm_head=int8,layers.0.*=bf16
  deltaic run qwen-0.8b-int4 "Why is the sky blue?"

A dtype is int4, int8, bf16 or f32, and may be followed by PATTERN=DTYPE pairs for tensors whose names match.
""",
    "bench": """\
examples:
  deltaic bench ./packed
  deltaic bench Qwen/Qwen3.5-0.8B --dtype int8 --prompt 2048 --new 64
  deltaic bench ./packed --json > result.json
""",
    "info": """\
examples:
  deltaic info
  deltaic info ./my-checkpoint
  deltaic info Qwen/Qwen3.5-0.8B --json
""",
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as an ArgumentError, so that it becomes one line like every other user error."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (see: {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="deltaic",
        description="Run Qwen3.5 models fast on this machine.",
        epilog=_EXAMPLES[None],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(function=globals()[f"_{name}"])
        return sub

    run = command("run", "answer one question")
    run.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a Hugging Face hub id")
    run.add_argument(
        "question", nargs="?", help="the question; text piped to stdin is put after it, or is the question"
    )
    run.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture to look at; may be repeated"
    )
    run.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the answer")
    _add_thinking(run)
    _add_sampling(run)
    _add_machine(run)

    chat = command("chat", "hold a conversation")
    chat.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a Hugging Face hub id")
    chat.add_argument(
        "--session", metavar="FILE", help="continue the conversation in this file, and save it there at the end"
    )
    _add_thinking(chat)
    _add_sampling(chat)
    _add_machine(chat)

    demo = command("demo", "let the bundled miniature model look at a picture; needs no download")
    demo.add_argument("question", nargs="?", default=DEMO_QUESTION, help=f"default: {DEMO_QUESTION}")
    demo.add_argument("--image", metavar="FILE", help="your own picture of coloured shapes; default: a bundled one")
    _add_machine(demo)

    quantize = command("quantize", "pack a checkpoint into a folder that loads at once and takes less memory")
    quantize.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a Hugging Face hub id")
    quantize.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to make")
    quantize.add_argument("--dtype", default="int4", help="int4 (default), int8, bf16 or f32, then PATTERN=DTYPE pairs")
    quantize.add_argument("--vision-dtype", metavar="DTYPE", help="for the vision tower; default: bf16")
    quantize.add_argument("--overwrite", action="store_true", help="replace DIR if it is a packed folder already")
    quantize.add_argument("--threads", type=int, metavar="N", help="threads to compute with; default: physical cores")

    bench = command("bench", "measure prefill and decode speed, latency, load time and memory")
    bench.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a Hugging Face hub id")
    bench.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    bench.add_argument("--new", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    bench.add_argument("--repeat", type=int, default=5, metavar="N", help="runs; medians are shown (default 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine(bench)

    info = command("info", "show facts about this installation and, with MODEL, about a checkpoint")
    info.add_argument("model", nargs="?", metavar="MODEL", help="folder of a checkpoint, or a Hugging Face hub id")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_thinking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let the model think before it answers, or not; default: as the model's chat template has it",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "defaults: the checkpoint's, else those recommended for the family")
    group.add_argument("--temperature", type=float, help="0 = always the most probable token")
    group.add_argument("--top-k", type=int, help="keep the k most probable tokens; 0 = off")
    group.add_argument("--top-p", type=float, help="keep the smallest set of tokens reaching this probability; 1 = off")
    group.add_argument("--min-p", type=float, help="drop tokens less probable than this times the best; 0 = off")
    group.add_argument("--presence-penalty", type=float, help="against tokens used before; 0 = off")
    group.add_argument("--frequency-penalty", type=float, help="against tokens used often; 0 = off")
    group.add_argument("--repetition-penalty", type=float, help="against tokens of prompt and answer; 1 = off")
    group.add_argument("--seed", type=int, help="same seed, same answer")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="at most this many tokens, thinking included")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--dtype",
        help="how weights are stored: bf16 (default), f32, int8 or int4, then PATTERN=DTYPE pairs for single tensors, "
        "all separated by commas; a packed folder has its own",
    )
    group.add_argument("--vision-dtype", metavar="DTYPE", help="the same for the vision tower; default: bf16")
    group.add_argument(
        "--activations",
        default="int8",
        help="with int8 and int4 weights: int8 (default, fast), or float32 (unrounded)",
    )
    group.add_argument(
        "--kv-dtype",
        metavar="DTYPE",
        help="how keys and values of the context are stored: bf16 (default), f32, or int8 (half the memory)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with; default: physical cores")
    group.add_argument(
        "--context", type=int, metavar="N", help="room for N tokens, checked up front; default: the model's limit"
    )
    group.add_argument(
        "--cache-bytes",
        metavar="SIZE",
        help="memory for what was read before, such as 500M or 4G; 0 = off; default: a quarter of what is free",
    )
    group.add_argument(
        "--speculate",
        default="auto",
        metavar="MODE",
        help="auto (default), mtp, lookup or off: draft tokens and verify several at once; the answer stays the same",
    )
    group.add_argument("--cache-folder", metavar="DIR", help="keep what was read before here, for later runs too")
    group.add_argument("--device", default="cpu", help="cpu (default), or reference: plain numpy, slow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the answer
            stream.reconfigure(errors="replace")
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.version:
            import deltaic

            print(f"deltaic {deltaic.__version__}")
            return 0
        if args.command is None:
            parser.error("expected a command: run, chat, demo, quantize, bench or info")
        code: int = args.function(args)
        sys.stdout.flush()
        return code
    except DeltaicError as error:
        _say(f"deltaic: {_one_line(error)}")
        return 2
    except KeyboardInterrupt:
        _say("")
        return 130
    except BrokenPipeError:
        # the reader has gone; what is still buffered must not raise again when the interpreter closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError) as error:
        _say(f"deltaic: failed: {_one_line(error) or type(error).__name__}")
        return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(text: str, *, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text and sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


# ------------------------------------------------------------------------------- parts


def _load(path_or_id: str, args: argparse.Namespace) -> Model:
    from .loading import load

    return load(
        path_or_id,
        dtype=None if args.dtype is None else _dtype(args.dtype),
        vision_dtype=args.vision_dtype,
        kv_dtype=args.kv_dtype,
        activations=args.activations,
        device=args.device,
        threads=args.threads,
        context=args.context,
        cache_bytes=_size("--cache-bytes", args.cache_bytes),
        cache_folder=args.cache_folder,
        speculate=args.speculate,
    )


def _dtype(text: str) -> str | dict[str, str]:
    """What `--dtype` means: "int4", or "int4,lm_head=int8,layers.0.*=bf16"."""
    first, *pairs = text.split(",")
    if "=" in first:
        pairs.insert(0, first)
        rules = {}
    elif not pairs:
        return first
    else:
        rules = {"default": first}
    for pair in pairs:
        pattern, equals, name = pair.rpartition("=")
        if not equals or not pattern.strip():
            raise ArgumentError(f"--dtype: expected DTYPE or PATTERN=DTYPE between commas, found {pair!r}")
        rules[pattern.strip()] = name.strip()
    return rules


def _size(name: str, text: str | None) -> int | None:
    """Bytes of a size such as "500M" (powers of 1024); None for None."""
    if text is None:
        return None
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in tuple("KMGT") else (text, "")
    if not digits.isdecimal() or len(digits) > 15:
        raise ArgumentError(f"{name}: expected a size such as 0, 500M or 4G, found {text[:40]!r}")
    return int(digits) * 1024 ** (" KMGT".index(unit) if unit else 0)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Generation options given on the command line, checked before a model is loaded for minutes."""
    from .arguments import integer
    from .generate.sampling import GenerationOptions, resolve_sampling
    from .generate.stop import check_stop

    options = {name: getattr(args, name, None) for name in GenerationOptions.__annotations__ if name != "speculate"}
    options = {name: value for name, value in options.items() if value is not None}
    resolve_sampling(options, {}, {})
    check_stop(options.get("stop"))
    if "max_new_tokens" in options:
        integer("max_new_tokens", options["max_new_tokens"], 1, 2**31 - 1)
    return options


def _image_file(name: str) -> Path:
    """A picture named on the command line: a readable file."""
    path = Path(name)
    if not path.is_file():
        raise ImageError(f"{name}: no such picture file" if not path.exists() else f"{name}: not a file")
    return path


def _piped_stdin() -> str | None:
    """Text on stdin if it is a pipe or a file, None if it is a terminal, a device or closed."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # replaced by an object without a file
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return None
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin: expected UTF-8 text, found byte 0x{raw[error.start]:02x} at {error.start}") from None


def _write(stream: Stream) -> GenerationResult:
    """Show an answer as it comes: thinking on stderr, the answer on stdout. Ends both with a line break."""
    thinking, last = False, "\n"
    for piece in stream:
        if not piece.text:
            continue
        if piece.reasoning:
            thinking = True
            _say(_dim(piece.text), end="")
            continue
        if thinking:
            _say("\n")
            thinking = False
        print(piece.text, end="", flush=True)
        last = piece.text
    if thinking:
        _say("")
    if not last.endswith("\n"):
        print(flush=True)
    return stream.result


def _figures(result: GenerationResult) -> str:
    return (
        f"{result.prompt_tokens} prompt tokens"
        + (f" ({result.cached_tokens} from the cache)" if result.cached_tokens else "")
        + f", {result.completion_tokens} new tokens, "
        f"first token after {result.time_to_first_token:.2f} s, {result.tokens_per_second:.1f} tokens/s"
        + (", stopped at max_new_tokens" if result.finish_reason == "length" else "")
    )


def _user_message(text: str, images: Sequence[Path]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": str(image)} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


# ------------------------------------------------------------------------------- commands


def _run(args: argparse.Namespace) -> int:
    options = _options(args)
    images = [_image_file(name) for name in args.image]
    piped = _piped_stdin()
    question = "\n\n".join(part for part in (args.question, piped and piped.strip()) if part)
    if not question:
        raise PromptError('no question: give one ("deltaic run MODEL QUESTION") or pipe text to stdin')
    model = _load(args.model, args)
    with model.stream([_user_message(question, images)], thinking=args.thinking, **options) as stream:
        result = stream.finish() if args.json else _write(stream)
    if args.json:
        print(json.dumps(_result_facts(result), ensure_ascii=False))
    _say(_dim(_figures(result)))
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


def _chat(args: argparse.Namespace) -> int:
    options = _options(args)
    if args.thinking is not None:
        options["thinking"] = args.thinking
    path = None if args.session is None else _session_file(args.session)
    model = _load(args.model, args)
    session = model.session(**options)
    if path is not None and path.exists():
        session = model.load_session(path)
        session.settings.update(options)
        _say(_dim(f"{path}: {_turns(session)} turns"))
    before = list(session.messages)
    try:
        _converse(session)
    finally:
        if path is not None and session.messages != before:
            session.save(path)
    return 0


def _converse(session: Session) -> None:
    """Talk until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # not on every platform; input() works without
            import readline  # noqa: F401  (line editing and history for input())
        _say(_dim("/image FILE shows a picture, /undo takes a turn back, /reset starts again, /exit or Ctrl-D ends"))
        _say(_dim("Ctrl-C stops an answer"))
    images: list[Path] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                _say("")
            return
        except KeyboardInterrupt:
            _say("\n" + _dim("Ctrl-D or /exit ends the conversation"))
            continue
        except UnicodeDecodeError:
            _say("deltaic: the line is not valid UTF-8 text")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            session.messages.clear()
            images = []
            _say(_dim("a new conversation"))
        elif line == "/undo":
            try:
                session.undo()
                _say(_dim(f"taken back; {_turns(session)} turns"))
            except ArgumentError:
                _say("deltaic: there is nothing to take back")
        elif line.startswith("/image"):
            try:
                images.append(_image_file(line.removeprefix("/image").strip()))
                _say(_dim(f"{images[-1].name} goes with the next message"))
            except ImageError as error:
                _say(f"deltaic: {_one_line(error)}")
        elif line.startswith("/"):
            _say(f"deltaic: {line.split()[0]}: unknown; there are /image FILE, /undo, /reset and /exit")
        elif line:
            _answer(session, line, images)
            images = []


def _answer(session: Session, text: str, images: list[Path]) -> None:
    """One turn: after an error the conversation stands where it stood; Ctrl-C keeps the answer up to there."""
    stream = None
    try:
        stream = session.stream(text, images=images)
        result = _write(stream)
    except DeltaicError as error:
        _say(f"deltaic: {_one_line(error)}")
        return
    except KeyboardInterrupt:
        _say("")
        if stream is None:
            return
        stream.close()
        result = stream.result
    _say(_dim(_figures(result)))


def _turns(session: Session) -> int:
    return sum(message.get("role") == "user" for message in session.messages)


def _session_file(name: str) -> Path:
    """A file that can be written at the end: said now, not after a long conversation."""
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise StateError(f"--session: {name} cannot be a file there; expected a file name in a folder that exists")
    return path


def _demo(args: argparse.Namespace) -> int:
    pictures = sorted((MINIATURE / "pictures").glob("*.png"))
    image = _image_file(args.image) if args.image else pictures[0]
    model = _load(str(MINIATURE), args)
    print(f"picture:  {image}\nquestion: {args.question}\nanswer:   ", end="", flush=True)
    with model.stream([_user_message(args.question, [image])]) as stream:
        result = _write(stream)
    _say(_dim(_figures(result)))
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from .weights.quantize import quantize

    folder = quantize(
        args.model,
        args.output,
        dtype=_dtype(args.dtype),
        vision_dtype=args.vision_dtype,
        overwrite=args.overwrite,
        threads=args.threads,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    _say(f"{folder}: {_readable('bytes', size)}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .benchmark import as_table, check_lengths, measure

    check_lengths(args.prompt, args.new, args.repeat)
    facts = measure(lambda: _load(args.model, args), prompt=args.prompt, new=args.new, repeat=args.repeat)
    print(json.dumps(facts, ensure_ascii=False) if args.json else as_table(facts))
    return 0


def _info(args: argparse.Namespace) -> int:
    from .facts import checkpoint_facts, installation_facts

    facts = {"deltaic": installation_facts()}
    if args.model is not None:
        facts["model"] = checkpoint_facts(args.model)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for part in facts.values():
        width = max(len(name) for name in part)
        for name, value in part.items():
            print(f"{name.replace('_', ' '):{width}}  {_readable(name, value)}")
    return 0


def _readable(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith(("bytes", "memory")):
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
    return f"{value:,}" if isinstance(value, int) else str(value)
