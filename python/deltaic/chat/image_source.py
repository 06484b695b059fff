"""How does a picture get in? From a path, bytes, a Pillow image, a numpy array, a data: URL or an http(s) URL to RGB
samples.

Everything here may come from a stranger, so declared sizes are checked before anything is decoded, and downloads are
bounded in bytes and seconds. Whatever goes wrong is an ImageError that names the source.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import threading
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 27  # 134 million: above any phone or camera still, 400 MB as RGB
MAX_BYTES = 1 << 28  # of an encoded picture: file, data: URL or download
DOWNLOAD_SECONDS = 30.0  # for the whole download, however slowly it drips
REFUSED_FORMATS = {"EPS"}  # decoding it starts another program (Ghostscript)

_URL = re.compile(r"(?i)https?://")
_DATA = re.compile(r"(?i)data:")


def load_rgb(source: Any) -> tuple[NDArray[np.uint8], str]:
    """The picture `source` as RGB samples uint8 [h, w, 3], upright (EXIF orientation applied), and a name for messages.

    `source`: path (str or os.PathLike), encoded bytes, PIL image of any mode, uint8 array [h, w] or [h, w, 1 | 3 | 4],
    "data:" URL, "http(s)://" URL. Only a str is ever taken for a URL, never a Path. Conversion is Pillow's
    `convert("RGB")`, as in the reference: alpha is dropped, not blended. Raises ImageError.
    """
    from PIL import Image

    name = describe(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name), name
    if isinstance(source, Image.Image):
        return _to_rgb(source, name), name
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), name), name
    if isinstance(source, str) and _DATA.match(source):
        return _decode(_data_url(source, name), name), name
    if isinstance(source, str) and _URL.match(source):
        return _decode(_download(source, name), name), name
    if isinstance(source, (str, os.PathLike)):
        return _decode(_read_file(source, name), name), name
    raise ImageError(
        f"{name}: expected a path, bytes, a Pillow image, a uint8 numpy array, a data: URL or an http(s) URL, "
        f"found {type(source).__module__}.{type(source).__qualname__}; convert it to one of these"
    )


def describe(source: Any) -> str:
    """A short name of a picture's source for messages."""
    if isinstance(source, np.ndarray):
        return f"picture (array {source.dtype} {list(source.shape)})"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"picture ({len(source)} bytes)"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text if isinstance(text, str) else os.fsdecode(text)
        return f"picture {text!r}" if len(text) <= 120 else f"picture {text[:60]!r}... ({len(text)} characters)"
    filename = getattr(source, "filename", "")
    return f"picture {filename!r}" if isinstance(filename, str) and filename else f"picture ({type(source).__name__})"


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least 1 x 1 pixels, found {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS} pixels, found {width} x {height} = {width * height}; "
            "make it smaller before passing it on"
        )


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"{name}: expected at most {MAX_BYTES} bytes, found {size}")


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name}: expected samples of dtype uint8 from 0 to 255, found {array.dtype}; "
            "convert it, for example (x * 255).round().astype(np.uint8) if it runs from 0 to 1"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{name}: expected shape [h, w] or [h, w, 1 | 3 | 4] (channels last, RGB), found {list(array.shape)}; "
            "transpose it if its channels come first"
        )
    _check_size(array.shape[1], array.shape[0], name)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])


def _read_file(path: str | os.PathLike[Any], name: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device could block or never end
            raise ImageError(
                f"{name}: expected a regular file, found {'a folder' if stat.S_ISDIR(status.st_mode) else 'a device'}"
            )
        _check_bytes(status.st_size, name)
        return Path(os.fsdecode(path)).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ImageError(f"{name}: cannot be read ({error}); check the path and its permissions") from error


def _data_url(url: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: expected 'data:[type][;base64],...', found no comma")
    _check_bytes(len(payload) * 3 // 4, name)
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().rstrip().endswith(";base64"):
        return raw
    raw = b"".join(raw.split())
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: expected base64 after the comma, found other text ({error})") from error


def _download(url: str, name: str) -> bytes:
    """The body at an http(s) URL, in another thread: a socket's own timeout starts anew with each byte that arrives."""
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            result.append(_fetch(url, name))
        except Exception as error:  # handed to the caller's thread below
            result.append(error)

    thread = threading.Thread(target=work, name="deltaic-download", daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not result:
        raise ImageError(
            f"{name}: expected the download to end within {DOWNLOAD_SECONDS:g} s, it did not; download it yourself"
        )
    if isinstance(result[0], ImageError):
        raise result[0]
    if isinstance(result[0], Exception):
        raise ImageError(f"{name}: cannot be downloaded ({result[0]}); check the address and the network") from result[
            0
        ]
    return result[0]


def _fetch(url: str, name: str) -> bytes:
    import urllib.request as request

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    opener = request.OpenerDirector()  # only http and https, also after a redirect: no file:, no ftp:
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    headers = {"User-Agent": "deltaic", "Accept": "image/*"}
    with opener.open(request.Request(url, headers=headers), timeout=DOWNLOAD_SECONDS / 3) as response:
        body = io.BytesIO()
        while chunk := response.read1(1 << 16):
            body.write(chunk)
            _check_bytes(body.tell(), name)
            if time.monotonic() > deadline:
                raise ImageError(f"{name}: expected the download to end within {DOWNLOAD_SECONDS:g} s, it did not")
        expected = response.headers.get("Content-Length", "")
        if expected.isdigit() and int(expected) != body.tell():
            raise ImageError(f"{name}: expected {expected} bytes, the download ended after {body.tell()}; try again")
        return body.getvalue()


def _decode(data: bytes, name: str) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    _check_bytes(len(data), name)
    if not data:
        raise ImageError(f"{name}: expected an encoded picture, found 0 bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: expected an encoded picture (PNG, JPEG, WebP, GIF, ...), "
            f"found {len(data)} bytes of something else, starting {data[:8]!r}"
        ) from error
    except Exception as error:  # a decoder may raise anything at a malformed header
        raise _broken(error, name) from error
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if image.format in REFUSED_FORMATS:
        raise ImageError(f"{name}: {image.format} pictures are not read; convert it to PNG or JPEG")
    _check_size(image.width, image.height, name)
    try:
        image.load()
        _check_size(image.width, image.height, name)  # some formats (ICO) learn their size only here
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "La":  # Pillow has no direct way from premultiplied grey
            upright = upright.convert("LA")
        return np.array(upright.convert("RGB"), dtype=np.uint8)
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything at malformed data
        raise _broken(error, name) from error


def _broken(error: Exception, name: str) -> ImageError:
    kind = "declares too many pixels" if "decompression bomb" in str(error).lower() else "is truncated or broken"
    return ImageError(f"{name}: {kind} ({type(error).__name__}: {error}); fetch or save it again")
