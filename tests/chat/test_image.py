"""Pictures: reference pixels and grids, every way in, and everything that must be refused."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_helpers import picture
from deltaic.chat import image_source
from deltaic.chat.image import ImageProcessor, target_size
from deltaic.errors import ArgumentError, ConfigError, ImageError
from PIL import Image

SIZES = [
    (1, 1), (1, 2), (3, 1), (1, 200), (200, 1), (16, 16), (31, 33), (32, 32), (80, 80), (100, 70), (255, 257),
    (256, 256),
    (256, 272), (240, 320), (272, 240), (333, 517), (517, 333), (480, 640), (481, 639), (600, 48), (48, 900),
    (720, 1280),
    (777, 999), (1000, 1000), (1023, 767), (1080, 1920), (1200, 900), (37, 2000), (2000, 37), (999, 1001), (1536, 1553),
]  # fmt: skip

PROCESSOR = ImageProcessor()
SETTINGS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.5, 0.3],
}


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


SMALL = Image.fromarray(picture(40, 50))
PNG = encoded(SMALL)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixel_values_equal_the_reference(height: int, width: int, reference_image_processor: Any) -> None:
    image = Image.fromarray(picture(height, width, seed=height * 31 + width))
    expected = reference_image_processor(images=[image], return_tensors="pt")
    found = PROCESSOR.process(image)
    assert [list(found.grid)] == expected["image_grid_thw"].tolist()
    assert found.num_tokens == found.grid[1] * found.grid[2] // 4
    assert found.pixels.dtype == np.uint8
    assert found.pixels.flags.c_contiguous
    values = found.pixel_values()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected["pixel_values"].numpy())


def test_above_the_largest_area(reference_image_processor: Any) -> None:
    image = Image.fromarray(picture(700, 900))
    expected = reference_image_processor(
        images=[image], size={"shortest_edge": 4096, "longest_edge": 100_000}, return_tensors="pt"
    )
    found = PROCESSOR.process(image, min_pixels=4096, max_pixels=100_000)
    np.testing.assert_array_equal(found.pixel_values(), expected["pixel_values"].numpy())
    assert found.pixels.shape[0] * found.pixels.shape[1] <= 100_000


def test_other_statistics(reference_image_processor: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    processor = ImageProcessor.from_folder(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == (4096, 65536)
    statistics = {"image_mean": SETTINGS["image_mean"], "image_std": SETTINGS["image_std"]}
    expected = reference_image_processor(images=[SMALL], size=SETTINGS["size"], return_tensors="pt", **statistics)
    np.testing.assert_array_equal(processor.process(SMALL).pixel_values(), expected["pixel_values"].numpy())


def test_target_sizes_equal_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(1)
    for height, width in rng.integers(1, 6000, (3000, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            for low, high in ((65536, 16777216), (1, 5000), (3136, 1003520)):
                assert target_size(height, width, 32, low, high) == smart_resize(height, width, 32, low, high)


def test_plain_pillow_processor_agrees_on_smooth_pictures() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rows, columns = np.mgrid[0:333, 0:517]
    smooth = np.stack([rows * 255 // 332, columns * 255 // 516, (rows + columns) * 255 // 848], axis=2).astype(np.uint8)
    reference = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = reference(images=[Image.fromarray(smooth)], return_tensors="np")
    found = PROCESSOR.process(smooth)
    assert (
        np.abs(found.pixel_values() - expected["pixel_values"]).max() <= 2.01 / 127.5
    )  # Pillow rounds at other places


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "La", "RGBa"],
)
def test_every_pillow_mode(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(picture(40, 50)[:, :, 0].astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.frombytes("LAB", (50, 40), picture(40, 50).tobytes())
    elif mode in ("PA", "La", "RGBa"):
        image = SMALL.convert({"PA": "P", "La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = SMALL.convert(mode)
    assert image.mode == mode
    expected = np.array((image.convert("LA") if mode == "La" else image).convert("RGB"))  # Pillow's only way for La
    np.testing.assert_array_equal(image_source.load_rgb(image)[0], expected)


def test_alpha_is_dropped_not_blended() -> None:
    rgba = np.dstack([picture(40, 50), np.zeros((40, 50), np.uint8)])
    for source in (rgba, encoded(Image.fromarray(rgba))):
        np.testing.assert_array_equal(image_source.load_rgb(source)[0], rgba[:, :, :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMALL, exif=exif)
    found, _ = image_source.load_rgb(data)
    assert found.shape == ((50, 40, 3) if orientation > 4 else (40, 50, 3))
    np.testing.assert_array_equal(found, np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    flat = np.array(SMALL)
    expected = {1: flat, 2: flat[:, ::-1], 3: flat[::-1, ::-1], 4: flat[::-1], 6: np.rot90(flat, -1), 8: np.rot90(flat)}
    if orientation in expected:
        np.testing.assert_array_equal(found, expected[orientation])


def test_every_way_in(tmp_path: Path) -> None:
    path = tmp_path / "picture of é.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    wrapped = "DATA:image/png;charset=x;base64," + base64.encodebytes(PNG).decode().rstrip("=\n")
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)
    expected = PROCESSOR.process(np.array(SMALL))
    for source in (
        path,
        str(path),
        os.fsencode(path) and PNG,
        bytearray(PNG),
        memoryview(PNG),
        SMALL,
        url,
        wrapped,
        percent,
    ):
        found = PROCESSOR.process(source)
        assert found.digest == expected.digest
    assert PROCESSOR.process(expected) is expected
    with Image.open(path) as lazy:
        assert PROCESSOR.process(lazy).digest == expected.digest


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_formats(form: str) -> None:
    data = encoded(SMALL, form)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image_source.load_rgb(data)[0], expected)


def test_arrays() -> None:
    grey = picture(40, 50)[:, :, 0]
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(image_source.load_rgb(array)[0], np.repeat(grey[:, :, None], 3, 2))
    flipped = picture(40, 50)[::-1]
    np.testing.assert_array_equal(image_source.load_rgb(flipped)[0], flipped)


def test_digest_tells_pictures_apart() -> None:
    first = PROCESSOR.process(picture(64, 64))
    assert first.digest == PROCESSOR.process(picture(64, 64)).digest
    assert first.digest != PROCESSOR.process(picture(64, 64, seed=1)).digest
    flat = [PROCESSOR.process(np.zeros(shape, np.uint8)).digest for shape in ((256, 512, 3), (512, 256, 3))]
    assert flat[0] != flat[1]


def gigapixel_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes"),
        (b"hello, this is not a picture", "something else"),
        (PNG[: len(PNG) // 2], "truncated or broken"),
        (PNG[:20], "truncated or broken|something else"),
        (encoded(SMALL, "JPEG")[:-300], "truncated or broken"),
        (gigapixel_png(40000, 40000), "too many pixels"),
        (gigapixel_png(12000, 12000), "at most 134217728 pixels, found 12000 x 12000"),
        (gigapixel_png(0, 5), "something else|broken|at least 1 x 1"),
        (picture(1, 10000), "ratio of at most 200, found 1 x 10000"),
        (encoded(Image.new("RGB", (10000, 1))), "ratio of at most 200, found 1 x 10000"),
        (np.zeros((4, 4, 3), np.float32), "dtype uint8 from 0 to 255, found float32"),
        (np.zeros((3, 40, 50), np.uint8), "channels last"),
        (np.zeros((40, 50, 2), np.uint8), r"\[h, w, 1 \| 3 \| 4\]"),
        (np.zeros((0, 5, 3), np.uint8), "at least 1 x 1"),
        (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), "at most 134217728 pixels"),
        ("/no/such/file.png", "no such file"),
        ("a\0b", "cannot be read"),
        ("", "no such file"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,!!!!", "expected base64"),
        ("data:image/png;base64,", "0 bytes"),
        (17, "found builtins.int"),
        (None, "found builtins.NoneType"),
        (["x"], "found builtins.list"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS pictures are not read"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        PROCESSOR.process(source)
    assert "picture" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_a_pipe_and_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="found a folder"):
        PROCESSOR.process(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="found a device"):
        PROCESSOR.process(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no such file"):
        PROCESSOR.process(Path("http://127.0.0.1/x.png"))  # a Path is never fetched


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_never_escape_as_other_errors() -> None:
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(SMALL, form)
        for _ in range(40):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                broken[place] = rng.integers(0, 256)
            try:
                found = PROCESSOR.process(bytes(broken[: rng.integers(1, len(data) + 1)]))
            except ImageError:
                continue
            assert found.pixels.shape[2] == 3


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self._head(302, {"Location": "/picture"})
        elif self.path == "/file":
            self._head(302, {"Location": "file:///etc/hostname"})
        elif self.path == "/ftp":
            self._head(302, {"Location": "ftp://127.0.0.1/x"})
        elif self.path == "/loop":
            self._head(302, {"Location": "/loop"})
        elif self.path == "/picture":
            self._head(200, {"Content-Length": str(len(PNG))})
            self.wfile.write(PNG)
        elif self.path == "/short":
            self._head(200, {"Content-Length": str(len(PNG))})
            self.wfile.write(PNG[:50])
        elif self.path in ("/endless", "/drip"):
            self._head(200, {})
            try:
                while not self.server.stopping.wait(0.02 if self.path == "/drip" else 0):  # type: ignore[attr-defined]
                    self.wfile.write(b"x" * (1 if self.path == "/drip" else 1 << 16))
            except OSError:
                return
        else:
            self._head(404, {})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.stopping = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopping.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_download(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PROCESSOR.process(SMALL).digest
    for path in ("/picture", "/moved"):
        assert PROCESSOR.process(site + path).digest == expected
    for path, message in (
        ("/missing", "404"), ("/file", "cannot be downloaded"), ("/ftp", "cannot be downloaded"),
        ("/loop", "cannot be downloaded"), ("/short", "ended after 50|cannot be downloaded"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            PROCESSOR.process(site + path)
    monkeypatch.setattr(image_source, "MAX_BYTES", 1 << 20)
    with pytest.raises(ImageError, match="at most 1048576 bytes"):
        PROCESSOR.process(site + "/endless")
    monkeypatch.setattr(image_source, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(ImageError, match=r"within 0\.3 s"):
        PROCESSOR.process(site + "/drip")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        PROCESSOR.process("http://127.0.0.1:1/x.png")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        PROCESSOR.process("http://[broken/x.png")


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 0},
        {"max_pixels": -1},
        {"max_pixels": 10**12},
        {"min_pixels": 1.5},
        {"max_pixels": True},
        {"min_pixels": 10**8, "max_pixels": 10**6},
    ],
)
def test_bad_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="pixels"):
        PROCESSOR.process(SMALL, **limits)


def test_settings_inside_processor_config(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SETTINGS}))
    assert ImageProcessor.from_folder(tmp_path).mean == (0.4, 0.5, 0.6)
    with pytest.raises(ConfigError, match="found neither"):
        ImageProcessor.from_folder(tmp_path / "nowhere")


def test_older_names_of_the_limits(tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "size"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "min_pixels": 1000, "max_pixels": 2000}))
    assert ImageProcessor.from_folder(tmp_path).max_pixels == 2000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", None), ("size", {"shortest_edge": 10}), ("size", {"shortest_edge": 10, "longest_edge": 5}),
        ("size", {"shortest_edge": 10, "longest_edge": 10**12}), ("size", {"height": 3, "width": 4}),
        ("patch_size", 0), ("patch_size", "16"), ("patch_size", 10**12), ("merge_size", None),
        ("temporal_patch_size", -1),
        ("image_mean", [0.5]), ("image_mean", "x"), ("image_std", [0.5, 0.0, 0.5]), ("image_std", [1, 2, float("nan")]),
        ("resample", 2), ("do_resize", False), ("do_center_crop", True), ("rescale_factor", 1.0),
        ("rescale_factor", "a"),
    ],
)  # fmt: skip
def test_absurd_settings(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, key: value}))
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: .*{key}|size"):
        ImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_broken_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: expected"):
        ImageProcessor.from_folder(tmp_path)
