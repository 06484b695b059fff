"""What does it bring to decode several sequences in one step, and does a long prompt disturb those that are running?

    python bench/make_checkpoint.py 0.8B /tmp/random-0.8B && deltaic quantize /tmp/random-0.8B -o /tmp/int4 --dtype int4
    python bench/bench_batch.py /tmp/int4                       # both parts, about a minute
    python bench/bench_batch.py /tmp/int4 sizes --sizes 1 8 16 --context 2000 --json

equal  tokens of many requests, with and without drafts, by how many run at a time, against those of each alone
sizes  tokens per second of all sequences together, by how many are decoded in one step
stall  gaps between two tokens of running sequences while a prompt of 4,096 tokens is read beside them, against their
       usual gap and the time that the same chunk of the prompt takes when nobody else is there

Prints figures (or one JSON object) and writes a plot of each part that was run to bench/results.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import deltaic
import numpy as np
import parts
from common import endless, random_ids
from deltaic import _core
from deltaic.generate.prefill import PromptReader
from deltaic.generate.request import Request
from deltaic.generate.scheduler import PREFILL_TOKENS, Scheduler
from deltaic.machine import preemptions


def without_ends(bench: parts.Bench) -> parts.Bench:
    """Answers then end where max_new_tokens says."""

    def run(model: deltaic.Model, args: argparse.Namespace) -> parts.Figures:
        with endless(model):
            return bench(model, args)

    return run


def decoding(
    model: deltaic.Model, scheduler: Scheduler, rng: np.random.Generator, count: int, args: argparse.Namespace
) -> list[Request]:
    """`count` requests whose prompts have been read."""
    requests = [
        scheduler.submit(
            random_ids(model, rng, args.context),
            max_new_tokens=2000,
            temperature=args.temperature,
            seed=1,
            speculate="off",
        )
        for _ in range(count)
    ]
    while scheduler.load.decoding < count:
        scheduler.step()
    return requests


# ------------------------------------------------------------------------------- sizes


def bench_sizes(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of each size in turn, so that all see the same machine; the fastest half of the steps counts."""
    rng = np.random.default_rng(0)
    seconds: dict[int, list[float]] = {size: [] for size in args.sizes}
    schedulers = {size: model.scheduler(max_sequences=size) for size in args.sizes}
    requests = [decoding(model, scheduler, rng, size, args) for size, scheduler in schedulers.items()]
    for _ in range(args.rounds):
        for size, scheduler in schedulers.items():
            for i in range(args.steps + 1):
                began = time.perf_counter()
                scheduler.step()
                if i:  # the first one finds the caches full of the others' states
                    seconds[size].append(time.perf_counter() - began)
    step = {size: statistics.quantiles(times, n=4)[0] for size, times in seconds.items()}
    assert not any(request.ended for group in requests for request in group)
    for scheduler in schedulers.values():
        scheduler.close()
    return {
        "context": args.context,
        "step_seconds": step,
        "tokens_per_second": {size: size / s for size, s in step.items()},
        "speedup": {size: size / s * step[min(step)] / min(step) for size, s in step.items()},
    }


# ------------------------------------------------------------------------------- stall


