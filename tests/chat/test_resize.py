"""Resizing equals torch's uint8 antialiased bicubic kernel bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from chat_helpers import picture
from deltaic.chat.resize import axis_taps, resize_bicubic

SIZES = [
    ((1, 1), (256, 256)), ((1, 200), (32, 640)), ((2, 3), (32, 32)), ((7, 5), (320, 224)), ((31, 33), (256, 256)),
    ((100, 70), (320, 224)), ((255, 257), (256, 256)), ((256, 256), (256, 256)), ((256, 300), (256, 288)),
    ((300, 256), (288, 256)), ((333, 517), (320, 512)), ((480, 640), (480, 640)), ((481, 641), (480, 640)),
    ((600, 800), (64, 96)), ((799, 1201), (32, 32)), ((1000, 999), (992, 992)), ((53, 1999), (64, 1984)),
    ((1999, 53), (1984, 64)), ((640, 360), (352, 192)), ((123, 457), (2, 1)), ((64, 64), (65, 63)),
    ((17, 400), (400, 17)),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_torch(source: tuple[int, int], target: tuple[int, int], channels: int) -> None:
    import torch

    image = picture(*source, seed=source[0] * 10007 + source[1])[:, :, :channels]
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    expected = (
        torch.nn.functional.interpolate(planes, target, mode="bicubic", antialias=True)[0].numpy().transpose(1, 2, 0)
    )
    found = resize_bicubic(image, *target)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_random_sizes_equal_torch() -> None:
    import torch

    rng = np.random.default_rng(5)
    for trial in range(150):
        height, width, new_height, new_width = (int(x) for x in rng.integers((1, 1, 2, 2), 180))
        image = picture(height, width, seed=trial)
        planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        expected = torch.nn.functional.interpolate(planes, (new_height, new_width), mode="bicubic", antialias=True)[0]
        np.testing.assert_array_equal(
            resize_bicubic(image, new_height, new_width), expected.numpy().transpose(1, 2, 0), str(image.shape)
        )


def test_both_float_types_are_in_use() -> None:
    assert axis_taps(300, 288).float_type is np.float32
    assert axis_taps(3000, 288).float_type is np.float64


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_flat_picture_stays_flat(level: int) -> None:
    assert (resize_bicubic(np.full((37, 91, 3), level, np.uint8), 64, 64) == level).all()


def test_taps_cover_the_input_and_sum_to_one() -> None:
    taps = axis_taps(101, 37)
    assert taps.first[0] == 0
    assert (taps.first + taps.count).max() == 101
    assert np.abs(taps.weights.sum(axis=1) - (1 << taps.precision)).max() <= taps.weights.shape[1]


def test_the_input_is_left_alone_and_may_be_strided() -> None:
    image = picture(80, 90)
    view = image[::2, ::-1]
    before = view.copy()
    np.testing.assert_array_equal(resize_bicubic(view, 64, 32), resize_bicubic(before, 64, 32))
    np.testing.assert_array_equal(view, before)
