"""Deltaic against other engines on the same numbers: a random checkpoint, converted for each, runs in alternation.

    python bench/make_checkpoint.py 0.8B /tmp/random-0.8B
    python bench/peers.py /tmp/random-0.8B --work /tmp/peers --peers-python /tmp/peers/venv/bin/python
    python bench/peers.py /tmp/random-0.8B --work /tmp/peers --make-venv

The peers are llama.cpp (llama-cpp-python, built from source for this CPU) and transformers. Their interpreter is
--peers-python, or one that --make-venv makes in the work folder (a build of many minutes). Packed folders and GGUF
files are kept in the work folder and made once. Each round runs every engine once, each in a process of its own;
printed are medians, and ours as multiples of theirs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import beside, environment

WORKER = Path(__file__).with_name("peer_worker.py")
PACKAGES = ("llama-cpp-python", "torch", "transformers")
# ours -> what it is compared with
PAIRS = {"deltaic int4": "llama Q4_0", "deltaic int8": "llama Q8_0", "deltaic bf16": "llama BF16"}
TRANSFORMERS = "transformers bf16"
START_PROMPT = 20


def make_venv(folder: Path) -> Path:
    """A virtual environment with the peers, built from source where they have native code."""
    import venv

    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", *PACKAGES]
        subprocess.run(command, check=True)
    return python


def prepare(checkpoint: Path, work: Path, names: list[str]) -> dict[str, Path]:
    """Packed folders and GGUF files for the engines in `names`, made where missing."""
    models: dict[str, Path] = {TRANSFORMERS: checkpoint}
    for name in names:
        engine, kind = name.split()
        if engine == "deltaic":
            from deltaic import quantize

            models[name] = work / f"{checkpoint.name}-{kind}"
            if not models[name].exists():
                quantize(checkpoint, models[name], dtype=kind, progress=True)
        elif engine == "llama":
            models[name] = work / f"{checkpoint.name}-{kind}.gguf"
            if not models[name].exists():
                from to_gguf import convert

                unfinished = models[name].with_suffix(".partial")
                convert(checkpoint, unfinished, kind)
                unfinished.rename(models[name])
    return models


def worker(name: str, model: Path, python: str, threads: int, prompt: int, new: int) -> list[str]:
    """The command that measures one engine."""
    command = [python, str(WORKER), name.split()[0], str(model), "--threads", str(threads)]
    return [*command, "--prompt", str(prompt), "--new", str(new)]


def seconds_to_first_token(name: str, model: Path, python: str, args: argparse.Namespace) -> float:
    """From starting a process to its first token after a prompt of START_PROMPT ids, as the parent sees it."""
    start = time.perf_counter()
    command = worker(name, model, python, args.threads, START_PROMPT, 0)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
    if line != "started\n":
        sys.exit(f"{name} did not start (code {child.returncode})")
    return seconds


def run(name: str, model: Path, python: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement of one engine in a fresh process, after one of its start."""
    first_token = seconds_to_first_token(name, model, python, args)
    command = worker(name, model, python, args.threads, args.prompt, args.new)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"first_token": first_token}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each engine, and ours as multiples of theirs."""
    medians = {
        name: {key: median(result[key] for result in results) for key in results[0]} for name, results in runs.items()
    }
    ratios: dict[str, dict[str, float]] = {}
    for ours, theirs in [*PAIRS.items(), *((ours, TRANSFORMERS) for ours in PAIRS)]:
        if ours in medians and theirs in medians:
            ratios[f"{ours} / {theirs}"] = {
                key: medians[ours][key] / medians[theirs][key] for key in ("prefill", "decode", "first_token")
            }
    return {"medians": medians, "ratios": ratios, "runs": runs}


def as_table(summary: dict[str, Any], args: argparse.Namespace) -> str:
    """For people."""
    lines = [
        f"tokens/s, {args.threads} threads, medians of {args.rounds} rounds in alternation; seconds from starting the",
        f"process to the first token after {START_PROMPT}; largest resident memory"
        + (f"; {args.beside} busy processes beside" if args.beside else ""),
        f"{'':34} {f'prefill-{args.prompt}':>12} {'decode':>8} {'start':>8} {'memory':>9}",
    ]
    for name, values in summary["medians"].items():
        memory = values["peak_resident_bytes"] / 1e6
        speeds = f"{values['prefill']:12.1f} {values['decode']:8.1f}"
        lines.append(f"{name:34} {speeds} {values['first_token']:6.2f} s {memory:6.0f} MB")
    for name, values in summary["ratios"].items():
        lines.append(f"{name:34} {values['prefill']:11.2f}x {values['decode']:7.2f}x {values['first_token']:7.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for packed and converted models")
    parser.add_argument("--peers-python", help="interpreter that has llama_cpp, torch and transformers")
    parser.add_argument("--make-venv", action="store_true", help="make such an interpreter in the work folder")
    parser.add_argument("--engines", help="comma-separated, of: " + ", ".join([*PAIRS, *PAIRS.values(), TRANSFORMERS]))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="so many busy processes run meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers here")
    args = parser.parse_args()
    known = [*PAIRS, *PAIRS.values(), TRANSFORMERS]
    names = [name.strip() for name in args.engines.split(",")] if args.engines else known
    for name in names:
        if name not in known:
            parser.error(f"unknown engine {name!r}; expected some of {', '.join(known)}")
    args.work.mkdir(parents=True, exist_ok=True)
    peers_python = args.peers_python
    if any(not name.startswith("deltaic") for name in names) and peers_python is None:
        if not args.make_venv:
            parser.error("the peers need an interpreter: --peers-python, or --make-venv")
        peers_python = str(make_venv(args.work / "venv"))
    models = prepare(args.checkpoint, args.work, names)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            python = sys.executable if name.startswith("deltaic") else peers_python
            with beside(args.beside):
                result = run(name, models[name], python, args)
            runs[name].append(result)
            print(f"{name}: prefill {result['prefill']:.1f}, decode {result['decode']:.1f}", file=sys.stderr)
    summary = summarise(runs)
    print(as_table(summary, args))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
