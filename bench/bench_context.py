"""How does speed change with the context? Decode against the tokens in the cache, prefill against the prompt.

    python bench/bench_context.py MODEL [--decode 512,2048,8192,32768] [--prefill 512,2048,8192] [--kv bf16,int8]
                                        [--threads 2] [--steps 24] [--out bench/results/context]

Decode: the cache is filled with random numbers (their values do not matter to the time), then single tokens are fed.
What K/V explain is their bytes over the read bandwidth measured between the tokens. Writes OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import deltaic
import numpy as np
from common import new_figure, save_figure, timed
from deltaic.benchmark import PROBE_BYTES, read_bandwidth

CHUNK = 512


def fill(state: Any, tokens: int, rng: np.random.Generator) -> None:
    """Make `state` look as if it had consumed `tokens` tokens."""
    from deltaic.ops.reference import kv_encode

    state.reserve(tokens + 64)
    *shape, _ = state.kv.blocks[0].shape
    head_dim = state._kv_shape()[4]
    numbers = rng.standard_normal((*shape, head_dim), dtype=np.float32)
    stored = kv_encode(numbers, state.kv.blocks[0].dtype)
    for block in state.kv.blocks:
        block[...] = stored
    state.length = tokens


def feed(model: Any, state: Any, count: int, rng: np.random.Generator, *, prefill: bool) -> None:
    text = model._runner.text
    ids = rng.integers(0, min(1000, text.config.vocab_size), count)
    if prefill:
        positions = np.repeat(np.arange(state.length, state.length + count)[:, None], 3, 1)
        hidden = text.forward(text.embed(ids), positions, [state], np.array([0, count]), prefill=True)
        text.logits(hidden[-1:])
    else:
        text.step([ids.tolist()], [state], head=True)


def decode_seconds(
    model: Any, lengths: list[int], steps: int, data: np.ndarray, rng: np.random.Generator
) -> tuple[dict[int, float], float]:
    """Median seconds of a token for each context, all measured in turn, and the read bandwidth meanwhile: memory of a
    shared machine is faster at one time than at another."""
    states = {tokens: model.new_state() for tokens in lengths}
    for tokens, state in states.items():
        fill(state, tokens, rng)
    times: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    reads = []
    for _ in range(steps + 3):
        reads.append(read_bandwidth(model._ops, data, rounds=1))
        for tokens, state in states.items():
            times[tokens].append(timed(lambda state=state: feed(model, state, 1, rng, prefill=False)))
    return {tokens: median(some[3:]) for tokens, some in times.items()}, median(reads[3:])


def prefill_seconds(model: Any, tokens: int, rng: np.random.Generator) -> float:
    """Median; short prompts are read several times."""

    def read(state: Any) -> None:
        for first in range(0, tokens, CHUNK):
            feed(model, state, min(CHUNK, tokens - first), rng, prefill=True)

    times = []
    for _ in range(max(1, 4096 // tokens)):
        state = model.new_state()
        state.reserve(tokens)
        times.append(timed(lambda state=state: read(state)))
    return median(times)


def plot(path: Path, decode: dict[str, dict[int, float]], prefill: dict[str, dict[int, float]], title: str) -> None:
    figure, axes = new_figure(2, (9, 3.5))
    for axis, values, name in ((axes[0], decode, "decode"), (axes[1], prefill, "prefill")):
        for kv, line in values.items():
            if line:
                axis.plot(list(line), list(line.values()), marker="o", label=f"K/V {kv}")
        axis.set(xscale="log", xlabel="tokens of context" if name == "decode" else "tokens of prompt", title=name)
        axis.set_ylabel("tokens/s")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--decode", default="512,2048,8192,32768")
    parser.add_argument("--prefill", default="512,2048,8192")
    parser.add_argument("--kv", default="bf16,int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("bench/results/context"))
    args = parser.parse_args()

    rng, data = np.random.default_rng(1), np.ones(PROBE_BYTES, np.uint8)
    lengths, prompts = ([int(n) for n in text.split(",") if n] for text in (args.decode, args.prefill))
    decode: dict[str, dict[int, float]] = {}
    prefill: dict[str, dict[int, float]] = {}
    info: dict[str, Any] = {}
    rows = []
    for kv in args.kv.split(","):
        model = deltaic.load(args.model, threads=args.threads, kv_dtype=kv, cache_bytes=0, speculate="off")
        info = model.info()
        decode[kv], prefill[kv] = {}, {}
        per_token = (model.new_state().bytes_for(1 << 20) - model.new_state().bytes_for(0)) / (1 << 20)
        seconds, read = decode_seconds(model, lengths, args.steps, data, rng) if lengths else ({}, 0.0)
        for tokens, each in seconds.items():
            decode[kv][tokens] = 1 / each
            explained = seconds[lengths[0]] + (tokens - lengths[0]) * per_token / read
            rows.append(
                f"| {kv} | {tokens} | {1 / each:.1f} | {1e3 * each:.1f} | {tokens * per_token / 1e6:.0f} MB | "
                f"{read / 1e9:.1f} | {1e3 * explained:.1f} | {each / explained:.2f} |"
            )
        for tokens in prompts:
            prefill[kv][tokens] = tokens / prefill_seconds(model, tokens, rng)
    lines = [
        f"# Speed against context: {args.model.name}, {info['isa']}, {args.threads} threads",
        "",
        f"`python bench/bench_context.py {args.model.name}`; random weights.",
        "",
        "| K/V | tokens in cache | decode tok/s | ms | K/V read | reads GB/s | ms that K/V explain | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "| K/V | prompt | prefill tok/s | cost of a token against the shortest |",
        "|---|---:|---:|---:|",
    ]
    for kv, line in prefill.items():
        first = next(iter(line.values()), 0.0)
        lines += [f"| {kv} | {tokens} | {speed:.0f} | {first / speed:.2f} |" for tokens, speed in line.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.md").write_text(text)
    plot(Path(f"{args.out}.png"), decode, prefill, f"{args.model.name}, {info['isa']}, {args.threads} threads")


if __name__ == "__main__":
    main()
