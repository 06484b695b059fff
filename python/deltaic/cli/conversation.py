"""A conversation: `deltaic chat`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DeltaicError, ImageError, StateError
from .arguments import generation_options, image_file, load_model
from .terminal import dim, figures, one_line, say, write_answer

if TYPE_CHECKING:
    from ..session import Session


def chat(args: argparse.Namespace) -> int:
    """Talk, and keep the conversation in the file of --session."""
    options = generation_options(args)
    if args.thinking is not None:
        options["thinking"] = args.thinking
    path = None if args.session is None else _session_file(args.session)
    model = load_model(args.model, args)
    session = model.session(**options)
    if path is not None and path.exists():
        session = model.load_session(path)
        session.settings.update(options)
        say(dim(f"{path}: {_turns(session)} turns"))
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
        say(dim("/image FILE shows a picture, /undo takes a turn back, /reset starts again, /exit or Ctrl-D ends"))
        say(dim("Ctrl-C stops an answer"))
    images: list[Path] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                say("")
            return
        except KeyboardInterrupt:
            say("\n" + dim("Ctrl-D or /exit ends the conversation"))
            continue
        except UnicodeDecodeError:
            say("deltaic: the line is not valid UTF-8 text")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            session.messages.clear()
            images = []
            say(dim("a new conversation"))
        elif line == "/undo":
            try:
                session.undo()
                say(dim(f"taken back; {_turns(session)} turns"))
            except ArgumentError:
                say("deltaic: there is nothing to take back")
        elif line.startswith("/image"):
            try:
                images.append(image_file(line.removeprefix("/image").strip()))
                say(dim(f"{images[-1].name} goes with the next message"))
            except ImageError as error:
                say(f"deltaic: {one_line(error)}")
        elif line.startswith("/"):
            say(f"deltaic: {line.split()[0]}: unknown; there are /image FILE, /undo, /reset and /exit")
        elif line:
            _answer(session, line, images)
            images = []


def _answer(session: Session, text: str, images: list[Path]) -> None:
    """One turn: after an error the conversation stands where it stood; Ctrl-C keeps the answer up to there."""
    stream = None
    try:
        stream = session.stream(text, images=images)
        result = write_answer(stream)
    except DeltaicError as error:
        say(f"deltaic: {one_line(error)}")
        return
    except KeyboardInterrupt:
        say("")
        if stream is None:
            return
        stream.close()
        result = stream.result
    say(dim(figures(result)))


def _turns(session: Session) -> int:
    return sum(message.get("role") == "user" for message in session.messages)


def _session_file(name: str) -> Path:
    """A file that can be written at the end: said now, not after a long conversation."""
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise StateError(f"--session: {name} cannot be a file there; expected a file name in a folder that exists")
    return path
