"""Where does the time of a decoded token go: kernels, the binding that calls them, sampling, or Python?

    python bench/bench_step.py MODEL [--steps 200] [--context 128] [--threads N] [--memory map] [--beside 1] [--json]

Decodes with the default sampling and prints medians over the steps. Kernel time is counted inside the extension, around
the kernels alone. Every other step runs with a clock around each call of the extension as well: what such a call takes
beyond its kernel is the binding's. The rest of a step without these clocks is Python's.

Between steps the machine is asked how fast it reads a buffer in order: the bytes that a token must read (weights,
state, keys and values: `benchmark.traffic_per_token`), at that speed, are the part of the step that nothing can save.
Each step is compared with the bandwidth measured before it, as memory is not equally fast all the time."""

from __future__ import annotations

import argparse
import gc
import json
from collections import defaultdict
from statistics import median
from time import perf_counter
from typing import Any

import deltaic
import numpy as np
from common import beside, random_ids
from deltaic import _core
from deltaic.benchmark import PROBE_BYTES, read_bandwidth, traffic_per_token
from deltaic.generate.options import SamplingParams
from deltaic.generate.sampling import Sampler

PROBE_STEPS = 10  # after so many the bandwidth is measured again
SAMPLING = SamplingParams(temperature=1.0, top_k=20, top_p=0.95, presence_penalty=1.5, seed=1)


