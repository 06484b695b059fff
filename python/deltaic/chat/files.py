"""How are the small files beside a checkpoint read? As UTF-8 text or JSON objects of bounded size; anything else is
a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaic.errors import ConfigError

MAX_FILE_BYTES = 16 << 20  # tokenizer_config.json of the family is about 10 KiB; a template about 8 KiB


def read_text(path: Path) -> str:
    """Text of the UTF-8 file `path`. Raises ConfigError if it cannot be read, is over 16 MiB or is not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}; this is not a file of this kind"
            )
        return path.read_bytes().decode("utf-8")
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