def bench_stall(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Each chunk is read twice, beside the running sequences and for another state when nobody else is there, so that
    what is compared saw the same machine."""
    rng = np.random.default_rng(1)
    long = random_ids(model, rng, args.prompt_tokens)
    scheduler = model.scheduler(max_sequences=args.running + 1, prefill_tokens=args.prefill_tokens)
    running = decoding(model, scheduler, rng, args.running, args)
    twin = PromptReader(model._runner, model.prepare(long), model.new_state())

    def gap() -> float:
        """Seconds from one token of every running sequence to the next."""
        for request in running:
            request.take()
        before = preemptions()
        began, kernels = time.perf_counter(), _core.kernel_seconds()
        scheduler.step()
        seconds = time.perf_counter() - began
        preempted.append(preemptions() - before)
        outside.append(seconds - (_core.kernel_seconds() - kernels))
        assert all(request.take() for request in running), "a step gave a running sequence no token"
        return seconds

    def chunk() -> float:
        began = time.perf_counter()
        model._runner.read([(twin, min(twin.at + args.prefill_tokens, len(long)))])
        return time.perf_counter() - began

    outside: list[float] = []
    preempted: list[int] = []
    usual = [gap() for _ in range(20)]
    outside.clear()
    preempted.clear()
    new = scheduler.submit(long, max_new_tokens=2000, temperature=0.0, speculate="off")
    beside: list[float] = []
    alone: list[float] = []
    while new.result.completion_tokens == 0:
        beside.append(gap())
        alone.append(chunk())
    usually = statistics.median(preempted)
    quiet = [n <= 2 * usually for n in preempted]
    after = [gap() for _ in range(10)]
    scheduler.close()
    step = statistics.median(usual)
    near = [statistics.median(alone[max(0, i - 4) : i + 5]) for i in range(len(alone))]
    return {
        "running": args.running,
        "context": args.context,
        "prompt_tokens": args.prompt_tokens,
        "prefill_tokens": args.prefill_tokens,
        "usual_step_seconds": step,
        "chunk_seconds": alone,
        "gaps_before": usual,
        "gaps_beside": beside,
        "gaps_after": after,
        "longest_gap_seconds": max(beside),
        "steps_beyond_the_chunk": sorted((g - c) / step for g, c in zip(beside, alone, strict=True)),
        "over_the_limit": sum(over := [g > 2 * step + c for g, c in zip(beside, alone, strict=True)]),
        # gaps in which other processes took the processor more than twice as often as usual say more about them
        "disturbed": len(quiet) - sum(quiet),
        "over_the_limit_undisturbed": sum(o and q for o, q in zip(over, quiet, strict=True)),
        # what the machine does by itself: chunks that took a step longer alone than those around them
        "alone_over": sum(c > n + step for c, n in zip(alone, near, strict=True)),
        "outside_kernels_seconds": outside if args.device == "cpu" else None,
    }


# ------------------------------------------------------------------------------- equal


def bench_equal(model: deltaic.Model, args: argparse.Namespace) -> dict[str, Any]:
    """Requests of unlike lengths, more than run at a time, so that they join and leave in the middle of the others'
    answers. Each token against that of the same request alone, without drafts."""
    rng = np.random.default_rng(2)
    longest = min(args.longest, model.context_length // 2)
    requests: list[dict[str, Any]] = []
    while sum(request["max_new_tokens"] for request in requests) < args.tokens:
        ids = random_ids(model, rng, int(rng.integers(2, 80)))
        new = int(rng.integers(longest // 10 + 1, longest + 1))
        requests.append({"prompt": ids, "max_new_tokens": new, "seed": len(requests)})
    modes = ["off", "auto", "lookup", *(["mtp"] if model._runner.mtp is not None else [])]
    found: dict[str, Any] = {}
    for name, options in {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "presence_penalty": 1.5},
    }.items():
        alone = [model.generate(**request, speculate="off", **options).token_ids for request in requests]
        for mode in modes:
            for size in args.equal_sizes:
                scheduler = model.scheduler(max_sequences=size)
                running = [scheduler.submit(**request, speculate=mode, **options) for request in requests]
                steps = 1
                while scheduler.step():
                    steps += 1
                results = [request.finish() for request in running]
                same = [
                    a == b for r, ids in zip(results, alone, strict=True) for a, b in zip(r.token_ids, ids, strict=True)
                ]
                found[f"{name}, {mode}, {size} at a time"] = {
                    "requests": len(requests), "tokens": len(same), "equal": sum(same), "steps": steps,
                    "drafted": sum(r.drafted for r in results), "accepted": sum(r.accepted for r in results),
                }  # fmt: skip
    return found


# ------------------------------------------------------------------------------- what is shown


def describe(part: str, f: dict[str, Any]) -> str:
    if part == "sizes":
        lines = [
            f"  {size:3d}  step {1e3 * f['step_seconds'][size]:6.1f} ms  {f['tokens_per_second'][size]:6.1f} tok/s  "
            f"{f['speedup'][size]:.2f} x"
            for size in f["step_seconds"]
        ]
        return "\n".join([f"sizes  sequences of {f['context']} tokens and more", *lines])
    if part == "equal":
        lines = [
            f"  {name:30s} {c['equal']} of {c['tokens']} tokens equal, {c['requests']} requests in {c['steps']} steps, "
            f"{c['accepted']} of {c['drafted']} drafts"
            for name, c in f.items()
        ]
        return "\n".join(["equal", *lines])
    more, outside = f["steps_beyond_the_chunk"], ""
    if f["outside_kernels_seconds"]:
        outside = f"; at most {1e3 * max(f['outside_kernels_seconds']):.1f} ms of a gap were outside of kernels"
    return (
        f"stall  {f['running']} sequences at {1e3 * f['usual_step_seconds']:.1f} ms a step; a prompt of "
        f"{f['prompt_tokens']} tokens is read beside them in {len(more)} chunks of {f['prefill_tokens']} "
        f"({1e3 * statistics.median(f['chunk_seconds']):.0f} ms alone): gaps of at most "
        f"{1e3 * f['longest_gap_seconds']:.0f} ms, the time of the chunk and {statistics.median(more):.1f} steps "
        f"(median; highest {more[-1]:.1f}); {f['over_the_limit']} over a chunk and 2 steps, of the "
        f"{len(more) - f['disturbed']} gaps that no other process disturbed {f['over_the_limit_undisturbed']}; of the "
        f"chunks alone, {f['alone_over']} took a step longer than those around them" + outside
    )


def plot(part: str, f: dict[str, Any], figure: Any, axis: Any) -> None:
    if part == "sizes":
        sizes = list(f["tokens_per_second"])
        axis.plot(sizes, [f["tokens_per_second"][size] for size in sizes], "o-")
        axis.plot(sizes, [f["tokens_per_second"][sizes[0]] * size / sizes[0] for size in sizes], ":", color="grey")
        axis.set(xlabel="sequences in one step", ylabel="tokens per second, all together", ylim=(0, None))
        axis.set_ylim(0, 1.3 * max(f["tokens_per_second"].values()))
    elif part == "stall":
        gaps = [*f["gaps_before"], *f["gaps_beside"], *f["gaps_after"]]
        axis.plot(range(len(gaps)), [1e3 * gap for gap in gaps], ".-", label="gap between two tokens")
        limits = [1e3 * (c + 2 * f["usual_step_seconds"]) for c in f["chunk_seconds"]]
        first = len(f["gaps_before"])
        axis.plot(
            range(first, first + len(limits)), limits, ":", color="tab:red", label="the same chunk alone + 2 steps"
        )
        axis.set(xlabel="step", ylabel="ms", ylim=(0, None), title=f"A prompt of {f['prompt_tokens']} tokens comes")
        axis.legend()


def main() -> None:
    benches: dict[str, parts.Bench] = {"sizes": bench_sizes, "stall": bench_stall, "equal": bench_equal}
    benches = {name: without_ends(bench) for name, bench in benches.items()}
    parser = parts.parser(__doc__ or "", benches)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes: sequences in one step")
    parser.add_argument("--equal-sizes", type=int, nargs="+", default=list(range(1, 9)), help="equal: at a time")
    parser.add_argument("--tokens", type=int, default=10_000, help="equal: of all requests together, for each size")
    parser.add_argument("--longest", type=int, default=300, help="equal: new tokens of a request at most")
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompts of running sequences")
    parser.add_argument("--temperature", type=float, default=0.0, help="of running sequences; 0: greedy")
    parser.add_argument("--rounds", type=int, default=6, help="sizes: how often each size has its turn")
    parser.add_argument("--steps", type=int, default=8, help="sizes: steps in each turn")
    parser.add_argument("--running", type=int, default=4, help="stall: sequences that are running")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="stall: tokens of the prompt that comes")
    parser.add_argument("--prefill-tokens", type=int, default=PREFILL_TOKENS, help="stall: rows of a chunk")
    parts.run(parser, benches, describe=describe, plot=plot, plots="batch", cache_bytes=0)


if __name__ == "__main__":
    main()