class Clocks:
    """Seconds and calls of each operator of the extension while the block runs, kernels and calls apart."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])  # calls, seconds in call, in kernel
        self._plain = {name: getattr(_core, name) for name in dir(_core) if name in deltaic.ops.cpu.__all__}

    def __enter__(self) -> Clocks:
        for name, function in self._plain.items():
            if callable(function) and not isinstance(function, type):
                setattr(_core, name, self._timed(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._plain.items():
            setattr(_core, name, function)

    def _timed(self, name: str, function: Any) -> Any:
        entry, kernels = self.calls[name], _core.kernel_seconds

        def call(*args: Any) -> None:
            kernel, start = kernels(), perf_counter()
            function(*args)
            seconds = perf_counter() - start
            entry[0] += 1
            entry[1] += seconds
            entry[2] += kernels() - kernel

        return call


def measure(model: deltaic.Model, steps: int, context: int) -> dict[str, Any]:
    """Milliseconds per step (medians) and shares, and per operator the calls and microseconds of a step."""
    vocabulary, runner = model.config.text.vocab_size, model._runner
    prompt = model.prepare(random_ids(model, np.random.default_rng(1), context))
    state = model.new_state()
    state.reserve(context + 3 * steps + 16)
    (hidden,) = runner.hidden(prompt, state, [context])
    sampler = Sampler(model._ops, SAMPLING, limit=vocabulary, prompt_ids=prompt.token_ids)
    hidden = hidden[-1:]
    rows: list[list[float]] = []  # step, kernels, sampling, sampling's kernel
    clocks = Clocks()
    probe = np.ones(PROBE_BYTES, np.uint8)
    reads: list[float] = []  # bytes per second, for each row
    gc.collect()

    def step(hidden: np.ndarray) -> tuple[np.ndarray, list[float]]:
        kernels, start = _core.kernel_seconds(), perf_counter()
        logits = runner.logits(hidden)[0]
        before, mark = _core.kernel_seconds(), perf_counter()
        token, _ = sampler.next(logits)
        after, sampled = _core.kernel_seconds(), perf_counter()
        hidden = runner.step(token, state)
        end = perf_counter()
        return hidden, [end - start, _core.kernel_seconds() - kernels, sampled - mark, after - before]

    for i in range(steps + 8):
        if i % PROBE_STEPS == 8 % PROBE_STEPS:
            bandwidth = read_bandwidth(model._ops, probe)
            hidden, _ = step(hidden)
        hidden, row = step(hidden)
        if i >= 8:
            rows.append(row)
            reads.append(bandwidth)
        if i == 7:
            clocks.calls.clear()
        with clocks:
            hidden, _ = step(hidden)
    total, kernels, sampling, sample_kernel = (1e3 * median(column) for column in zip(*rows, strict=True))
    outside = 1e3 * median(row[0] - row[1] for row in rows)
    done = len(rows)
    needed = traffic_per_token(model, context + steps)["bytes_read_per_token"]
    binding = 1e3 * sum(entry[1] - entry[2] for entry in clocks.calls.values()) / done
    return {
        "step_ms": total,
        "bytes_read": needed,
        "read_bandwidth": median(reads),
        "bandwidth_fraction": median(needed / speed / row[0] for speed, row in zip(reads, rows, strict=True)),
        "kernels_ms": kernels - sample_kernel,
        "sampling_ms": sampling,
        "sampling_kernel_ms": sample_kernel,
        "outside_ms": outside,
        "binding_ms": binding,
        "python_ms": outside - binding,
        "outside_share": outside / total,
        "sampling_share": sampling / total,
        "calls": sum(entry[0] for entry in clocks.calls.values()) / done,
        "operators": {
            name: {"calls": calls / done, "kernel_us": 1e6 * kernel / done, "binding_us": 1e6 * (call - kernel) / done}
            for name, (calls, call, kernel) in sorted(clocks.calls.items(), key=lambda item: -item[1][2])
            if calls
        },
    }


def sampling_options(model: deltaic.Model) -> dict[str, float]:
    """Microseconds (medians) that `Sampler.next` takes for several options, on logits that no cache holds."""
    vocabulary, prompt = model.config.text.vocab_size, model.prepare(list(range(100, 228)))
    (hidden,) = model._runner.hidden(prompt, model.new_state(), [128])
    rows = [model._runner.logits(hidden[i : i + 1])[0] for i in range(64)]  # 64 MB
    found = {}
    for name, options in {
        "greedy": {"temperature": 0.0},
        "greedy, repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
        "top_k 20, top_p 0.95, presence_penalty": {"top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
        "min_p 0.05": {"min_p": 0.05},
        "top_p 0.95": {"top_p": 0.95},
        "no filter": {},
    }.items():
        params = SamplingParams(**{"temperature": 1.0, "seed": 1, **options})
        sampler = Sampler(model._ops, params, limit=vocabulary, prompt_ids=prompt.token_ids)
        seconds = []
        for row in rows:
            start = perf_counter()
            sampler.next(row)
            seconds.append(perf_counter() - start)
        found[name] = 1e6 * median(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", default="map", choices=("map", "copy"), help="see deltaic.load")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="so many busy processes run meanwhile")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = deltaic.load(args.model, threads=args.threads, memory=args.memory, cache_bytes=0)
    with beside(args.beside):
        facts = measure(model, args.steps, args.context)
    facts["sampling_options_us"] = sampling_options(model)
    if args.json:
        print(json.dumps(facts))
        return
    total = facts["step_ms"]
    print(f"{model.dtype}, {model._ops.isa()}, {model.threads} threads: {total:.2f} ms per token")
    megabytes, speed = facts["bytes_read"] / 1e6, facts["read_bandwidth"] / 1e9
    share = 100 * facts["bandwidth_fraction"]
    print(f"reads {megabytes:.0f} MB: at the {speed:.1f} GB/s of reading in order, {share:.1f} % of the step")
    for name, key in (
        ("kernels", "kernels_ms"),
        ("sampling", "sampling_ms"),
        ("outside of kernels", "outside_ms"),
        ("  binding", "binding_ms"),
        ("  Python", "python_ms"),
    ):
        print(f"{name:20}{facts[key]:8.3f} ms {100 * facts[key] / total:6.2f} %")
    print(f"{facts['calls']:.0f} calls per token:")
    for name, row in facts["operators"].items():
        per_call = row["binding_us"] / row["calls"]
        print(f"  {name:18}{row['calls']:5.0f} calls {row['kernel_us']:9.1f} us, binding {per_call:6.2f} us per call")
    print("choosing a token, logits of the model, with other options:")
    for name, microseconds in facts["sampling_options_us"].items():
        print(f"  {name:40}{microseconds:9.1f} us {microseconds / total / 10:6.2f} %")


if __name__ == "__main__":
    main()
