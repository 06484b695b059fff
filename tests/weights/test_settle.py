"""Mapped weights move into huge pages while they are used."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep
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
    padded = view[: SIZE // 64 * 64]
    expected, found, done = cpu.checksum(contents[: len(padded)]), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            found.add(cpu.checksum(padded))

    reader = threading.Thread(target=read)
    reader.start()
    settling = Settling(mapping, file, 5000, SIZE - 3000, cpu)
    assert settling.join(60)
    done.set()
    reader.join()
    assert found == {expected}
    part = whole_pages(view[: SIZE - 3000])
    moved = view[part]
    assert len(moved) >= SIZE - 4 * MB
    os.truncate(path, 4096)  # a page of the file that was still mapped would end the process now
    np.testing.assert_array_equal(moved, contents[part])
    monkeypatch.undo()
    assert cpu.huge_bytes(moved) in (-1, len(moved))


def test_what_is_in_huge_pages_already_is_left_alone(mapped, cpu: ModuleType, monkeypatch) -> None:
    _, mapping, file, _ = mapped
    settling = Settling(mapping, file, 0, SIZE, cpu)
    assert settling.join(60)
    view = np.frombuffer(mapping, np.uint8)
    if cpu.huge_bytes(view[whole_pages(view)]) < 0:
        pytest.skip("this system does not tell which pages are huge")
    monkeypatch.setattr(cpu, "move_to_huge_pages", lambda *arguments: pytest.fail("moved again"))
    assert Settling(mapping, file, 0, SIZE, cpu).join(60)


def test_a_file_that_was_shortened_is_left_as_it_is(mapped, cpu: ModuleType) -> None:
    path, mapping, file, contents = mapped
    os.truncate(path, 3 * MB)
    view = np.frombuffer(mapping, np.uint8)
    begin = whole_pages(view).start
    assert not cpu.move_to_huge_pages(view[begin : begin + 4 * MB], file, begin)
    np.testing.assert_array_equal(view[: 3 * MB], contents[: 3 * MB])


def test_takes_turns_with_computation(mapped, cpu: ModuleType, monkeypatch) -> None:
    _, mapping, file, _ = mapped
    monkeypatch.setattr(cpu, "huge_bytes", lambda data: 0)
    monkeypatch.setattr(settle, "_WAIT_SECONDS", 30.0)
    busy = True
    monkeypatch.setattr(cpu, "activity", lambda: None if busy else 1.0)
    settling = Settling(mapping, file, 0, SIZE, cpu)
    assert not settling.join(0.1)  # an operator runs: nothing moves
    busy = False
    assert settling.join(20)
    busy = True
    settling = Settling(mapping, file, 0, SIZE, cpu)
    start = perf_counter()
    settling.stop()
    assert perf_counter() - start < 10
    monkeypatch.setattr(settle, "_WAIT_SECONDS", 0.0)
    assert Settling(mapping, file, 0, SIZE, cpu).join(20)  # but not for ever


def test_ends_when_nobody_uses_the_mapping(tmp_path: Path, cpu: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "activity", lambda: None)
    monkeypatch.setattr(settle, "_WAIT_SECONDS", 0.3)
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        settling = Settling(mapping, file.fileno(), 0, SIZE, cpu)
    view = np.frombuffer(mapping, np.uint8)
    sleep(0.05)
    del mapping
    assert not settling.join(0.05)  # an array on it counts as use
    files = len(os.listdir("/proc/self/fd"))
    del view
    gc.collect()
    assert settling.join(20)
    assert len(os.listdir("/proc/self/fd")) < files  # the duplicate of the descriptor is closed, and the map's own


SCRIPT = """
import mmap, sys
import deltaic.ops.cpu as cpu
from deltaic.weights.settle import Settling
cpu.huge_bytes = lambda data: 0
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    settling = Settling(mapping, file.fileno(), 0, len(mapping), cpu)
print("leaving", flush=True)
"""


def test_the_process_may_end_meanwhile(mapped) -> None:
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(mapped[0])], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"leaving\n", b"")
