"""What do the words of the command line mean? Models, dtypes, sizes, pictures and questions of their text."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, ImageError, PromptError

if TYPE_CHECKING:
    from ..api import Model


def load_model(path_or_id: str, args: argparse.Namespace) -> Model:
    """The model, with the options of the group "machine"."""
    from ..loading import load

    return load(
        path_or_id,
        dtype=None if args.dtype is None else dtype_rules(args.dtype),
        vision_dtype=args.vision_dtype,
        kv_dtype=args.kv_dtype,
        activations=args.activations,
        device=args.device,
        threads=args.threads,
        context=args.context,
        cache_bytes=size_in_bytes("--cache-bytes", args.cache_bytes),
        cache_folder=args.cache_folder,
        speculate=args.speculate,
        screen=not args.no_screen,
    )


def dtype_rules(text: str) -> str | dict[str, str]:
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


def size_in_bytes(name: str, text: str | None) -> int | None:
    """Bytes of a size such as "500M" (powers of 1024); None for None."""
    if text is None:
        return None
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in tuple("KMGT") else (text, "")
    if not digits.isdecimal() or len(digits) > 15:
        raise ArgumentError(f"{name}: expected a size such as 0, 500M or 4G, found {text[:40]!r}")
    return int(digits) * 1024 ** (" KMGT".index(unit) if unit else 0)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Generation options given on the command line, checked before a model is loaded for minutes."""
    from ..generate.options import GenerationOptions, check_options

    options = {name: getattr(args, name, None) for name in GenerationOptions.__annotations__ if name != "speculate"}
    options = {name: value for name, value in options.items() if value is not None}
    check_options(options)
    return options


def image_file(name: str) -> Path:
    """A picture named on the command line: a readable file."""
    path = Path(name)
    if not path.is_file():
        raise ImageError(f"{name}: no such picture file" if not path.exists() else f"{name}: not a file")
    return path


def piped_stdin() -> str | None:
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


def user_message(text: str, images: Sequence[Path]) -> dict[str, Any]:
    """A message for `Model.stream`, its pictures before the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": str(image)} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
