"""Is the compiled extension what it says? A forced instruction set is the one that runs, an unknown one is a clear
error, and no code compiled for one instruction set can end up being used by another.

The last point: a function that the compiler leaves as a weak symbol exists once after linking. If two instruction sets
emit the same name, an old CPU may be given the copy made for a new one. So every weak symbol of an object file of
csrc/cpu must carry the name of its instruction set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deltaic import _core
from deltaic.errors import ArgumentError
from deltaic.ops import cpu

ROOT = Path(__file__).resolve().parents[1]
COMPILER, NM = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
needs_compiler = pytest.mark.skipif(not (COMPILER and NM), reason="needs a C++ compiler and nm")

# Prints the instruction set in use and the bits of a long product: fused multiply-add changes them.
PROBE = """
import numpy as np
from deltaic.ops import cpu
rng = np.random.default_rng(1)
x, w = (rng.standard_normal((8, 999)).astype(np.float32) for _ in range(2))
print(cpu.isa(), cpu.linear(x, cpu.pack([w], "f32")).tobytes().hex())
"""


def run_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {"DELTAIC_ISA": name},
        capture_output=True,
        text=True,
        timeout=120,
    )


def usable_isas() -> tuple[str, ...]:
    return pytest.importorskip("deltaic._core", reason="deltaic._core is not built").usable_isas


def test_a_forced_instruction_set_is_the_one_that_runs():
    bits = {}
    for name in usable_isas():
        done = run_with_isa(name)
        assert done.returncode == 0, done.stderr
        used, bits[name] = done.stdout.split()
        assert used == name
    assert "baseline" in bits
    if len(bits) > 1:  # every other instruction set has a fused multiply-add
        assert all(value != bits["baseline"] for name, value in bits.items() if name != "baseline")


def test_an_unknown_instruction_set_is_a_clear_error():
    names = usable_isas()
    done = run_with_isa("pentium")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "DELTAIC_ISA=pentium is not an instruction set of this build; expected one of: " in done.stderr
    assert all(name in done.stderr for name in names)


def stray_symbols(objects: list[Path], isa: str) -> list[str]:
    """Weak symbols that do not carry the name of the instruction set, as `file: symbol`."""
    stray = []
    for path in objects:
        listing = subprocess.run([str(NM), str(path)], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            kind, symbol = line.split()[-2:]
            if kind in "WVu" and f"{len(isa)}{isa}" not in symbol:
                stray.append(f"{path.name}: {symbol}")
    return stray


def built_objects() -> dict[str, list[Path]]:
    """Object files of the newest build tree below build/, by instruction set."""
    trees = sorted(ROOT.glob("build/*/CMakeFiles/deltaic_baseline.dir"), key=lambda path: path.stat().st_mtime)
    if not trees:
        return {}
    folders = [
        f for f in trees[-1].parent.glob("deltaic_*.dir") if f.name not in ("deltaic_core.dir", "deltaic_cuda.dir")
    ]
    return {f.name[len("deltaic_") : -len(".dir")]: sorted(f.glob("csrc/cpu/*.o")) for f in folders}


def test_what_an_operator_writes_to_must_be_writeable():
    x, y = np.ones((2, 8), np.float32), np.empty((2, 8), np.float32)
    _core.rms_norm(x, x[0], 1e-6, y)
    y.flags.writeable = False
    with pytest.raises(ArgumentError, match="rms_norm: y is read-only, but the operator writes to it"):
        _core.rms_norm(x, x[0], 1e-6, y)


def test_a_shared_state_cannot_be_written():
    rows, states = np.ones((1, 2 * 4 + 2 * 4 + 2), np.float32), [np.zeros((1, 4, 4), np.float32)]
    arguments = {"eps": 1e-6, "num_k_heads": 1, "head_k_dim": 4, "head_v_dim": 4, "cu_seqlens": np.array([0, 1])}
    weights = [np.ones(shape, np.float32) for shape in ((4, 12), 1, 1, 4)]
    conv = [np.zeros((3, 12), np.float32)]
    cpu.gated_delta_net(rows, *weights, **arguments, conv_states=conv, states=states)
    before = states[0].copy()
    states[0].flags.writeable = False
    with pytest.raises(ArgumentError, match="gated_delta_net: states is read-only"):
        cpu.gated_delta_net(rows, *weights, **arguments, conv_states=conv, states=states)
    assert np.array_equal(states[0], before)


@needs_compiler
def test_objects_of_one_instruction_set_share_no_symbol_with_another():
    objects = built_objects()
    if not objects:
        pytest.skip("no build tree below build/")
    for isa, paths in objects.items():
        assert paths, f"no object files of {isa}"
        assert stray_symbols(paths, isa) == []


def compile_object(source: Path, folder: Path) -> Path:
    """Compiles without optimisation: what may be inlined is not, so this is the strictest case."""
    target = folder / f"{source.stem}.o"
    flags = ["-std=c++20", "-O0", "-fPIC", "-DDELTAIC_ISA=probe", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(COMPILER), *flags, "-c", str(source), "-o", str(target)], check=True, timeout=300)
    return target


@needs_compiler
@pytest.mark.parametrize("name", ["norm", "sample"])
def test_a_fresh_object_shares_no_symbol(name, tmp_path):
    assert stray_symbols([compile_object(ROOT / "csrc" / "cpu" / f"{name}.cpp", tmp_path)], "probe") == []


@needs_compiler
def test_a_shared_inline_function_is_found(tmp_path):
    source = tmp_path / "bad.cpp"
    source.write_text(
        "inline float twice(float x) { return x + x; }\n"
        "namespace deltaic { namespace DELTAIC_ISA { float (*pointer)(float) = twice; } }\n"
    )
    assert stray_symbols([compile_object(source, tmp_path)], "probe") == ["bad.o: _Z5twicef"]
