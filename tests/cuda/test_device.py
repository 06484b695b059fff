"""Every reason why device="cuda" cannot be used has one error that says so; the CPU goes on working."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch as real_torch
from deltaic.errors import DeviceError
from deltaic.ops import cuda, cuda_device, cuda_memory


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


class FakeStream:
    def __init__(self, cuda, number):
        self.cuda, self.cuda_stream = cuda, number

    def __eq__(self, other):
        return self.cuda_stream == other.cuda_stream

    def wait_stream(self, other):
        assert not self.cuda.capturing, "a captured stream may not wait for one that is not captured"
        self.cuda.waits.append((self.cuda_stream, other.cuda_stream))

    def synchronize(self):
        pass


class FakeCuda:
    """The part of torch.cuda that `_Cuda` uses, with the rules of real streams and captures."""

    def __init__(self):
        self.streams, self.waits, self.capturing, self.captured_on = [FakeStream(self, 0)], [], False, []
        self.current = self.streams[0]

    def default_stream(self, device):
        return self.streams[0]

    def current_stream(self, device=None):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def is_current_stream_capturing(self):
        return self.capturing

    def Stream(self, device):
        self.streams.append(FakeStream(self, len(self.streams)))
        return self.streams[-1]

    def synchronize(self):
        assert not self.capturing, "synchronised while capturing"

    def CUDAGraph(self):
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: None)

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.current, self.capturing = stream, True
        self.captured_on.append(stream.cuda_stream)
        yield
        self.capturing, self.current = False, self.streams[0]  # not after an exception: torch does not restore it then


@pytest.fixture
def fake(monkeypatch):
    """A `_Cuda` on a torch.cuda that only keeps the books."""
    fake = FakeCuda()
    for name in ("default_stream", "current_stream", "set_stream", "is_current_stream_capturing", "Stream",
                 "synchronize", "CUDAGraph", "device", "graph"):  # fmt: skip
        monkeypatch.setattr(real_torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(cuda_device, "open_device", lambda: (module(), "cuda:0"))
    return fake, cuda_memory._Cuda()


def test_another_stream_waits_for_the_last_one(fake):
    """Weights come on one stream and may be used on another."""
    books, device = fake
    device.stream()
    assert books.waits == []
    books.current = other = books.Stream(None)
    device.fill(real_torch.zeros(0), real_torch.zeros(0))
    assert books.waits == [(other.cuda_stream, 0)]
    device.stream()
    books.current = books.streams[0]
    device.stream()
    assert books.waits == [(other.cuda_stream, 0), (0, other.cuda_stream)]


def test_what_torch_is_given_waits_too(fake, monkeypatch):
    """Not only kernels: whatever makes, reads or waits for a tensor knows of the stream that was used before."""
    books, device = fake
    monkeypatch.setattr(device, "empty", lambda shape, dtype: real_torch.empty(tuple(shape), dtype=dtype))
    device.torch_device = "cpu"
    x = real_torch.ones(2, 8)
    weight = SimpleNamespace(parts=[SimpleNamespace(q=x, columns=8, rows=2)])
    calls = {
        "zeros": lambda: cuda.zeros([2], np.float32),
        "copy": lambda: cuda.copy(x),
        "to_numpy": lambda: cuda.to_numpy(x),
        "to_host": lambda: cuda.to_host(x),
        "concatenate": lambda: cuda.concatenate([x, x]),
        "product": lambda: cuda._product(x, weight),
        "log_softmax_top": lambda: cuda.log_softmax_top(x[0], limit=8, k=2, token=1),
        "wait": cuda.wait,
    }
    cuda.use_device(device)
    try:
        for name, call in calls.items():
            before, books.current = books.current, books.Stream(None)
            call()
            assert books.waits[-1:] == [(books.current.cuda_stream, before.cuda_stream)], name
    finally:
        cuda.use_device(None)


def test_a_capture_has_its_own_stream_and_leaves_the_current_one(fake):
    books, device = fake
    calls = []
    for pool in (None, "pool"):
        graph, result = device.capture(lambda: calls.append(device.stream()), pool)
        assert result is None
        assert graph.pool() == "pool"
    assert calls == [1, 1]
    assert books.captured_on == [1, 1]
    assert books.waits == []


def test_a_capture_that_fails_leaves_the_current_stream(fake):
    books, device = fake

    def run():
        if books.capturing:
            raise MemoryError("on the way")

    with pytest.raises(MemoryError, match="on the way"):
        device.capture(run, None)
    assert books.current.cuda_stream == 0


def test_memory_that_torch_runs_out_of_is_a_device_error(fake, monkeypatch):
    _, device = fake

    def empty(shape, dtype, device):
        raise real_torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(real_torch, "empty", empty)
    monkeypatch.setattr(device, "free_bytes", lambda: 7_800_000_000)
    with pytest.raises(DeviceError, match=r"needs 9\.1 GB of GPU memory, 7\.8 GB are free"):
        device.empty([9_100_000_000 // 4], real_torch.float32)


def test_the_emulator_captures_launches_and_nothing_else(emulated):
    """As a GPU does: what torch computes meanwhile, or what the host holds, would be missing from the graph."""
    import emulator

    device = emulator.EmulatedDevice(emulated)
    cuda.use_device(device)
    try:
        x, w = cuda.upload(np.ones((1, 8), np.float32)), np.zeros(8, np.float32)
        norm = cuda.upload(w)
        graph, y = device.capture(lambda: cuda.rms_norm(x, norm, 0.0), None)
        assert y.numpy().tobytes() == b"\xcd" * 32  # nothing ran yet
        graph.replay()
        assert (y == 1).all()
        x[:] = -5
        graph.replay()
        assert (y == -1).all()
        with pytest.raises(AssertionError, match="captured graph"):
            device.capture(lambda: cuda.rms_norm(x, norm, 0.0) + 1, None)
        with pytest.raises(AssertionError, match="captured graph"):
            device.capture(lambda: cuda.rms_norm(x, w, 0.0), None)
    finally:
        cuda.use_device(None)


def test_the_emulator_sees_what_changes_before_it_is_read(emulated):
    """A GPU reads the host's memory at any time until it has been waited for."""
    import emulator

    device = emulator.EmulatedDevice(emulated)
    host, target = device.host_bytes(8).fill_(1), device.empty([8], real_torch.uint8)
    device.send(target, host)
    device.wait()
    host.fill_(2)
    device.send(target[:4], host[:4])
    host[4:] = 3
    device.receive(host, target)
    device.send(target, host)
    host[7] = 4
    with pytest.raises(AssertionError, match="changed before the device had read it"):
        device.wait()
