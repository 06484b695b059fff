"""Mapped weights move into huge pages while they are used."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from types import ModuleType

import numpy as np
import pytest
from deltaic.machine import huge_pages
from deltaic.weights import settle
from deltaic.weights.settle import Settling

MB = 1 << 20
SIZE = 24 * MB + 4096  # the end of the file is no multiple of a huge page

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not huge_pages(), reason="needs the huge pages of Linux"
)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_SHARE", 1.0)


@pytest.fixture
def cpu() -> ModuleType:
    return pytest.importorskip("deltaic.ops.cpu")


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, mmap.mmap, int, np.ndarray]]:
    """A file, its read-only map, its descriptor, and its contents."""
    contents = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(contents.tobytes())
    with path.open("rb") as file:
        yield path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file.fileno(), contents


def whole_pages(view: np.ndarray) -> slice:
    """The whole huge pages within `view`."""
    address = view.__array_interface__["data"][0]
    first = -address % (2 * MB)
    return slice(first, first + (len(view) - first) // (2 * MB) * (2 * MB))


def test_bytes_stay_the_same_while_they_move_and_are_this_process_own_in_the_end(
    mapped, cpu: ModuleType, monkeypatch
) -> None:
    path, mapping, file, contents = mapped
    monkeypatch.setattr(cpu, "huge_bytes", lambda data: 0)  # a file that was just written may be in huge pages
    view = np.frombuffer(mapping, np.uint8)
    expected, found, done = zlib.crc32(contents), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            found.add(zlib.crc32(view))

    reader = threading.Thread(target=read)
    reader.start()
    settling = Settling(mapping, file, 5000, SIZE - 3000, cpu)
    steps = 1
    while settling.step():
        steps += 1
        sleep(0.001)
    done.set()
    reader.join()
    assert found == {expected}
    part = whole_pages(view[: SIZE - 3000])
    moved = view[part]
    assert len(moved) >= SIZE - 4 * MB
    assert steps == -(-len(moved) // settle._PIECE_BYTES)
    os.truncate(path, 4096)  # a page of the file that was still mapped would end the process now
    np.testing.assert_array_equal(moved, contents[part])
    monkeypatch.undo()
    assert cpu.huge_bytes(moved) in (-1, len(moved))
    assert not settling.step()


def test_keeps_to_its_share_of_the_time(mapped, cpu: ModuleType, monkeypatch) -> None:
    _, mapping, file, _ = mapped
    now, moved = [100.0], []

    def move(*_: object) -> bool:
        moved.append(now[0])
        now[0] += 0.01
        return True

    monkeypatch.setattr(cpu, "huge_bytes", lambda data: 0)
    monkeypatch.setattr(cpu, "move_to_huge_pages", move)
    monkeypatch.setattr(settle, "perf_counter", lambda: now[0])
    monkeypatch.setattr(settle, "_SHARE", 0.1)
    settling = Settling(mapping, file, 0, SIZE, cpu)
    while settling.step():
        now[0] += 0.0101
    gaps = np.diff(moved)
    assert len(moved) >= 5
    assert (gaps >= 0.1 - 1e-9).all()
    assert (gaps <= 0.125).all()


def test_what_is_in_huge_pages_already_is_left_alone(mapped, cpu: ModuleType, monkeypatch) -> None:
    _, mapping, file, _ = mapped
    settling = Settling(mapping, file, 0, SIZE, cpu)
    while settling.step():
        pass
    view = np.frombuffer(mapping, np.uint8)
    if cpu.huge_bytes(view[whole_pages(view)]) < 0:
        pytest.skip("this system does not tell which pages are huge")
    moved = []
    monkeypatch.setattr(cpu, "move_to_huge_pages", lambda *arguments: moved.append(arguments))
    assert not Settling(mapping, file, 0, SIZE, cpu).step()
    assert not moved


def test_a_file_that_was_shortened_is_left_as_it_is(mapped, cpu: ModuleType) -> None:
    path, mapping, file, contents = mapped
    os.truncate(path, 3 * MB)
    view = np.frombuffer(mapping, np.uint8)
    begin = whole_pages(view).start
    assert not cpu.move_to_huge_pages(view[begin : begin + 4 * MB], file, begin)
    np.testing.assert_array_equal(view[: 3 * MB], contents[: 3 * MB])


def test_ends_where_the_system_gives_nothing(mapped, cpu: ModuleType, monkeypatch) -> None:
    path, mapping, file, contents = mapped
    monkeypatch.setattr(cpu, "huge_bytes", lambda data: 0)
    monkeypatch.setattr(cpu, "move_to_huge_pages", lambda *arguments: False)

    def descriptors() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.path.samefile(link, path) for link in links)

    files = descriptors()
    settling = Settling(mapping, file, 0, SIZE, cpu)
    assert descriptors() == files + 1
    assert not settling.step()
    assert descriptors() == files  # the duplicate of the descriptor is closed
    del settling
    settling = Settling(mapping, file, 0, SIZE, cpu)
    del settling
    assert descriptors() == files
    assert zlib.crc32(np.frombuffer(mapping, np.uint8)) == zlib.crc32(contents)
