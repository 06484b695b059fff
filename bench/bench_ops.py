"""How fast is each operator, and how close to what the machine can do?

    python bench/bench_ops.py [words of rows] [--threads N] [--seconds S]

Prints, per operator and shape, the best time of many calls, the bytes that must be read from memory and the floating-
point operations per second, and both as a share of the machine's peaks, measured in the same run on the same threads:
reading a buffer far larger than the caches in order, and multiply-adds out of registers. A row is limited by
whichever share is near 1; data that stays in a cache between calls can exceed the reading peak.

"in the caches": products whose weights stay in the second-level caches show the arithmetic, without what Python takes.
With AVX-512 these rows also state processor cycles per line (64 bytes) of weights, and the fewest that their
instructions take on a Zen 4 core (`cycles_of_run`).

To add a row, append to `rows`: operator, shape in words, bytes, flops, and a function that builds the arguments and
returns a call without arguments. Only rows that are asked for are built.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from deltaic import _core
from deltaic.ops import cpu as ops
from deltaic.ops.quantise import block_bytes

Call = Callable[[], Any]
rng = np.random.default_rng(1)


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    bytes: float  # that one call reads from (or writes to) memory, at least
    flops: float
    make: Callable[[], Call]
    lines: float = 0  # of 64 bytes of weights that stay in the caches
    least_cycles: float = 0  # for them, on one core


def best_times(calls: Sequence[Call], seconds: float, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of the fastest run of each call: other work on the machine only ever adds time. They are called in turn,
    as the clock of a processor changes with time and work."""
    for call in calls:
        call()
    best, end = [float("inf")] * len(calls), time.perf_counter() + seconds
    while True:
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
        if time.perf_counter() > end:
            return best


def peaks(seconds: float) -> tuple[float, dict[str, float]]:
    """Bytes per second of reading in order, and operations per second out of registers by kind."""
    # Short calls: the best of many finds a moment when nothing else runs. Each part was last read a whole buffer ago.
    parts = np.ones((32, 8 << 20), np.uint8)
    turns = cycle(parts)
    read = parts[0].nbytes / best_times([lambda: ops.probe_read(next(turns))], seconds)[0]
    rates = {}
    for kind in ("f32", "int8"):
        done: list[int] = []
        try:
            (duration,) = best_times([lambda kind=kind, done=done: done.append(ops.probe_peak(kind, 1 << 14))], seconds)
        except ValueError:  # this instruction set has none
            continue
        rates[kind] = done[0] / duration
    return read, rates


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


# linear and swiglu

DTYPES = ("int4", "int8", "bf16", "f32")
COLD_BYTES = 128 << 20
CACHED_BYTES = 768 << 10  # of each thread


