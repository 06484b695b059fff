"""The op set `deltaic.ops.cuda` on the emulator, once per thread order, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torch")
pytest.importorskip("pybind11")

import emulator
import torch
from deltaic.ops import cuda

if emulator.compiler() is None:
    pytest.skip("no C++ compiler for the emulator", allow_module_level=True)

ORDERS = ("forward", "reverse", "random")
HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("deltaic._cuda") is not None


@pytest.fixture(scope="session")
def emulated():
    """The kernels, built for the host."""
    return emulator.build()


def start(place, request):
    """Make `place` the device of `deltaic.ops.cuda`: "gpu", or an order in which the emulator's threads take turns."""
    if place == "gpu":
        cuda.use_device(None)
    else:
        emulated = request.getfixturevalue("emulated")
        emulated.set_order(place, 7)
        cuda.use_device(emulator.EmulatedDevice(emulated))
    return cuda.device()


@pytest.fixture(params=[*ORDERS, *["gpu"] * HAS_GPU])
def device(request):
    """The emulator, in guarded and poisoned memory, in every order; and the GPU."""
    yield start(request.param, request)
    cuda.use_device(None)


@pytest.fixture(params=["reverse", *["gpu"] * HAS_GPU])
def model_device(request):
    """For whole models, which take long: one order, and the GPU."""
    yield start(request.param, request)
    cuda.use_device(None)
