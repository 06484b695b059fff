"""The op set `deltaic.ops.cuda` on the emulator, once per thread order."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("pybind11")

import emulator
from deltaic.ops import cuda

if emulator.compiler() is None:
    pytest.skip("no C++ compiler for the emulator", allow_module_level=True)

ORDERS = ("forward", "reverse", "random")


@pytest.fixture(scope="session")
def emulated():
    """The kernels, built for the host."""
    return emulator.build()


@pytest.fixture(params=ORDERS)
def order(request):
    """An order in which threads and blocks take turns."""
    return request.param


@pytest.fixture
def device(emulated, order):
    """The emulator as the device of `deltaic.ops.cuda`, in guarded and poisoned memory."""
    emulated.set_order(order, 7)
    cuda.use_device(emulator.EmulatedDevice(emulated))
    yield cuda.device()
    cuda.use_device(None)
