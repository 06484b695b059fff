"""The real compiler accepts every source without a warning, for three generations of cards, and no kernel of the decode
path keeps registers in memory on any of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90", "120")
# Kernels of a decoded token, as they appear in mangled names.
DECODE = {
    "linear": ("gemv_kernel", "gemv_mma_kernel"),
    "gated_delta_net": ("conv_kernel", "recurrent_kernel", "gated_norm_kernel", "commit_kernel", "commit_conv_kernel"),
    "gated_attention": (
        "prepare_kernel", "attend_token_kernelILi64", "attend_token_kernelILi128", "attend_token_kernelILi256",
        "attend_row_kernel", "combine_kernel",
    ),
    "moe": ("route_kernel", "expert_up_kernel", "expert_down_kernel", "expert_up_mma_kernel", "expert_down_mma_kernel"),
    "sample": ("choose_kernel", "shortlist_kernel"),
    "norm": ("rms_norm_kernel", "rms_norm_pair_kernel", "embed_kernel"),
    "tape": ("relocate_kernel",),
    "vision": (),
    "runtime": (),
}  # fmt: skip


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("stem", DECODE)
def test_sources_compile_and_decode_kernels_do_not_spill(tmp_path, stem):
    command = [
        "nvcc", "-std=c++20", "-O3", "--extended-lambda", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC",
        "-Xptxas=-v", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES), f"-I{SOURCES}",
        "-c", str(SOURCES / "cuda" / f"{stem}.cu"), "-o", str(tmp_path / "out.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        done.stderr,
        re.DOTALL,
    )
    for kernel in DECODE[stem]:
        mine = [one for one in found if kernel in one[0]]
        assert {one[1] for one in mine} == set(ARCHITECTURES), f"{kernel} is not among the compiled kernels"
        assert not [one for one in mine if one[2:] != ("0", "0")], mine


def test_every_source_is_compiled():
    assert set(DECODE) == {file.stem for file in (SOURCES / "cuda").glob("*.cu")}


def test_every_kernel_waits_for_the_one_before():
    """With overlapping launches a kernel that does not would read what is not written yet, and end before its time."""
    kernels = 0
    for file in (SOURCES / "cuda").glob("*.cu"):
        if file.stem == "runtime":
            continue
        text = file.read_text()
        for found in re.finditer(r"__global__\s+void\b[^{;]*?(\w+_kernel)\s*\([^{;]*\)\s*\{\s*(\w+)\(\);", text):
            kernels += 1
            assert found[2] == ("grid_trigger" if found[1] == "gemv_mma_kernel" else "grid_begin"), found[1]
        assert text.count("__global__") == len(re.findall(r"grid_(?:begin|trigger)\(\);", text)), file.name
    assert kernels > 20
    product = (SOURCES / "cuda" / "gemv_mma.cuh").read_text()
    assert product.count("grid_wait();") == 1
    assert product.index("fetch(split, span);\n    grid_wait();") < product.index("load8(from")
