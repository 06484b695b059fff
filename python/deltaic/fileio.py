"""Reading a file from several threads at once."""

from __future__ import annotations

import os
import threading
from typing import Any

_SEEKING = threading.Lock()  # where a file has one position for all threads


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
