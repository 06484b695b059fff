"""What could a screened output head win? Computed, not built: how many bytes a head read without the lowest bits of
each weight would save, once the rows that the sampler might choose are read in full.

    python bench/bench_screen.py PACKED_FOLDER [--tokens 4] [--peaked]

A row's screened logit takes the middle of what its low bits may be in their place. Three ways to bound what it misses:
  proven   Cauchy-Schwarz: the norm of what the row lost times the norm of the hidden row. Holds for every row.
  dither   if weights were quantised for the screen with a random offset per column, which the low bits undo:
           Hoeffding's inequality, exceeded by a row with probability 2e-11 (7 standard deviations), whatever the
           weights are. Needs cells wider than the low bits, (levels - 1) / (cells - 1); no layout of the same size
           has room for it.
  6 sigma  six standard deviations of what is lost; holds if low bits and hidden rows have nothing to do with each
           other.
All rows whose upper bound reaches the k-th largest logit must be read in full. Low bits lie with 16 rows in a block, so
one such row costs a block; "by row" is what a layout with the low bits of each row side by side would read.

--peaked adds rows of the head to the hidden rows, so that some logits stand out as in a trained model. The penalty of
1.5 is taken from the 20 largest logits. Bytes alone are counted: an upper bound of what is won."""

from __future__ import annotations

import argparse
from statistics import mean

import deltaic
import numpy as np
from common import random_ids
from deltaic.benchmark import traffic_per_token

RUN, GROUP = 128, 16
CHUNK_BLOCKS = 512
CASES = (("greedy", 1, 0.0), ("top_k 20", 20, 0.0), ("top_k 20, penalty 1.5", 20, 1.5))


def levels(data: np.ndarray, runs: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks uint8 [B, bytes] -> integer weights [B, 16, K] and the float scale of each group of 16 columns
    [B, 16, K/16] (layout: csrc/core/view.h)."""
    B = len(data)
    d = np.ascontiguousarray(data[:, : runs * 32]).view(np.float16).reshape(B, runs, 16).astype(np.float32)
    if dtype == "int8":
        q = data[:, runs * 32 :].reshape(B, runs, 32, 16, 4).transpose(0, 3, 1, 2, 4).reshape(B, 16, -1)
        return q.astype(np.int32) - 128, np.repeat(d.transpose(0, 2, 1), RUN // GROUP, axis=2)
    s = data[:, runs * 32 : runs * 96].reshape(B, runs, 4, 16)
    s = np.stack([s & 15, s >> 4], axis=3).astype(np.float32) + 1  # [B, runs, 4, 2, rows]
    lines = data[:, runs * 96 :].reshape(B, runs, 8, 2, 16, 4)
    q = np.stack([lines & 15, lines >> 4], axis=4)  # [B, runs, groups, lines, nibble, rows, 4]
    q = q.transpose(0, 5, 1, 2, 3, 4, 6).reshape(B, 16, -1).astype(np.int32) - 8
    scales = s.reshape(B, runs, 8, 16) * d[:, :, None]
    return q, scales.transpose(0, 3, 1, 2).reshape(B, 16, -1)


def screen(x: np.ndarray, data: np.ndarray, dtype: str, splits: list[int]) -> tuple[np.ndarray, dict]:
    """x [n, K], blocks -> logits [n, rows] and, for each number of low bits, what the screen misses and the largest
    that it can miss [2, n, rows]."""
    runs, norms = x.shape[1] // RUN, np.linalg.norm(x, axis=1)[:, None]
    logits: list[np.ndarray] = []
    missed: dict[int, list[np.ndarray]] = {bits: [] for bits in splits}
    for first in range(0, len(data), CHUNK_BLOCKS):
        q, scales = levels(data[first : first + CHUNK_BLOCKS], runs, dtype)
        q = q.reshape(-1, x.shape[1])
        wide = np.repeat(scales.reshape(len(q), -1), GROUP, axis=1)
        logits.append(x @ (q * wide).T)
        for bits in splits:
            lost = ((q & (1 << bits) - 1) - ((1 << bits) - 1) / 2).astype(np.float32) * wide
            missed[bits].append(np.stack([x @ lost.T, norms * np.linalg.norm(lost, axis=1)]))
    return np.concatenate(logits, axis=1), {bits: np.concatenate(p, axis=2) for bits, p in missed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder packed as int4 or int8")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--peaked", action="store_true")
    args = parser.parse_args()
    model = deltaic.load(args.model, cache_bytes=0)
    runner, text = model._runner, model._runner.text
    head = text.weights.head
    ((dtype, rows, packed),) = head.parts
    rng = np.random.default_rng(0)
    (hidden,) = runner.hidden(model.prepare(random_ids(model, rng, 64)), model.new_state(), [64])
    x = model._ops.rms_norm(hidden[-args.tokens :], text.weights.norm, text.config.rms_norm_eps)
    if args.peaked:
        for row in x:
            some = model._ops.embed(rng.integers(0, rows, 200), head)
            row += 0.6 * np.sqrt(np.mean(row**2) / np.mean(some**2)) * (rng.random(200, np.float32) ** 2 @ some)
    data = np.asarray(packed).reshape(-(-rows // 16), -1)
    bits = {"int4": 4, "int8": 8}[dtype]
    logits, missed = screen(x, data, dtype, [1, 2] if bits == 4 else [2, 3, 4])
    logits = logits[:, :rows]
    spread, total = logits.std(), traffic_per_token(model, 256)["bytes_read_per_token"]
    plane = head.nbytes / (bits + (0.375 if bits == 4 else 0.125))  # bytes of one bit of every weight
    print(f"{dtype} head {rows} x {head.shape[1]}: {head.nbytes / 1e6:.0f} MB of {total / 1e6:.0f} MB per token")
    print(f"logits: standard deviation {spread:.3f}; all bounds below are in these")
    print("                             low bits  bound            rows    blocks   saved by block    by row")
    for name, k, penalty in CASES:
        sampled = logits.copy()
        for row in sampled:
            row[np.argsort(-row)[:20]] -= penalty
        least = np.sort(sampled, axis=1)[:, -k, None]
        for low, both in missed.items():
            error, proven = both[0][:, :rows], both[1][:, :rows]
            step, cells = 1 << low, 1 << bits - low
            wider = ((1 << bits) - 1) / (cells - 1) / np.sqrt(step**2 - 1)
            bounds = {"proven": proven, "dither": 7 * wider * error.std(), "6 sigma": 6 * error.std()}
            for kind, bound in bounds.items():
                chosen = logits - error + bound >= least
                share = float(chosen.mean())
                touched = mean(float(np.unique(np.flatnonzero(row) // 16).size) / len(data) for row in chosen)
                saved = [100 * low * plane * (1 - part) / total for part in (touched, share)]
                print(
                    f"{name:28} {low:8}  {kind:8} {np.mean(bound) / spread:6.2f} {100 * share:9.3f} %"
                    f" {100 * touched:7.2f} % {saved[0]:12.1f} % {saved[1]:8.1f} %"
                )


if __name__ == "__main__":
    main()