def weight(N: int, K: int, dtype: str, *, glu: bool = False) -> ops.Weight:
    """A packed matrix whose blocks of 16 rows are all the same: quantising as many different ones would take long."""
    rows = N // 2 if glu else N
    ((_, _, block),) = ops.packed_parts(ops.pack([normal(16, K, scale=K**-0.5)], dtype))
    packed = np.tile(block, -(-rows // 16) * (2 if glu else 1))
    return ops.from_packed([(dtype, rows, packed)], 1, K, glu)


def weights(N: int, K: int, dtype: str, *, glu: bool = False) -> Iterator[ops.Weight]:
    """In turn, as many copies of a matrix as no cache holds: each is read from memory, as in a model."""
    copies = 1 + int(COLD_BYTES / (block_bytes(dtype, K) / 16 * N))
    return cycle([weight(N, K, dtype, glu=glu) for _ in range(copies)])


def linear_row(T: int, K: int, N: int, dtype: str) -> Row:
    def make() -> Call:
        x, turns = normal(T, K), weights(N, K, dtype)
        return lambda: ops.linear(x, next(turns))

    size = block_bytes(dtype, K) / 16 * N
    return Row("linear", f"{dtype} T={T} {N}x{K}", size + 4 * T * (N + K), 2 * T * N * K, make)


def cycles_of_run(T: int, dtype: str) -> float:
    """Least cycles for T rows on one run of 128 columns of a block. In a cycle a Zen 4 core starts two instructions on
    512 bits, one of them a multiplication, and loads 64 bytes or broadcasts two words."""
    if dtype == "int8":
        multiply, load, other = 34 * T, 32 + 32 * T / 2, T
    else:  # 16 lines and four times the scales of 16 rows; two bias words beside eight of activations
        multiply, load, other = 38 * T, 20 + 40 * T / 2, 65 + 9 * T
    return max(multiply, load, (multiply + other) / 2)


def cached_row(T: int, dtype: str) -> Row:
    K = 1024
    N = 32 * int(ops.num_threads() * CACHED_BYTES / (2 * block_bytes(dtype, K)))

    def make() -> Call:
        x, w = normal(T, K), weight(N, K, dtype)
        return lambda: ops.linear(x, w)

    size = block_bytes(dtype, K) / 16 * N
    least = cycles_of_run(T, dtype) * K / 128 * N / 16
    return Row("linear", f"{dtype} T={T} in the caches", size, 2 * T * N * K, make, size / 64, least)


def swiglu_row(T: int, K: int, intermediate: int, dtype: str) -> Row:
    def make() -> Call:
        x, turns = normal(T, K), weights(2 * intermediate, K, dtype, glu=True)
        return lambda: ops.swiglu(x, next(turns))

    size = block_bytes(dtype, K) / 8 * intermediate
    return Row("swiglu", f"{dtype} T={T} 2x{intermediate}x{K}", size, 4 * T * intermediate * K, make)


def products_row(T: int, dtype: str, head: bool) -> Row:
    """All matrix products of the 0.8B model in the order of a step, each matrix in memory of its own."""
    H, inner, intermediate, vocabulary = 1024, 2048, 3584, 248320
    shapes = [(H, 5120 if layer % 4 == 3 else 8224) for layer in range(24)]
    elements = sum(K * N for K, N in shapes) + 24 * H * (inner + 3 * intermediate) + head * H * vocabulary

    def make() -> Call:
        layers = [
            (weight(N, K, dtype), weight(H, inner, dtype), weight(2 * intermediate, H, dtype, glu=True),
             weight(H, intermediate, dtype))
            for K, N in shapes
        ]  # fmt: skip
        last = weight(vocabulary, H, dtype) if head else None
        x, mixed, norm = normal(T, H), normal(T, inner), np.zeros(H, np.float32)

        def step() -> None:
            y = x
            for proj, out, gate_up, down in layers:
                ops.linear(y, proj, norm=norm)
                y = ops.linear(mixed, out, residual=y)
                y = ops.linear(ops.swiglu(y, gate_up, norm=norm), down, residual=y)
            if last is not None:
                ops.linear(y, last, norm=norm)

        return step

    name = f"{dtype} T={T} 0.8B{' with head' if head else ''}"
    return Row("products", name, block_bytes(dtype, 1024) / 16384 * elements, 2 * T * elements, make)


# the delta rule


def gated_delta_net_row(T: int, Hk: int, Hv: int, D: int) -> Row:
    """Operations: of the recurrence alone, where a product with the decay takes the place of a multiply-add."""

    def make() -> Call:
        C = 2 * Hk * D + Hv * D
        proj, conv_weight = normal(T, C + Hv * D + 2 * Hv), normal(4, C)
        arguments = {
            "eps": 1e-6,
            "num_k_heads": Hk,
            "head_k_dim": D,
            "head_v_dim": D,
            "cu_seqlens": np.array([0, T]),
            "conv_states": [np.zeros((3, C), np.float32)],
            "states": [np.zeros((Hv, D, D), np.float32)],
        }
        rate, dt_bias, norm = np.zeros(Hv, np.float32), normal(Hv), normal(D)
        return lambda: ops.gated_delta_net(proj, conv_weight, rate, dt_bias, norm, **arguments)

    return Row("gated_delta_net", f"T={T} {Hk}:{Hv}x{D}", 8 * Hv * D * D, 8 * T * Hv * D * D, make)


# attention


def block_table(tokens: int, Hkv: int, D: int, dtype: str, block: int = 128) -> ops.BlockTable:
    table = ops.BlockTable()
    for _ in range(-(-tokens // block)):
        values = normal(1, 2, Hkv, block, D)
        table.append(values if dtype == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16))
    return table


def gated_attention_row(T: int, start: int, Hq: int, Hkv: int, D: int, dtype: str) -> Row:
    def make() -> Call:
        R = D // 4
        proj, angle, norm = normal(T, (2 * Hq + 2 * Hkv) * D), normal(T, R // 2), normal(D)
        cos, sin = np.cos(angle), np.sin(angle)
        arguments = {
            "eps": 1e-6,
            "num_heads": Hq,
            "num_kv_heads": Hkv,
            "layer": 0,
            "cu_seqlens": np.array([0, T]),
            "starts": np.array([start]),
            "tables": [block_table(start + T, Hkv, D, dtype)],
        }
        return lambda: ops.gated_attention(proj, norm, norm, cos, sin, **arguments)

    pairs = T * start + T * (T + 1) / 2
    size = 2 * (start + T) * Hkv * D * {"f32": 4, "bf16": 2}[dtype]
    return Row("gated_attention", f"{dtype} T={T} at {start} {Hq}:{Hkv}x{D}", size, 4 * pairs * Hq * D, make)


def vision_attention_row(P: int, heads: int, D: int) -> Row:
    def make() -> Call:
        qkv, angle = normal(P, 3 * heads * D), normal(P, D // 2)
        cos, sin, cu_seqlens = np.cos(angle), np.sin(angle), np.array([0, P])
        return lambda: ops.vision_attention(qkv, cos, sin, num_heads=heads, cu_seqlens=cu_seqlens)

    return Row("vision_attention", f"P={P} {heads}x{D}", 16 * P * heads * D, 4 * P * P * heads * D, make)


def patch_embed_row(h: int, w: int, V: int, dtype: str) -> Row:
    def make() -> Call:
        image, weight = rng.integers(0, 256, (h, w, 3), dtype=np.uint8), ops.pack([normal(V, 768)], dtype)
        bias, positions, half = normal(V), normal(48 * 48, V), (0.5, 0.5, 0.5)
        sizes = {"patch_size": 16, "merge_size": 2, "mean": half, "std": half}
        return lambda: ops.patch_embed(image, weight, bias, positions, **sizes)

    P = h * w // 256
    return Row("patch_embed", f"{dtype} {h}x{w} V={V}", 3 * h * w + 4 * P * V, 2 * P * V * 768, make)


def rows() -> Iterator[Row]:
    for dtype in DTYPES:
        for T in (1, 8, 96):
            yield linear_row(T, 2048, 8192, dtype)
        for T in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32):
            yield products_row(T, dtype, head=True)
        for T in (256, 512):
            yield products_row(T, dtype, head=False)
        for T in (1, 512):
            yield linear_row(T, 1024, 8224, dtype)
            yield linear_row(T, 1024, 5120, dtype)
            yield linear_row(T, 2048, 1024, dtype)
            yield swiglu_row(T, 1024, 3584, dtype)
            yield linear_row(T, 3584, 1024, dtype)
        yield linear_row(1, 1024, 248320, dtype)
        yield linear_row(1024, 768, 3072, dtype)  # the vision tower
        yield linear_row(1024, 3072, 768, dtype)
    for dtype in ("int4", "int8"):
        for T in (1, 2, 3, 4, 8):
            yield cached_row(T, dtype)
    for T in (1, 4, 64, 512):
        yield gated_delta_net_row(T, 16, 16, 128)
    yield gated_delta_net_row(512, 16, 32, 128)
    for dtype in ("bf16", "f32"):
        for start in (100, 1000, 4095, 32767):
            yield gated_attention_row(1, start, 8, 2, 256, dtype)
    yield gated_attention_row(4, 4092, 8, 2, 256, "bf16")
    yield gated_attention_row(32, 4064, 8, 2, 256, "bf16")
    yield gated_attention_row(1, 4095, 24, 4, 256, "bf16")
    for start in (0, 4096):
        yield gated_attention_row(512, start, 8, 2, 256, "bf16")
    yield gated_attention_row(512, 4096, 8, 2, 256, "f32")
    for P in (64, 256, 1024, 4096):
        yield vision_attention_row(P, 12, 64)
    yield vision_attention_row(1024, 16, 72)
    yield patch_embed_row(64, 64, 768, "f32")
    for dtype in ("f32", "bf16"):
        yield patch_embed_row(512, 512, 768, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows whose operator and shape hold one of these")
    parser.add_argument("--threads", type=int, default=ops.num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each row")
    arguments = parser.parse_args()
    ops.set_num_threads(arguments.threads)
    read, rates = peaks(max(0.5, arguments.seconds))
    found = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.items())
    print(f"{ops.isa()}, {ops.num_threads()} threads: reads {read / 1e9:.1f} GB/s, computes (Gop/s) {found}")
    print(f"{'operator':18s} {'shape':28s} {'us':>10s} {'GB/s':>7s} {'share':>6s} {'Gop/s':>8s} {'share':>6s} of")
    for row in rows():
        if arguments.words and not any(word in f"{row.op} {row.shape}" for word in arguments.words):
            continue
        kind = "int8" if row.shape.startswith("int") and "int8" in rates else "f32"
        clock = _core.kernel_seconds if row.lines else time.perf_counter
        operations = ops.probe_peak(kind, 1 << 15)
        probe = partial(ops.probe_peak, kind, 1 << 15)
        t, probed = best_times([row.make(), probe], arguments.seconds, clock)
        peak = operations / probed
        rate, work = row.bytes / t, row.flops / t
        columns = f"{t * 1e6:10.1f} {rate / 1e9:7.2f} {rate / read:6.2f} {work / 1e9:8.1f} {work / peak:6.2f}"
        if row.lines and "int8" in rates and ops.isa().startswith("avx512"):
            cycles = t * peak / 128  # of all threads: one product of 64 bytes, 128 operations, a cycle
            columns += f" {kind}, {cycles / row.lines:.2f} cycles/line, {row.least_cycles / row.lines:.2f} at least,"
            kind = f"{row.least_cycles / cycles:.0%}"
        print(f"{row.op:18s} {row.shape:28s} {columns} {kind}", flush=True)


if __name__ == "__main__":
    main()
