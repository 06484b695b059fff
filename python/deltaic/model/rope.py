"""Which angle does each token turn each pair of dims by? The rotary tables of the text model (partial, three axes
interleaved, optionally YaRN) and of the vision tower (two axes), in numpy, shared by all op sets."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .config import RopeConfig

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

YARN_BETA_FAST, YARN_BETA_SLOW = 32, 1  # rotations over the original context between which frequencies are blended
VISION_THETA = 10000.0
_CHUNK = 256  # text positions whose angles are computed together
_CHUNKS = 16  # that are kept: sequences that are decoded in turns have one each


class TextRope:
    """cos and sin of the attention layers: `TextRope(config.rope)(positions)`."""

    def __init__(self, rope: RopeConfig):
        self.inverse_frequencies, self.scale = inverse_frequencies(rope)
        self.axes = mrope_axes(rope)
        self._chunks: OrderedDict[int, tuple[Floats, Floats]] = OrderedDict()

    def __call__(self, positions: Ints) -> tuple[Floats, Floats]:
        """positions int64 [T, 3] (temporal, height, width) -> cos, sin float32 [T, R/2].

        The angle is a float32 product as in Qwen3.5; its cosine is taken in double precision, as it may be 262144 rad.
        """
        angles = (positions[:, self.axes].astype(np.float32) * self.inverse_frequencies).astype(np.float64)
        return _scaled(np.cos(angles), self.scale), _scaled(np.sin(angles), self.scale)

    def text(self, spans: Sequence[tuple[int, int]]) -> tuple[Floats, Floats]:
        """The same for text tokens, whose three positions are equal: for each (first, n) those from `first` on, not to
        be written. They come from angles computed for many at once: a decoded token costs a look-up."""
        if len(spans) == 1:  # the common case
            first, n = spans[0]
            index, row = divmod(first, _CHUNK)
            if row + n <= _CHUNK:
                cos, sin = self._chunk(index)
                return cos[row : row + n], sin[row : row + n]
        parts = []
        for first, n in spans:
            while n:
                index, row = divmod(first, _CHUNK)
                cos, sin = self._chunk(index)
                taken = min(n, _CHUNK - row)
                parts.append((cos[row : row + taken], sin[row : row + taken]))
                first, n = first + taken, n - taken
        return np.concatenate([cos for cos, _ in parts]), np.concatenate([sin for _, sin in parts])

    def _chunk(self, index: int) -> tuple[Floats, Floats]:
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self(np.repeat(np.arange(index * _CHUNK, (index + 1) * _CHUNK)[:, None], 3, axis=1))
            self._chunks[index] = chunk
            if len(self._chunks) > _CHUNKS:
                self._chunks.popitem(last=False)
        return chunk


def _scaled(x: npt.NDArray[np.float64], scale: float) -> Floats:
    return (x * scale).astype(np.float32, order="C")


def mrope_axes(rope: RopeConfig) -> Ints:
    """The axis (0 temporal, 1 height, 2 width) that turns each frequency: [R/2].

    Interleaved: height at f % 3 == 1 and width at f % 3 == 2 while f < 3 * section, temporal elsewhere.
    Source: Qwen3.5, Qwen3_5TextRotaryEmbedding.recomposition_frequencies.
    """
    axes = np.zeros(rope.rotary_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * rope.mrope_section[axis] : 3] = axis
    return axes


def inverse_frequencies(rope: RopeConfig) -> tuple[Floats, float]:
    """Angles per position, float32 [R/2], and the factor on cos and sin.

    default: theta^(-2f/R), factor 1. yarn: those of more than 32 rotations over the original context are kept, those of
    less than 1 are divided by `factor`, a linear ramp over f lies between; cos and sin grow by 0.1 ln(factor) + 1.
    Source: Peng et al., "YaRN" (2023); transformers, modeling_rope_utils.py.
    """
    R = rope.rotary_dim
    plain = rope.theta ** (-np.arange(0, R, 2) / R)
    if rope.rope_type == "default":
        return plain.astype(np.float32), 1.0

    def frequency_index(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / rotations
        return R * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(frequency_index(YARN_BETA_FAST)), 0)
    high = min(math.ceil(frequency_index(YARN_BETA_SLOW)), R - 1)
    ramp = np.clip((np.arange(R // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return (plain * (1 - ramp) + plain / rope.factor * ramp).astype(np.float32), scale


def vision_rope(row: Ints, col: Ints, head_dim: int) -> tuple[Floats, Floats]:
    """cos and sin of the patches at `row`, `col` [P]: float32 [P, head_dim/2], turned by row, then by column.

    Frequencies 10000^(-2j/(head_dim/2)), j = 0 .. head_dim/4 - 1. Source: Qwen3.5, Qwen3_5VisionRotaryEmbedding.
    """
    half = head_dim // 2
    frequencies = (VISION_THETA ** (-np.arange(0, half, 2) / half)).astype(np.float32)
    angles = np.concatenate([row[:, None] * frequencies, col[:, None] * frequencies], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
