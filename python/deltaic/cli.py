"""The command line: `deltaic run | chat | demo | info`. Holds no logic that the Python API lacks; answers go to stdout,
all else to stderr.

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

from .errors import ArgumentError, DeltaicError, ImageError, PromptError

if TYPE_CHECKING:
    from .api import Model
    from .generate.loop import Stream
    from .generate.result import GenerationResult

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
  /reset        forget the conversation
  /exit         leave (as does Ctrl-D); Ctrl-C stops an answer

examples:
  deltaic chat Qwen/Qwen3.5-0.8B
  deltaic chat Qwen/Qwen3.5-4B --no-thinking --threads 4
""",
    "demo": """\
examples:
  deltaic demo
  deltaic demo "How many objects are there?"
  deltaic demo --image drawing.png "What colour is the circle?"
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
    _add_thinking(chat)
    _add_sampling(chat)
    _add_machine(chat)

    demo = command("demo", "let the bundled miniature model look at a picture; needs no download")
    demo.add_argument("question", nargs="?", default=DEMO_QUESTION, help=f"default: {DEMO_QUESTION}")
    demo.add_argument("--image", metavar="FILE", help="your own picture of coloured shapes; default: a bundled one")
    _add_machine(demo)

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
    group.add_argument("--dtype", default="bf16", help="how weights are stored: bf16 (default) or f32")
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with; default: physical cores")
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
            parser.error("expected a command: run, chat, demo or info")
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
    from .api import load

    return load(path_or_id, dtype=args.dtype, device=args.device, threads=args.threads)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Generation options given on the command line, checked before a model is loaded for minutes."""
    from .arguments import integer
    from .generate.sampling import GenerationOptions, resolve_sampling
    from .generate.stop import check_stop

    options = {name: getattr(args, name, None) for name in GenerationOptions.__annotations__}
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
        f"{result.prompt_tokens} prompt tokens, {result.completion_tokens} new tokens, "
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
        "completion_tokens": result.completion_tokens,
        "time_to_first_token": round(result.time_to_first_token, 4),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "token_ids": result.token_ids,
    }


def _chat(args: argparse.Namespace) -> int:
    options = _options(args)
    model = _load(args.model, args)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # not on every platform; input() works without
            import readline  # noqa: F401  (line editing and history for input())
        _say(_dim("/image FILE shows a picture, /reset starts again, /exit or Ctrl-D ends, Ctrl-C stops an answer"))
    messages: list[dict[str, Any]] = []
    images: list[Path] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                _say("")
            return 0
        except KeyboardInterrupt:
            _say("\n" + _dim("Ctrl-D or /exit ends the conversation"))
            continue
        except UnicodeDecodeError:
            _say("deltaic: the line is not valid UTF-8 text")
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            messages, images = [], []
            _say(_dim("a new conversation"))
        elif line.startswith("/image"):
            try:
                images.append(_image_file(line.removeprefix("/image").strip()))
                _say(_dim(f"{images[-1].name} goes with the next message"))
            except ImageError as error:
                _say(f"deltaic: {_one_line(error)}")
        elif line.startswith("/"):
            _say(f"deltaic: {line.split()[0]}: unknown; there are /image FILE, /reset and /exit")
        elif line:
            answer = _answer(model, [*messages, _user_message(line, images)], args, options)
            if answer is not None:  # after an error the conversation stands where it stood
                messages += [_user_message(line, images), {"role": "assistant", "content": answer}]
            images = []


def _answer(
    model: Model, messages: list[dict[str, Any]], args: argparse.Namespace, options: dict[str, Any]
) -> str | None:
    """One turn of a conversation: the answer, cut where Ctrl-C stopped it; None where the turn was refused."""
    stream = None
    try:
        stream = model.stream(messages, thinking=args.thinking, **options)
        result = _write(stream)
    except DeltaicError as error:
        _say(f"deltaic: {_one_line(error)}")
        return None
    except KeyboardInterrupt:
        _say("")
        if stream is None:
            return None
        stream.close()
        result = stream.result
    _say(_dim(_figures(result)))
    return result.text


def _demo(args: argparse.Namespace) -> int:
    pictures = sorted((MINIATURE / "pictures").glob("*.png"))
    image = _image_file(args.image) if args.image else pictures[0]
    model = _load(str(MINIATURE), args)
    print(f"picture:  {image}\nquestion: {args.question}\nanswer:   ", end="", flush=True)
    with model.stream([_user_message(args.question, [image])]) as stream:
        result = _write(stream)
    _say(_dim(_figures(result)))
    return 0


def _info(args: argparse.Namespace) -> int:
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


def installation_facts() -> dict[str, Any]:
    """Version, kernels and what this process may use of the machine."""
    import platform

    import deltaic

    from .api import op_set
    from .machine import default_threads, memory_bytes
    from .ops.cuda_device import facts as cuda_facts

    try:
        isa = op_set("cpu").isa()
    except DeltaicError as error:  # the one fact that may be missing, and the reason to have asked
        isa = f"none ({_one_line(error)})"
    return {
        "version": deltaic.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": isa,
        "threads": default_threads(),
        "memory": memory_bytes(),
        **cuda_facts(),
    }


def checkpoint_facts(path_or_id: str) -> dict[str, Any]:
    """What a checkpoint holds, from its configuration and the headers of its files; no weight is read."""
    from .model.config import load_config
    from .weights.checkpoint import open_checkpoint
    from .weights.hub import find_model

    folder = find_model(path_or_id)
    config = load_config(folder)
    text = config.text
    with open_checkpoint(folder) as checkpoint:
        tensors = list(checkpoint.tensors.values())

    def count(prefixes: tuple[str, ...]) -> int:
        return sum(_elements(t.shape) for t in tensors if t.name.startswith(prefixes))

    return {
        "folder": str(folder),
        "architecture": config.architecture,
        "layers": f"{text.num_delta_layers} gated delta net, {text.num_attention_layers} gated attention",
        "experts": f"{text.num_experts}, {text.num_experts_per_tok} per token" if text.is_moe else "none (dense)",
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "parameters": count(("",)),
        "vision_parameters": count(("model.visual.", "visual.")),
        "mtp_parameters": count(("mtp.",)),
        "tensors": len(tensors),
        "file_bytes": sum(t.nbytes for t in tensors),
        "stored_as": ", ".join(sorted({t.dtype for t in tensors})),
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
