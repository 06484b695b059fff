"""Every reason why device="cuda" cannot be used has one error that says so; the CPU goes on working."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
from deltaic.errors import DeviceError
from deltaic.ops import cuda_device


def module(**changes):
    facts = {
        "device_problem": lambda: "",
        "driver_version": lambda: 13000,
        "toolkit_version": 13000,
        "has_kernels": lambda: True,
        "architectures": "sm_80 and PTX",
    }
    return SimpleNamespace(**{**facts, **changes})


def torch(available=True):
    cuda = SimpleNamespace(
        is_available=lambda: available,
        init=lambda: None,
        get_device_capability=lambda: (7, 0),
        get_device_name=lambda: "Some Card",
    )
    return SimpleNamespace(cuda=cuda, __version__="2.9", version=SimpleNamespace(cuda=None))


@pytest.mark.parametrize(
    ("extension", "library", "message"),
    [
        (module(device_problem=lambda: "cudaErrorNoDevice"), torch(), "no NVIDIA GPU is visible"),
        (
            module(device_problem=lambda: "cudaErrorInsufficientDriver", driver_version=lambda: 0),
            torch(),
            "no NVIDIA GPU is visible",
        ),
        (
            module(device_problem=lambda: "cudaErrorInsufficientDriver", driver_version=lambda: 12020),
            torch(),
            r"runs CUDA up to 12\.2, this build needs 13\.0; update the driver",
        ),
        (module(device_problem=lambda: "cudaErrorSystemNotReady"), torch(), "cudaErrorSystemNotReady"),
        (module(), torch(available=False), r"torch 2\.9 cannot use the GPU"),
        (
            module(has_kernels=lambda: False),
            torch(),
            "Some Card is sm_70, and this build holds kernels for sm_80 and PTX",
        ),
    ],
)
def test_one_error_per_reason(extension, library, message):
    with pytest.raises(DeviceError, match=message) as caught:
        cuda_device.check_device(extension, library)
    assert 'device="cpu"' in str(caught.value)


def test_a_working_card_is_no_error():
    cuda_device.check_device(module(), torch())


@pytest.mark.parametrize(("missing", "message"), [("deltaic._cuda", "not in this build"), ("torch", "needs torch")])
def test_missing_parts(monkeypatch, missing, message):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(DeviceError, match=message):
        cuda_device._extension() if missing == "deltaic._cuda" else cuda_device._torch()


def test_info_says_what_is_there():
    facts = cuda_device.facts()
    assert "cuda" in facts
    assert facts["cuda"] == "not in this build" or "gpu" in facts
