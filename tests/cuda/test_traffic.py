"""bench/cuda_traffic.py: what kernels ask of memory, counted without a card."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import emulator
import pytest
from deltaic.ops import cuda


@pytest.fixture(scope="module")
def traffic():
    path = list(sys.path)
    file = Path(__file__).parents[2] / "bench" / "cuda_traffic.py"
    spec = importlib.util.spec_from_file_location("bench_cuda_traffic", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "capability", "warps"),
    [
        (32, 256, 0, 90, 64),
        (128, 256, 9000, 90, 16),
        (255, 128, 0, 90, 8),
        (40, 32, 0, 90, 32),  # no more than 32 blocks
        (40, 128, 52432, 90, 16),  # the shared memory of four blocks
        (40, 128, 52432, 80, 12),
    ],
)
def test_warps_of_a_multiprocessor(traffic, registers, threads, shared, capability, warps):
    """As NVIDIA's occupancy calculator has them."""
    assert traffic.occupancy(registers, threads, shared, capability) == warps


def test_cases_are_printed(traffic, emulated, use_ptx, capsys, monkeypatch):
    use_ptx(90)
    emulated.set_order("forward", 0)
    cuda.use_device(emulator.EmulatedDevice(emulated))
    resources = {capability: defaultdict(lambda: (32, 0)) for capability in (90, 80)}
    some = [lambda: traffic.products(1, "bf16"), lambda: traffic.delta([4], 16, True), traffic.small]
    monkeypatch.setattr(traffic, "GROUPS", {"Some": some})
    try:
        traffic.tables(
            emulated, ["linear out bf16 T=1", "commit", "embed", "norms", "sample"], resources, 4, "commit_conv"
        )
    finally:
        emulated.use_ptx("")
        cuda.use_device(None)
    said = capsys.readouterr().out
    # 64 blocks of eight warps on 132 processors; weights, the row and outputs are read and written in whole sectors.
    assert "| linear out bf16 T=1 | gemv_mma<bf16> | 64 | 3.9 | 32 | 9.1 | 64/64 | 1.00 | 1.00 | 4,104 |" in said
    for kernel in ("commit<32>", "embed<bf16>", "rms_norm_pair<bf16>", "shortlist", "choose"):
        assert f"{kernel} |" in said
    assert "lanes active" in said.split("commit Hv=16 T=4: commit_conv, ")[1]
