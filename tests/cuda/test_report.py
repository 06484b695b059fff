"""The report of bench/gpu.py is written whatever happens on the card."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def gpu():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_gpu", Path(__file__).parents[2] / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_a_step_that_fails_is_written_and_the_next_one_runs(gpu, tmp_path):
    report = gpu.Report(60, tmp_path / "new" / "report.md")
    assert not report.step("first", lambda: 1 / 0)
    assert report.step("second", lambda: report.add("all is well"))
    written = report.file.read_text()
    assert "- first: FAILED" in written
    assert "ZeroDivisionError" in written
    assert written.endswith("all is well\n")
    assert report.failed


def test_commands_end_with_all_that_they_started(gpu, tmp_path):
    """A compiler or a program under the sanitizer must not go on beside the next step; what was said is kept."""
    report = gpu.Report(60, tmp_path / "report.md")
    assert report.command("good", [sys.executable, "-c", "print('fine')"], 30)
    assert not report.command("bad", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30)
    script = f"echo started; sleep 300 & echo $! >{tmp_path}/pid; wait"
    assert not report.command("slow", ["sh", "-c", script], 5)
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "status")
    assert not status.exists() or "zombie" in status.read_text()
    written = report.file.read_text()
    for part in ("- good: ok", "- bad: FAILED (exit code 3)", "why", "- slow: NOT FINISHED", "started"):
        assert part in written


def test_the_steps_on_a_card_are_these_commands(gpu, tmp_path, monkeypatch):
    """Every path that a command names exists; graphs are not captured under the sanitizer."""
    said = []
    monkeypatch.setattr(
        gpu.Report, "command", lambda self, title, command, *_, lines=1, **env: said.append((command, env))
    )
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/tools/{name}")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    report = gpu.Report(60)
    gpu.build(report)
    gpu.run_tests(report)
    gpu.run_overlapped(report)
    gpu.run_sanitizer(report)
    configure, tests, again, model, *sanitizer = said
    assert "-DDELTAIC_CUDA_ARCHS=90" in configure[0]
    assert {env["PYTHONPATH"] for _, env in (tests, *sanitizer)} == {f"{gpu.ROOT / 'python'}{os.pathsep}/wheels"}
    assert configure[0][0] == "/tools/cmake"
    assert [command[2] for command, _ in sanitizer] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert again == (tests[0], tests[1] | {"DELTAIC_PDL": "1"})
    assert set(gpu.STEPS) - set(model[0]) == {"models"}
    assert model[1]["DELTAIC_PDL"] == "1"
    for command, _ in [tests, *sanitizer]:
        files = [word for word in command if word.startswith("tests/")]
        assert files
        assert all((gpu.ROOT / file).exists() for file in files)
    captured = {"tests/cuda/test_model.py", "tests/cuda/test_device_state.py"}
    assert not any(captured & set(command) for command, _ in sanitizer)


def test_what_a_process_has_measured_is_in_the_report(gpu, tmp_path, monkeypatch):
    """Whether it came through or a kernel ended it, without what the report says itself; of an older one, nothing."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    written = ["# deltaic on Some Card", "", f"{gpu.EXTENSION} here", "", "| operator | µs |", "| linear | 7 |"]

    def command(self, title, command, limit, **environment):
        file = Path(command[command.index("--report") + 1])
        assert not file.exists()
        assert float(command[command.index("--seconds") + 1]) < limit
        if title == "operators":
            gpu.Report(60, file).add("\n".join(written))
        return False

    monkeypatch.setattr(gpu.Report, "command", command)
    report = gpu.Report(60)
    assert not gpu.run_measured(report, "operators", ["0.8B"], 50)
    assert report.lines == written[3:]
    (tmp_path / "build" / "gpu-models.md").write_text("of yesterday")
    assert not gpu.run_measured(report, "models", ["0.8B"], 50)
    assert report.lines == written[3:]


def test_the_measuring_steps_run_on_the_emulator(gpu, tmp_path, emulated, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--report", str(tmp_path / "report.md")])
    assert gpu.main() == 0
    written = (tmp_path / "report.md").read_text()
    for line in (
        "| linear (down) | 4x48x32 | int4 |",
        "| sample_rows | 1, top_k=0 |",
        "| tiny | bf16 |",
        "| tiny | int4 |",
    ):
        assert line in written
