"""Which module computes on a device, and what of it belongs to the whole process: its lock and its threads."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

from ..arguments import choice, integer
from ..errors import DeviceError
from ..machine import default_threads
from .layout import KV_DTYPES

DEVICES = ("cpu", "cuda", "reference")
MAX_THREADS = 1024

# one lock per op set: its thread pool and thread count belong to the process, not to a model
_OPS_LOCKS: dict[str, Any] = {}


def ops_lock(ops: Any) -> Any:
    """The lock of an op set (re-entrant: a signal handler may use a model between two of its operators)."""
    return _OPS_LOCKS.setdefault(ops.__name__, threading.RLock())


def op_set(device: str) -> ModuleType:
    """The module that computes on `device`. Raises ArgumentError or DeviceError."""
    choice("device", device, DEVICES)
    if device == "cuda":
        from . import cuda

        cuda.device()
        return cuda
    if device == "reference":
        from . import reference

        return reference
    try:
        from . import cpu
    except ImportError as error:
        raise DeviceError(
            f"device: the compiled extension cannot be loaded ({error}); install deltaic again"
        ) from error
    return cpu


def kv_dtypes(ops: ModuleType) -> list[str]:
    """Which of KV_DTYPES an op set has kernels for."""
    return sorted(name for name in KV_DTYPES if name != "int8" or not getattr(ops, "device_resident", False))


def use_threads(ops: ModuleType, threads: int | None) -> int:
    """Let an op set use `threads` threads (None: the physical cores this process may use) and return the number."""
    chosen = default_threads() if threads is None else integer("threads", threads, 1, MAX_THREADS)
    with ops_lock(ops):
        ops.set_num_threads(chosen)
    return chosen
