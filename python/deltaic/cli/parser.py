"""Which commands, arguments and options are there? What they mean is in `arguments`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import ArgumentError
from .answer import DEMO_QUESTION

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
        return sub

    run = command("run", "answer one question")
    _add_model(run)
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
    _add_model(chat)
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
    _add_model(quantize)
    quantize.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to make")
    quantize.add_argument("--dtype", default="int4", help="int4 (default), int8, bf16 or f32, then PATTERN=DTYPE pairs")
    quantize.add_argument("--vision-dtype", metavar="DTYPE", help="for the vision tower; default: bf16")
    quantize.add_argument("--overwrite", action="store_true", help="replace DIR if it is a packed folder already")
    quantize.add_argument("--threads", type=int, metavar="N", help="threads to compute with; default: physical cores")

    bench = command("bench", "measure prefill and decode speed, latency, load time and memory")
    _add_model(bench)
    bench.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    bench.add_argument("--new", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    bench.add_argument("--repeat", type=int, default=5, metavar="N", help="runs; medians are shown (default 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine(bench)

    info = command("info", "show facts about this installation and, with MODEL, about a checkpoint")
    _add_model(info, nargs="?")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_model(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    help = "folder of a checkpoint, or a Hugging Face hub id"
    parser.add_argument("model", nargs=nargs, metavar="MODEL", help=help)


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
    group.add_argument(
        "--no-screen",
        action="store_true",
        help="keep no sketch of the output head, which makes tokens faster and takes 4.4 bits for each of its numbers",
    )
    group.add_argument("--cache-folder", metavar="DIR", help="keep what was read before here, for later runs too")
    group.add_argument("--device", default="cpu", help="cpu (default), or reference: plain numpy, slow")
