"""The command line: `deltaic run | chat | demo | quantize | bench | info`. Holds no logic that the Python API lacks;
answers go to stdout, all else to stderr.

Exit codes: 0 done, 1 failed while running, 2 a wrong argument, file or prompt (one line on stderr), 130 Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DeltaicError
from .answer import DEMO_QUESTION, MINIATURE, demo, run
from .conversation import chat
from .parser import build_parser
from .terminal import one_line, say
from .tools import bench, info, quantize

__all__ = ["DEMO_QUESTION", "MINIATURE", "main"]

_COMMANDS = {"run": run, "chat": chat, "demo": demo, "quantize": quantize, "bench": bench, "info": info}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the answer
            stream.reconfigure(errors="replace")
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.version:
            print(f"deltaic {__version__}")
            return 0
        if args.command is None:
            parser.error("expected a command: run, chat, demo, quantize, bench or info")
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except DeltaicError as error:
        say(f"deltaic: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        say("")
        return 130
    except BrokenPipeError:
        # the reader has gone; what is still buffered must not raise again when the interpreter closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError) as error:
        say(f"deltaic: failed: {one_line(error) or type(error).__name__}")
        return 1
