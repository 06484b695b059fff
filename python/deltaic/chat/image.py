"""How does a picture become patches? Target size, exact resize, patch grid and, on request, normalised pixels in the
reference layout."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, ConfigError, ImageError
from ..fileio import read_json_object
from . import image_source
from .resize import resize_bicubic

MAX_ASPECT_RATIO = 200  # the reference refuses anything longer
MAX_TARGET_PIXELS = image_source.MAX_PIXELS


@dataclass(frozen=True, eq=False)
class ImageInput:
    """A picture as the vision tower takes it.

    pixels uint8 [h, w, 3], already resized, h and w multiples of patch_size * merge_size; mean, std: per channel, for
    samples in 0..1.
    """

    pixels: NDArray[np.uint8]
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time (1), height and width."""
        return 1, self.pixels.shape[0] // self.patch_size, self.pixels.shape[1] // self.patch_size

    @property
    def token_grid(self) -> tuple[int, int]:
        """Placeholders that this picture takes in the prompt, along height and width: one per merge_size x merge_size
        patches."""
        return self.grid[1] // self.merge_size, self.grid[2] // self.merge_size

    @property
    def num_tokens(self) -> int:
        """Placeholders that this picture takes in the prompt."""
        return math.prod(self.token_grid)

    @cached_property
    def digest(self) -> str:
        """sha256 over shape and pixels, in hexadecimal: equal digests mean equal vision features."""
        hasher = hashlib.sha256(repr(self.pixels.shape).encode())
        hasher.update(self.pixels.tobytes())
        return hasher.hexdigest()

    def pixel_values(self) -> NDArray[np.float32]:
        """Normalised patches float32 [P, 3 * temporal * patch * patch], rows in merge-block order, columns (channel,
        frame, y, x).

        The single frame is repeated along time. `(p - 255 mean) / (255 std)` in float32, as torchvision's fused
        normalisation."""
        _, rows, columns = self.grid
        patch, merge = self.patch_size, self.merge_size
        blocks = self.pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, patch * patch)
        values = np.empty((rows * columns, 3, self.temporal_patch_size, patch * patch), np.float32)
        levels = np.arange(256, dtype=np.float32)
        for channel in range(3):
            mean = np.float32(self.mean[channel]) * np.float32(255)
            std = np.float32(self.std[channel]) * np.float32(255)
            values[:, channel] = ((levels - mean) / std)[patches[:, channel]][:, None]
        return values.reshape(rows * columns, -1)


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that a picture is resized to: multiples of `factor`, area within the limits where possible,
    ratio nearly kept.

    The "smart resize" rule of Qwen2-VL, with halves rounded to even. Raises ValueError for a side ratio above 200."""
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"expected sides in a ratio of at most {MAX_ASPECT_RATIO}, found {height} x {width} (ratio {ratio:g})"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing parameters of a checkpoint. min_pixels and max_pixels are areas after resizing."""

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageProcessor:
        """Read `preprocessor_config.json`, or the `image_processor` part of `processor_config.json`, in `folder`.

        Raises ConfigError if there is neither, if a needed key is missing or absurd, or if a key asks for something
        other than the family's preprocessing (bicubic, rescaling by 1/255, normalisation, RGB)."""
        folder = Path(folder)
        path = folder / "preprocessor_config.json"
        values: Any = None
        if path.is_file():
            values = read_json_object(path)
        elif (folder / "processor_config.json").is_file():
            path = folder / "processor_config.json"
            values = read_json_object(path).get("image_processor")
        if not isinstance(values, dict):
            raise ConfigError(
                f"{folder}: expected preprocessor_config.json (or processor_config.json with an 'image_processor'), "
                "found neither; pictures cannot be prepared without it: fetch it from the model's page"
            )
        return _from_config(values, path)

    def process(self, image: Any, *, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageInput:
        """Load `image` (see image_source.load_rgb for the forms it may have), resize it and return it ready for the
        vision tower.

        min_pixels, max_pixels: areas that override the checkpoint's for this picture. An ImageInput is returned as
        it is. Raises ImageError for a picture that cannot be used and ArgumentError for bad limits."""
        if isinstance(image, ImageInput):
            return image
        low = self._limit("min_pixels", self.min_pixels if min_pixels is None else min_pixels)
        high = self._limit("max_pixels", self.max_pixels if max_pixels is None else max_pixels)
        if low > high:
            raise ArgumentError(f"min_pixels: expected at most max_pixels = {high}, found {low}")
        pixels, name = image_source.load_rgb(image)
        try:
            height, width = target_size(pixels.shape[0], pixels.shape[1], self.patch_size * self.merge_size, low, high)
        except ValueError as error:
            raise ImageError(f"{name}: {error}; crop it or cut it into pieces") from error
        resized = resize_bicubic(pixels, height, width)
        return ImageInput(resized, self.patch_size, self.merge_size, self.temporal_patch_size, self.mean, self.std)

    @staticmethod
    def _limit(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= MAX_TARGET_PIXELS:
            raise ArgumentError(
                f"{name}: expected a whole number of pixels from 1 to {MAX_TARGET_PIXELS}, found {value!r}"
            )
        return int(value)


# keys that would change the preprocessing, with the only value that is supported (None: absent or null is the same)
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": 3,
}


def _from_config(values: dict[str, Any], path: Path) -> ImageProcessor:
    for key, supported in _FIXED.items():
        found = values.get(key)
        if found is not None and found != supported:
            raise ConfigError(
                f"{path}: {key}: expected {supported!r}, found {found!r}; other preprocessing is not supported"
            )
    factor = values.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6)):
        raise ConfigError(
            f"{path}: rescale_factor: expected 1/255, found {factor!r}; other preprocessing is not supported"
        )
    size = values.get("size")
    size = size if isinstance(size, dict) else {}
    limits: dict[str, Any] = {}
    for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        # older files give min_pixels and max_pixels themselves, and the library lets those win
        limits[name] = values.get(name) if values.get(name) is not None else size.get(key)
        _check_integer(limits[name], f"{path}: size.{key} (an area in pixels)", MAX_TARGET_PIXELS)
    if limits["min_pixels"] > limits["max_pixels"]:
        raise ConfigError(
            f"{path}: size: expected shortest_edge <= longest_edge, "
            f"found {limits['min_pixels']} > {limits['max_pixels']}"
        )
    for key, largest in (("patch_size", 256), ("merge_size", 16), ("temporal_patch_size", 16)):
        _check_integer(values.get(key), f"{path}: {key}", largest)
    statistics = {}
    for key in ("image_mean", "image_std"):
        found = values.get(key)
        if not (isinstance(found, list) and len(found) == 3 and all(_is_number(x) and math.isfinite(x) for x in found)):
            raise ConfigError(f"{path}: {key}: expected three numbers, found {found!r}")
        statistics[key] = (float(found[0]), float(found[1]), float(found[2]))
    if min(statistics["image_std"]) <= 0:
        raise ConfigError(f"{path}: image_std: expected numbers above 0, found {values['image_std']!r}")
    return ImageProcessor(
        patch_size=values["patch_size"],
        merge_size=values["merge_size"],
        temporal_patch_size=values["temporal_patch_size"],
        min_pixels=limits["min_pixels"],
        max_pixels=limits["max_pixels"],
        mean=statistics["image_mean"],
        std=statistics["image_std"],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_integer(value: Any, where: str, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ConfigError(f"{where}: expected a whole number from 1 to {largest}, found {value!r}")
