"""For which cards does CMake build the kernels? With made-up compilers and cards, and the real ones if there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
CUDA_13 = "75 80 86 87 88 89 90 100 103 110 120 121"
CUDA_12_0 = "50 52 60 61 70 75 80 86 87 89 90"
SCRIPT = """
include({root}/cmake/cuda_architectures.cmake)
deltaic_cuda_architectures(architectures names problem)
message("architectures=${{architectures}}")
message("names=${{names}}")
message("problem=${{problem}}")
"""


def program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def chosen(tmp_path: Path, *, mode="AUTO", archs="", toolkit="13.0", known=CUDA_13, cards="") -> dict[str, str]:
    """What cmake/cuda_architectures.cmake decides for a toolkit and cards."""
    program(tmp_path, "nvidia-smi", f"printf '{cards}'" if cards else "echo no devices; exit 6")
    nvcc = program(
        tmp_path, "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {toolkit}, V{toolkit}.1";; '
        f"*) for a in {known}; do echo compute_$a; done;; esac",
    )  # fmt: skip
    script = tmp_path / "script.cmake"
    script.write_text(SCRIPT.format(root=ROOT))
    command = ["cmake", f"-DDELTAIC_CUDA={mode}", f"-DDELTAIC_CUDA_ARCHS={archs}", "-P", str(script)]
    if known:
        command.insert(1, f"-DCMAKE_CUDA_COMPILER={nvcc}")
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stderr.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        ({"cards": "9.0\\n"}, "90-real"),
        ({"cards": "8.9\\n8.9\\n7.5\\n"}, "75-real;89-real"),
        ({"cards": "12.1\\n"}, "121-real"),
        ({"cards": "12.0\\n", "toolkit": "12.0", "known": CUDA_12_0}, "90-virtual"),  # newer than the toolkit
        # 101 is one of the chips with a CPU beside them
        ({"cards": "10.3\\n", "toolkit": "12.8", "known": "75 80 86 87 89 90 100 101 120"}, "100-real"),
        ({"cards": "8.9\\n6.1\\n"}, "89-real"),  # an old card beside a usable one
        ({"mode": "ON"}, "75-real;80-real;86-real;89-real;90-real;100-real;120-real;80-virtual;121-virtual"),
        ({"mode": "ON", "toolkit": "12.0", "known": CUDA_12_0},
         "75-real;80-real;86-real;89-real;90-real;80-virtual;90-virtual"),
        ({"archs": "90;80"}, "80-real;90-real;90-virtual"),
        ({"archs": "80", "mode": "ON", "cards": "9.0\\n"}, "80-real;80-virtual"),
    ],
)  # fmt: skip
def test_architectures(tmp_path, asked, architectures):
    found = chosen(tmp_path, **asked)
    assert found["problem"] == ""
    assert found["architectures"] == architectures
    assert len(found["names"].split()) == len(architectures.split(";"))


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "there is none"),
        ({"cards": "6.1\\n"}, "older than 75"),
        ({"mode": "ON", "toolkit": "11.8"}, "is CUDA '11.8', expected 12.0 or newer"),
        ({"mode": "ON", "known": ""}, "no CUDA compiler"),
    ],
)
def test_why_nothing_is_built(tmp_path, asked, problem):
    found = chosen(tmp_path, **asked)
    assert problem in found["problem"]
    assert found["architectures"] == ""


def test_a_compiler_outside_path_is_found(tmp_path):
    """Where the toolkit's installer puts it, and many never add it to PATH."""
    (tmp_path / "bin").mkdir()
    nvcc = program(tmp_path / "bin", "nvcc", "exit 0")
    script = tmp_path / "script.cmake"
    script.write_text(
        f'include({ROOT}/cmake/cuda_architectures.cmake)\ndeltaic_cuda_compiler(found)\nmessage("found=${{found}}")\n'
    )
    environment = {**os.environ, "PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [shutil.which("cmake"), "-P", str(script)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert f"found={nvcc}" in done.stderr


def configure(folder: Path, path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure the whole project with the programs of `path` before all others."""
    pybind11 = pytest.importorskip("pybind11")
    command = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    environment = {**os.environ, "PATH": os.pathsep.join([str(path), os.environ["PATH"]]), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not installed")


@needs_ninja
def test_a_machine_without_a_card_builds_nothing_for_one(tmp_path):
    program(tmp_path, "nvidia-smi", "exit 9")
    done = configure(tmp_path / "build", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels are not built: no NVIDIA GPU in this machine" in done.stdout


@needs_ninja
def test_a_compiler_that_does_not_work_is_no_error_unless_asked_for(tmp_path):
    program(tmp_path, "nvidia-smi", "echo 9.0")
    nvcc = str(program(tmp_path, "nvcc", 'case "$1" in --version) echo "release 13.0";; esac; exit 1'))
    done = configure(tmp_path / "auto", tmp_path, CUDACXX=nvcc)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels are not built: " in done.stdout
    done = configure(tmp_path / "on", tmp_path, "-DDELTAIC_CUDA=ON", CUDACXX=nvcc)
    assert done.returncode != 0
    assert "DELTAIC_CUDA=ON: no CUDA compiler (nvcc) that works" in " ".join(done.stderr.split())


@needs_ninja
def test_an_unknown_mode_is_refused(tmp_path):
    done = configure(tmp_path / "build", tmp_path, "-DDELTAIC_CUDA=maybe")
    assert done.returncode != 0
    assert "DELTAIC_CUDA is 'maybe', expected AUTO, ON or OFF" in done.stderr


@needs_ninja
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_card_of_the_machine_is_what_is_built_for(tmp_path):
    """The whole configuration with the real compiler: the dialect is known to it, whatever the CMake."""
    program(tmp_path, "nvidia-smi", "echo 8.9")
    done = configure(tmp_path / "build", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels are built for sm_89\n" in done.stdout
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "-std=c++20" in rules
    assert "sm_89" in rules
    assert "sm_80" not in rules
