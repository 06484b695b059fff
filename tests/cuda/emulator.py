"""Builds the CUDA kernels for the host, against the emulator in csrc/cuda/simt, and runs op sets on it.

Objects are kept under build/emulator by a hash of all sources they can see, so that a second session compiles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
import torch
from deltaic.ops.cuda_device import OutOfDeviceMemory
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
CACHE = Path(os.environ.get("DELTAIC_EMULATOR_CACHE", ROOT / "build" / "emulator"))
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]

# The PTX machine computes what a GPU would: fast, with no sum and product joined, and for this processor alone.
MACHINE_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# As cmake/cuda.cmake and CMake's release build have it; -lineinfo changes no instruction.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "--extended-lambda", "-lineinfo", "-ptx"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _included(text: str, seen: dict[str, str]) -> dict[str, str]:
    """The project's headers that a source includes, directly or not: path -> text."""
    for name in re.findall(r'#include "([^"]+)"', text):
        file = SOURCES / name
        if name not in seen and file.exists():
            seen[name] = file.read_text()
            _included(seen[name], seen)
    return seen


def _digest(text: str, flags: list[str]) -> str:
    """What an object depends on: its source, the headers it can see, the flags, Python and pybind11."""
    digest = hashlib.sha256("".join([*flags, sys.version, pybind11.__version__, text]).encode())
    for name, header in sorted(_included(text, {}).items()):
        digest.update((name + header).encode())
    return digest.hexdigest()[:24]


def _compile(source: Path, text: str) -> Path:
    flags = [*FLAGS, *MACHINE_FLAGS, f"-DHOST={platform.node()}"] if source.stem.startswith("ptx") else FLAGS
    key = _digest(text, flags)
    built = CACHE / f"{source.stem}-{key}.o"
    if built.exists():
        return built
    CACHE.mkdir(parents=True, exist_ok=True)
    copy = CACHE / f"{source.stem}-{key}{'.cpp' if source.suffix == '.cu' else source.suffix}"
    copy.write_text(text)
    includes = [f"-I{SOURCES}", f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    partial = built.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler(), *flags, "-DDELTAIC_EMULATE", *includes, "-c", str(copy), "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile for the emulator:\n{result.stderr[-4000:]}")
    partial.rename(built)
    return built


def build(edits: dict[str, tuple[str, str]] | None = None) -> ModuleType:
    """The extension `_cuda_emulated`. `edits`: file name -> (old text, new text), for mutation tests."""
    files = [
        *_sources(),
        *sorted(SOURCES.glob("cuda/simt/*.cpp")),
        SOURCES / "core/error.cpp",
        SOURCES / "bindings/cuda_module.cpp",
    ]
    texts = {}
    for file in files:
        texts[file] = file.read_text()
        if edits and file.name in edits:
            old, new = edits[file.name]
            if texts[file].count(old) != 1:
                raise RuntimeError(
                    f"{file.name} holds {texts[file].count(old)} times what the mutation replaces: {old!r}"
                )
            texts[file] = texts[file].replace(old, new)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda f: _compile(f, texts[f]), files))
    key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:24]
    folder = CACHE / key
    library = folder / "_cuda_emulated.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(partial)], check=True)
        partial.rename(library)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_version() -> str | None:
    """What nvcc says it is, or None where there is none."""
    nvcc = shutil.which("nvcc")
    return nvcc and subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _ptx(source: Path, capability: int, edits: dict[str, tuple[str, str]]) -> Path:
    """A file with the PTX that nvcc makes of a source, after edits in it and in the headers that it includes."""
    texts = _included(f'#include "cuda/{source.name}"', {})
    for name, (old, new) in edits.items():
        if texts[name].count(old) != 1:
            raise RuntimeError(f"{name} holds {texts[name].count(old)} times what the mutation replaces: {old!r}")
        texts[name] = texts[name].replace(old, new)
    digest = hashlib.sha256("".join([nvcc_version() or "", *NVCC_FLAGS, str(capability)]).encode())
    for name, text in sorted(texts.items()):
        digest.update((name + text).encode())
    built = CACHE / f"{source.stem}-{capability}-{digest.hexdigest()[:24]}.ptx"
    if not built.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for name, text in texts.items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_text(text)
            made = Path(folder) / "out.ptx"
            command = ["nvcc", *NVCC_FLAGS, f"-arch=compute_{capability}", f"-I{folder}"]
            command += [f"{folder}/cuda/{source.name}", "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{result.stderr[-4000:]}")
            # nvcc names an anonymous namespace after the file; here it gets the host compiler's name.
            anonymous = r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_[a-z_]+_cu_[0-9a-f]{8}"
            made.write_text(re.sub(anonymous, "12_GLOBAL__N_1", made.read_text()))
            made.rename(built)
    return built


def _sources() -> list[Path]:
    return [f for f in sorted(SOURCES.glob("cuda/*.cu")) if f.stem != "runtime"]


