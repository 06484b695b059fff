"""Does the emulator see what hardware would not forgive? Kernels are broken on purpose, a line each, and are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from deltaic.ops import cuda, reference
from helpers import assert_close
from test_mixers import check_attention, delta_case, run_delta

# file, line, what takes its place, what must be said
MUTATIONS = {
    "barrier removed": (
        "gated_delta_net.cu",
        "        parts[(warp * 2 + 1) * kColumns + lane] = Sq;\n        __syncthreads();\n",
        "        parts[(warp * 2 + 1) * kColumns + lane] = Sq;\n",
        "race on shared memory",
    ),
    "barrier in a branch": (
        "gated_delta_net.cu",
        "        __syncthreads();  // the last token's q, k and parts have been read\n",
        "        if (warp < 2) __syncthreads();\n",
        "threads meet at different barriers|never reach a barrier",
    ),
    "wrong index": (
        "gated_delta_net.cu",
        "const int64_t row = warp + 4 * r;\n        S[r] =",
        "const int64_t row = warp + 4 * r + (r == 1);\n        S[r] =",
        "instead of",
    ),
    "read beyond the buffer": (
        "gated_delta_net.cu",
        "const bool inside = column < s.Dv;",
        "const bool inside = true;",
        "access to byte .* of device buffer|were overwritten|instead of",
    ),
    "read far beyond the buffer": (
        "gated_delta_net.cu",
        "for (int j = 0; j < kTaps; ++j) w[j] = weight[j * s.C + channel];",
        "for (int j = 0; j < kTaps; ++j) w[j] = weight[(j + 1) * s.C + channel];",
        "access to byte [0-9]+ of device buffer",
    ),
    "shared array overrun": (
        "gated_delta_net.cu",
        "            for (int64_t i = lane; i < kMaxWidth; i += kWarp) {",
        "            for (int64_t i = lane; i <= kMaxWidth; i += kWarp) {",
        "element 128 of a shared array of 128",
    ),
    "output not written": (
        "gated_delta_net.cu",
        "if (warp == 0 && inside) o[",
        "if (warp == 0 && inside && column > 0) o[",
        "instead of|not finite",
    ),
}


RUN_BROKEN = """
import sys
import emulator
import numpy as np
from deltaic.ops import cuda, reference
from helpers import assert_close
from test_mixers import delta_case, run_delta

module = emulator.build({sys.argv[1]: (sys.argv[2], sys.argv[3])})
module.set_order("forward", 0)
cuda.use_device(emulator.EmulatedDevice(module))
case = delta_case(np.random.default_rng(1), [3], "f32")
try:
    y, _ = run_delta(case, "f32")
    assert_close(y, reference.gated_delta_net(**case), "f32", factor=4)
except (module.KernelError, AssertionError) as error:
    print("caught:", error)
"""


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_kernels_are_caught(name):
    """In a process of its own: an extension is loaded once per process."""
    file, old, new, message = MUTATIONS[name]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    command = [sys.executable, "-c", RUN_BROKEN, file, old, new]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=here, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(f"caught: .*({message})", done.stdout), done.stdout or "the broken kernel passed"


def test_unbroken_kernels_pass_the_same_check(device, rng):
    case = delta_case(rng, [3], "f32")
    y, _ = run_delta(case, "f32")
    assert_close(y, reference.gated_delta_net(**case), "f32", factor=4)


def test_attention_reads_no_key_that_is_not_there(device, rng, monkeypatch):
    """Keys beyond the sequence hold poison in the last block: not one may be used."""
    monkeypatch.setattr(cuda, "SPLITS", 4)
    _, _, y = check_attention(rng, [1], [9], "bf16", "bf16")
    assert torch.isfinite(y).all()


def test_two_builds_fit_into_one_process(emulated):
    """On a machine with a card the other build of the module is there too; pybind11 takes a type's name only once."""
    assert any(name.startswith("__pybind11_module_local") for name in dir(emulated.Matrices))


def test_guarded_memory_is_poisoned(emulated):
    device = emulator.EmulatedDevice(emulated)
    x = device.empty([3], torch.float32)
    assert x.numpy().tobytes() == b"\xcd" * 12
