"""How much memory is for what? Weights and one sequence are checked against what is free before a model is loaded; the
prefix cache gets a share of what is left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .errors import ArgumentError
from .machine import available_bytes, memory_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from .model.state import State
    from .weights.checkpoint import Checkpoint

CACHE_SHARE = 0.25  # of the memory that is free after loading, for the prefix cache by default
FALLBACK_BYTES = 4 << 30  # where the system does not tell how much memory it has

_WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "int8": 8.125 / 8, "int4": 4.375 / 8}  # per element, scales included


def checkpoint_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """About what a checkpoint's weights take when they are packed as `dtype`."""
    return int(sum(math.prod(t.shape) for t in checkpoint.tensors.values()) * _WEIGHT_BYTES[dtype])


def free_bytes(ops: ModuleType) -> int | None:
    """Bytes that can be had where an op set keeps its arrays; None where the system does not tell."""
    of_device = getattr(ops, "free_bytes", None)
    return available_bytes() if of_device is None else of_device()


def check_context(ops: ModuleType, weights: int, blank: State, context: int) -> None:
    """Raise ArgumentError if `weights` bytes and one sequence of `context` tokens do not fit into the free memory."""
    free = free_bytes(ops)
    sequence = blank.bytes_for(context)
    if free is not None and sequence + weights > free:
        raise ArgumentError(
            f"context: {context} tokens need {sequence / 1e9:.2f} GB for K/V and state beside {weights / 1e9:.2f} GB "
            f"of weights, and {free / 1e9:.2f} GB of memory is available; ask for a shorter context, or kv_dtype='int8'"
        )


def default_sequence_bytes(ops: ModuleType) -> int:
    """Half of the memory that is free now: what the sequences of a scheduler may take by default."""
    free = free_bytes(ops)
    return (free if free is not None else FALLBACK_BYTES) // 2


def default_cache_bytes(ops: ModuleType, blank: State, context: int | None) -> int:
    """A quarter of the free memory, after taking off what one sequence of the `context` that was asked for needs."""
    free = free_bytes(ops)
    if free is None:
        free = (memory_bytes() or FALLBACK_BYTES) // 2
    return max(0, int(CACHE_SHARE * (free - (blank.bytes_for(context) if context else 0))))
