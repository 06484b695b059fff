"""The op set `deltaic.ops.cuda` on the emulator, in every thread order, on its PTX machine, and on a GPU if any.

The machine runs what nvcc makes of the kernels for a compute capability. DELTAIC_PTX=all runs every capability that has
code of its own, in every order, with whole models too, and lists kernels that never ran; without it, the code for the
newest and the oldest cards runs, in one order."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("pybind11")

import emulator
import torch
from deltaic.ops import cuda

if emulator.compiler() is None:
    pytest.skip("no C++ compiler for the emulator", allow_module_level=True)

ORDERS = ("forward", "reverse", "random")
ALL_PTX = os.environ.get("DELTAIC_PTX") == "all"
PTX = [f"ptx_{c}_{o}" for c in (90, 80, 75) for o in ORDERS] if ALL_PTX else ["ptx_90_random", "ptx_75_random"]
PTX_MODULES = {}  # those that hold PTX, by compute capability
HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("deltaic._cuda") is not None


@pytest.fixture(scope="session")
def emulated():
    """The kernels, built for the host."""
    return emulator.build()


@pytest.fixture(scope="session")
def use_ptx(emulated):
    """Makes the emulator run the PTX for a compute capability."""

    def use(capability):
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not installed")
        if capability not in PTX_MODULES:
            emulator.load_ptx(emulated, str(capability), capability)
            PTX_MODULES[capability] = emulated
        emulated.use_ptx(str(capability))
        emulated.use_tensor_cores(capability >= 80)  # as runtime.cu decides it

    return use


def pytest_terminal_summary(terminalreporter):
    for capability, module in PTX_MODULES.items() if ALL_PTX else ():
        for kernel, (instructions, missed) in module.ptx_coverage(str(capability)).items():
            if len(missed) == instructions:
                terminalreporter.write_line(f"never ran for compute capability {capability}: {kernel}")


def start(place, request):
    """Make `place` the device of `deltaic.ops.cuda`: "gpu", an order in which the emulator's threads take turns, or
    "ptx_capability_order"."""
    if place == "gpu":
        cuda.use_device(None)
    else:
        emulated = request.getfixturevalue("emulated")
        *ptx, order = place.split("_")
        emulated.set_order(order, 7)
        if ptx:
            request.getfixturevalue("use_ptx")(int(ptx[1]))
        cuda.use_device(emulator.EmulatedDevice(emulated))
    return cuda.device()


def stop():
    """Leave the emulator as it is at first."""
    if cuda.device().module.emulated:
        cuda.device().module.use_ptx("")
        cuda.device().module.use_tensor_cores(True)
    cuda.use_device(None)


@pytest.fixture(params=[*ORDERS, *PTX, *["gpu"] * HAS_GPU])
def device(request):
    """The emulator, in guarded and poisoned memory, in every order; its PTX machine; and the GPU."""
    yield start(request.param, request)
    stop()


@pytest.fixture(params=["reverse", *PTX[: len(PTX) * ALL_PTX], *["gpu"] * HAS_GPU])
def model_device(request):
    """For whole models, which take long: one order, and the GPU."""
    yield start(request.param, request)
    stop()


@pytest.fixture(params=["reverse", *PTX, *["gpu"] * HAS_GPU])
def wide_device(request):
    """For the sizes of real models: one order, the PTX machine, and the GPU."""
    yield start(request.param, request)
    stop()
