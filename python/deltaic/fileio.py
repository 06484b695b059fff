"""How are files read? The small ones beside a checkpoint as UTF-8 text or JSON objects of bounded size; parts of large
ones from several threads at once."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

from .errors import ConfigError

MAX_TEXT_BYTES = 16 << 20  # config.json and tokenizer_config.json are about 10 KiB; a template about 8 KiB

_SEEKING = threading.Lock()  # where a file has one position for all threads


def read_text(path: Path) -> str:
    """Text of the UTF-8 file `path`. Raises ConfigError if it is missing, not a regular file, over 16 MiB or not UTF-8,
    or cannot be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe would wait for ever
            raise ConfigError(f"{path}: not a regular file; expected a text file")
        if status.st_size > MAX_TEXT_BYTES:
            raise ConfigError(
                f"{path}: expected at most {MAX_TEXT_BYTES} bytes, found {status.st_size}; this is not a file of this "
                "kind"
            )
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: does not exist; expected the files of a Hugging Face checkpoint there") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found other bytes at offset {error.start}; fetch it again"
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises ConfigError if it cannot be read or holds anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON, found text that does not parse ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch it again")
    return value


def read_at(file: Any, position: int, into: memoryview) -> int:
    """Fill `into` from `position` of an unbuffered file on, as far as the file goes; the bytes read. Raises OSError."""
    total = 0
    while total < len(into):
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [into[total:]], position + total)
        else:
            with _SEEKING:
                file.seek(position + total)
                count = file.readinto(into[total:])
        if not count:
            break
        total += count
    return total
