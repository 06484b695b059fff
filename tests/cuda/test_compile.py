"""The real compiler accepts every kernel, and no kernel of the decode path keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
# Kernels of a decoded token, as they appear in mangled names.
DECODE = {
    "linear": ("gemv_kernel",),
    "gated_delta_net": ("conv_kernel", "recurrent_kernel", "gated_norm_kernel"),
    "gated_attention": (
        "prepare_kernel", "attend_kernelILi64ELb1", "attend_kernelILi128ELb1", "attend_kernelILi256ELb1",
        "attend_row_kernel", "combine_kernel",
    ),
    "moe": ("route_kernel", "expert_up_kernel", "expert_down_kernel"),
    "sample": ("choose_kernel", "shortlist_kernel"),
    "norm": ("rms_norm_kernel", "embed_kernel"),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("stem", DECODE)
def test_decode_kernels_do_not_spill(tmp_path, stem):
    command = [
        "nvcc", "-std=c++20", "-O3", "-arch=sm_90", "--extended-lambda", "-Werror=all-warnings", "-Xptxas=-v",
        f"-I{SOURCES}", "-c", str(SOURCES / "cuda" / f"{stem}.cu"), "-o", str(tmp_path / "out.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(
        r"Function properties for (\S+)\n\s*.*?, (\d+) bytes spill stores, (\d+) bytes spill", done.stderr
    )
    for kernel in DECODE[stem]:
        mine = [(name, stores, loads) for name, stores, loads in found if kernel in name]
        assert mine, f"{kernel} is not among the compiled kernels"
        assert not [m for m in mine if m[1:] != ("0", "0")], mine
