"""Which model is this? A name for configuration, weights and storage format, so that a state is not fed to another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from .checkpoint import Checkpoint
    from .packed import PackedFile
    from .precision import Precision

SAMPLES, SAMPLE_BYTES = 3, 256  # of each tensor


def model_fingerprint(checkpoint: Checkpoint, config: ModelConfig, precision: Precision) -> str:
    """SHA-256 (hex) of the configuration, of how matrices are stored (`precision`), and of each tensor's name, shape,
    stored dtype and 256 bytes each from its beginning, middle and end.

    Reads about 1 KB a tensor from the mapped file, so it costs milliseconds. Stable over machines, instruction sets,
    folders and releases; any training step changes it, as it moves all numbers of a tensor.
    """
    known = hashlib.sha256(json.dumps([asdict(config), asdict(precision)], sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        known.update(json.dumps([name, list(tensor.shape), tensor.dtype]).encode())
        data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
        for start in np.linspace(0, max(0, len(data) - SAMPLE_BYTES), SAMPLES).astype(np.int64).tolist():
            known.update(data[start : start + SAMPLE_BYTES].tobytes())
    return known.hexdigest()


def packed_fingerprint(packed: PackedFile, config: ModelConfig, precision: Precision) -> str:
    """The same for a packed folder, whose header holds a digest over the checksums of all tensors."""
    parts = [asdict(config), asdict(precision), packed.digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
