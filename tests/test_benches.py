"""Every bench that measures a model runs to its end, on the miniature and for a moment: figures in bench/results stay
reproducible as the engine changes."""

import subprocess
import sys
from pathlib import Path

import pytest
from deltaic.cli import MINIATURE

BENCH = Path(__file__).parents[1] / "bench"
RUNS = {
    "bench_batch.py": [
        "MODEL sizes stall --sizes 1 2 --rounds 1 --context 50 --prompt-tokens 1500 --no-plots",
        "MODEL equal --equal-sizes 2 --tokens 50 --longest 10 --no-plots",
    ],
    "bench_context.py": ["MODEL --decode 64,200 --prefill 32,64 --steps 2 --out OUT/context"],
    "bench_memory.py": ["PACKED --context 200 --new 4"],
    "bench_ops.py": ["--seconds 0.01 rms_norm sample"],
    "bench_quality.py": ["--per-kind 1 --texts 2 --markdown OUT/quality.md"],
    "bench_screen.py": ["MODEL --repeat 1 --steps 3 --draws 30"],
    "bench_speculate.py": [
        "MODEL costs losing copying gain --repeat 1 --new 16",
        "equal --tokens 32",
    ],
    "bench_start.py": ["PACKED --repeat 1"],
    "bench_state.py": [
        "MODEL --tokens 600 --answer-tokens 4 --file-tokens 300 --folder OUT --rounds 1 --minutes 0.01 "
        "--load-tokens 300 --no-plots"
    ],
    "bench_step.py": ["PACKED --steps 2 --context 20"],
    "bench_vision.py": ["MODEL --size 64 --rounds 1"],
}
ELSEWHERE = {"bench_install.py"}  # builds a wheel and an environment, as .ci/run does


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "miniature"
    run(["-m", "deltaic", "quantize", str(MINIATURE), "-o", str(folder), "--dtype", "int4"])
    return folder


def run(arguments: list[str]) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_every_bench_is_run_here():
    assert {path.name for path in BENCH.glob("bench_*.py")} == set(RUNS) | ELSEWHERE


@pytest.mark.parametrize(("script", "line"), [(script, line) for script, lines in RUNS.items() for line in lines])
def test_bench_runs(script, line, packed, tmp_path):
    places = {"MODEL": str(MINIATURE), "PACKED": str(packed)}
    words = [places.get(word, word.replace("OUT", str(tmp_path))) for word in line.split()]
    printed = run([str(BENCH / script), *words])
    assert any(character.isdigit() for character in printed)