def kernel_resources(capability: int) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of static shared memory of a block, of every kernel, as ptxas makes it."""

    def assembled(source: Path) -> str:
        ptx = _ptx(source, capability, {})
        said = ptx.with_suffix(".ptxas")
        if not said.exists():
            command = ["ptxas", "-v", f"-arch=sm_{capability}", str(ptx), "-o", os.devnull]
            said.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        return said.read_text()

    with ThreadPoolExecutor(2) as pool:
        text = "".join(pool.map(assembled, _sources()))
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", text, re.DOTALL
    )
    return {name: (int(registers), int(shared or 0)) for name, registers, shared in found}


def load_ptx(
    module: ModuleType, name: str, capability: int, edited: str = "", edits: dict[str, tuple[str, str]] | None = None
) -> None:
    """Give the emulator the PTX that nvcc makes for a compute capability, to be run after `module.use_ptx(name)`.

    `edits`, for mutation tests: as for `build`, of files such as "cuda/norm.cu", in what the source `edited` includes.
    """
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda f: _ptx(f, capability, edits or {} if f.name == edited else {}), _sources())
    texts = [file.read_text() for file in made]
    listed = subprocess.run(["nm", module.__file__], capture_output=True, text=True, check=True).stdout.split("\n")
    symbols = {int(line[:16], 16): line.split()[2] for line in listed if "_kernel" in line and line[:16].strip()}
    module.load_ptx(name, texts, symbols)


class _Memory:
    """A guarded buffer of a device that numpy reads through the array interface, freed with the last array."""

    def __init__(self, device: EmulatedDevice, nbytes: int, name: str):
        self.device, self.nbytes, self.address = device, nbytes, device.module.guarded_alloc(nbytes, name)
        device.used += nbytes
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self):
        self.device.used -= self.nbytes
        self.device.module.guarded_free(self.address)


# Calls of the extension that are not launches: a capture does not record them.
HOST_CALLS = {
    "use_tensor_cores",
    "Matrices", "KernelError", "gated_delta_net_chunk_floats", "moe_max_tiles", "guarded_alloc", "guarded_free",
    "load_ptx", "use_ptx", "run_ptx", "ptx_coverage", "count_traffic", "take_traffic",
}  # fmt: skip
# What torch may do in a captured graph here: look at memory in another way. Anything else would have to be recorded.
VIEWS = {
    "lift_fresh",
    "view",
    "_unsafe_view",
    "slice",
    "select",
    "alias",
    "detach",
    "as_strided",
    "reshape",
    "unsqueeze",
    "t",
}


class _NoTorchInCapture(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket).removeprefix("aten.")
        if name not in VIEWS:
            raise AssertionError(f"torch computes or copies in a captured graph: {name}")
        return function(*args, **(kwargs or {}))


class _Recording:
    """The extension as the device's operators see it: while a graph is captured, launches are noted and do not run."""

    def __init__(self, device: EmulatedDevice, module: ModuleType):
        self._device, self._module = device, module

    def __getattr__(self, name: str) -> Any:
        found, device = getattr(self._module, name), self._device
        if not callable(found) or name in HOST_CALLS:
            return found

        def call(*args: Any) -> Any:
            if device.capturing is None:
                device.launches += 1
                return found(*args)
            return device.capturing.append((found, args))

        return call


class _Pool:
    """Memory of captured graphs that run one after another: what one left there, another may overwrite."""

    def __init__(self) -> None:
        self.memory: list[_Memory] = []


class EmulatedGraph:
    """Launches with the very arguments that they were captured with, on memory that is poisoned before each replay."""

    def __init__(self, device: EmulatedDevice, pool: _Pool, launches: list[tuple[Any, tuple[Any, ...]]]):
        self._device, self._pool, self._launches = device, pool, launches

    def pool(self) -> _Pool:
        return self._pool

    def replay(self) -> None:
        self._device.replays += 1
        for memory in self._pool.memory:
            np.asarray(memory)[:] = 0xCD
        for function, args in self._launches:
            function(*args)


class EmulatedDevice:
    """A device for deltaic.ops.cuda: torch CPU tensors in guarded, poisoned memory. As on a GPU, a captured graph holds
    nothing but launches and addresses."""

    torch_device = "cpu"

    def __init__(self, module: ModuleType, memory: int = 1 << 40):
        """memory: bytes that the device is said to have."""
        self.module, self.memory, self.used = _Recording(self, module), memory, 0
        self.capturing: list[tuple[Any, tuple[Any, ...]]] | None = None
        self._pool: _Pool | None = None  # of the graph that is being captured
        self._sent: list[tuple[torch.Tensor, torch.Tensor]] = []  # what may still be read, and what it was
        self.uploads = self.downloads = self.launches = self.replays = 0  # counted

    def capture(self, run, pool):
        self._pool, self.capturing = pool or _Pool(), []
        try:
            with _NoTorchInCapture():
                result = run()
            return EmulatedGraph(self, self._pool, self.capturing), result
        finally:
            self._pool = self.capturing = None

    def stream(self) -> int:
        return 0

    def fill(self, target, host) -> None:
        if self.capturing is not None:
            raise AssertionError("the host's memory is read in a captured graph")
        target.copy_(host)
        self.uploads += 1

    def host_bytes(self, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.uint8)

    def send(self, target, host) -> None:
        self.fill(target, host)
        self._sent.append((host, host.clone()))

    def receive(self, host, source) -> None:
        self.wait()
        host.copy_(source)
        self.downloads += 1

    def free_bytes(self) -> int:
        return self.memory - self.used

    def wait(self) -> None:
        for host, sent in self._sent:
            if not torch.equal(host, sent):
                raise AssertionError("the host's memory has changed before the device had read it")
        self._sent.clear()

    def empty(self, shape, dtype) -> torch.Tensor:
        count = int(np.prod(tuple(shape), dtype=np.int64))
        size = dtype.itemsize
        if count * size > self.free_bytes():
            raise OutOfDeviceMemory(count * size, self.free_bytes())
        memory = _Memory(self, max(1, count * size), f"{str(dtype).removeprefix('torch.')}{list(shape)}")
        if self._pool is not None:
            self._pool.memory.append(memory)
        raw = torch.from_numpy(np.asarray(memory))
        return raw[: count * size].view(dtype).reshape(tuple(shape))
