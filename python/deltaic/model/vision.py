"""How does a picture become token vectors? The Qwen3.5 vision tower: patches, transformer blocks with two-dimensional
rotary angles, and a merger that makes one vector of each block of 2 x 2 patches. All arithmetic is in the op set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from ..ops.layout import merge_order
from .config import VisionConfig
from .rope import vision_rope
from .weights import VisionBlock, VisionWeights

Array = npt.NDArray[np.floating]
LAYER_NORM_EPS = 1e-6


class Picture(Protocol):
    """What the tower needs to know of an image: `deltaic.chat.image.ImageInput` is one."""

    @property
    def pixels(self) -> npt.NDArray[np.uint8]: ...  # [h, w, 3], already resized
    @property
    def grid(self) -> tuple[int, int, int]: ...  # (1, h / patch_size, w / patch_size)
    @property
    def mean(self) -> Sequence[float]: ...  # per channel, of pixels / 255
    @property
    def std(self) -> Sequence[float]: ...


class VisionModel:
    """The vision tower of one model on one op set.

    before_use  called once, before the first picture: what a tower that nobody has looked through yet need not do
    """

    def __init__(
        self,
        config: VisionConfig,
        weights: VisionWeights,
        ops: ModuleType,
        before_use: Callable[[], None] | None = None,
    ):
        self.config, self.weights, self.ops = config, weights, ops
        self._before_use = before_use

    def forward(self, images: Sequence[Picture]) -> Array:
        """Features [sum gh*gw/merge^2, H] of the images, one after another: the order of their placeholder tokens."""
        if self._before_use is not None and images:
            self._before_use()
            self._before_use = None
        features = [self.encode(image) for image in images]
        if not features:
            return np.zeros((0, self.config.out_hidden_size), np.float32)
        join: Any = getattr(self.ops, "concatenate", np.concatenate)  # an op set on a device has its own arrays
        return join(features)

    def encode(self, image: Picture) -> Array:
        """Features [gh*gw/merge^2, H] of one image. ImageError if its grid does not fit its pixels or the tower."""
        c, w, ops = self.config, self.weights, self.ops
        _, grid_h, grid_w = image.grid
        _check(image, c)
        x = ops.patch_embed(
            image.pixels,
            w.patch,
            w.patch_b,
            w.pos_embed,
            patch_size=c.patch_size,
            merge_size=c.spatial_merge_size,
            mean=image.mean,
            std=image.std,
        )
        row, col = merge_order(grid_h, grid_w, c.spatial_merge_size)
        cos, sin = vision_rope(row, col, c.hidden_size // c.num_heads)
        segment = np.array([0, len(row)], np.int64)
        for block in w.blocks:
            x = self._block(x, block, cos, sin, segment)
        x = ops.layer_norm(x, w.merger_norm_w, w.merger_norm_b, LAYER_NORM_EPS)
        x = x.reshape(-1, c.spatial_merge_size**2 * c.hidden_size)
        x = ops.linear(x, w.fc1, bias=w.fc1_b, activation="gelu_erf")
        return ops.linear(x, w.fc2, bias=w.fc2_b)

    def _block(self, x: Array, b: VisionBlock, cos: Array, sin: Array, cu_seqlens: npt.NDArray[np.int64]) -> Array:
        ops = self.ops
        h = ops.layer_norm(x, b.norm1_w, b.norm1_b, LAYER_NORM_EPS)
        qkv = ops.linear(h, b.qkv, bias=b.qkv_b)
        a = ops.vision_attention(
            qkv, cos, sin, num_heads=self.config.num_heads, cu_seqlens=cu_seqlens, rounded=b.qkv.dtype != "f32"
        )
        x = ops.linear(a, b.proj, bias=b.proj_b, residual=x)
        h = ops.layer_norm(x, b.norm2_w, b.norm2_b, LAYER_NORM_EPS)
        h = ops.linear(h, b.fc1, bias=b.fc1_b, activation="gelu_tanh")
        return ops.linear(h, b.fc2, bias=b.fc2_b, residual=x)


def _check(image: Picture, config: VisionConfig) -> None:
    frames, grid_h, grid_w = image.grid
    p, m = config.patch_size, config.spatial_merge_size
    if frames != 1 or grid_h < m or grid_w < m or grid_h % m or grid_w % m:
        raise ImageError(f"the image has the grid {image.grid}, expected (1, h, w) with h and w multiples of {m}")
    if image.pixels.shape != (grid_h * p, grid_w * p, 3) or image.pixels.dtype != np.uint8:
        found = f"{image.pixels.dtype}{image.pixels.shape}"
        raise ImageError(f"the image of grid {image.grid} is {found}, expected uint8({grid_h * p}, {grid_w * p}, 3)")
