"""What could a screened output head win? Computed, not built: how many bytes a head read through its high bits alone
would save, once the rows that the sampler might choose are read in full.

    python bench/bench_screen.py PACKED_FOLDER [--tokens 8] [--top-k 20] [--sigmas 6]

A row's screened logit uses the high bits of each weight (2 of 4, or 4 of 8), the middle of what the low bits may be in
their place. Its error has a standard deviation that follows from the row's scales and the activations. All rows within
`sigmas` of them of the k-th largest logit must be read in full. Low bits lie with 16 rows in a block, so one such row
costs a block; "by row" is what a layout with the low bits of each row side by side would read.

Printed: the spread of logits, the measured error against the predicted one, rows and blocks to be read in full, and the
bytes that a decoded token then reads against those it reads now. This is an upper bound of what the screen wins: it
counts bytes alone."""

from __future__ import annotations

import argparse
from statistics import mean

import deltaic
import numpy as np
from deltaic.benchmark import traffic_per_token

RUN, GROUP = 128, 16
CHUNK_BLOCKS = 256


def levels(data: np.ndarray, runs: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks uint8 [B, bytes] -> integer weights [B, 16, K] and the float scale of each group of 16 columns
    [B, 16, K/16] (layout: csrc/core/view.h)."""
    B = len(data)
    if dtype == "int8":
        q = data[:, : runs * 2048].reshape(B, runs, 32, 16, 4).transpose(0, 3, 1, 2, 4).reshape(B, 16, -1)
        d = np.ascontiguousarray(data[:, runs * 2048 :]).view(np.float16).reshape(B, runs, 16).astype(np.float32)
        return q.astype(np.int32) - 128, np.repeat(d.transpose(0, 2, 1), RUN // GROUP, axis=2)
    lines = data[:, : runs * 1024].reshape(B, runs, 8, 2, 16, 4)
    q = np.stack([lines & 15, lines >> 4], axis=4)  # [B, runs, groups, lines, nibble, rows, 4]
    q = q.transpose(0, 5, 1, 2, 3, 4, 6).reshape(B, 16, -1).astype(np.int32) - 8
    s = data[:, runs * 1024 : runs * 1088].reshape(B, runs, 4, 16)
    s = np.stack([s & 15, s >> 4], axis=3).astype(np.float32) + 1  # [B, runs, 4, 2, rows]
    d = np.ascontiguousarray(data[:, runs * 1088 :]).view(np.float16).reshape(B, runs, 16).astype(np.float32)
    scales = s.reshape(B, runs, 8, 16) * d[:, :, None]
    return q, scales.transpose(0, 3, 1, 2).reshape(B, 16, -1)


def screen(x: np.ndarray, data: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, K], blocks -> logits, screened logits, and the predicted standard deviation of the difference [n, rows]."""
    runs, step = x.shape[1] // RUN, 4 if dtype == "int4" else 16
    energy = (x.reshape(len(x), -1, GROUP) ** 2).sum(2)
    parts = []
    for first in range(0, len(data), CHUNK_BLOCKS):
        q, scales = levels(data[first : first + CHUNK_BLOCKS], runs, dtype)
        q, scales = q.reshape(-1, x.shape[1]), scales.reshape(-1, x.shape[1] // GROUP)
        centre = np.floor_divide(q, step) * step + (step - 1) / 2
        wide = np.repeat(scales, GROUP, axis=1)
        variance = (step**2 - 1) / 12 * (energy @ (scales**2).T)
        parts.append((x @ (q * wide).T, x @ (centre * wide).astype(np.float32).T, np.sqrt(variance)))
    full, screened, sigma = (np.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    return full, screened, sigma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder packed as int4 or int8")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--sigmas", type=float, default=6.0)
    args = parser.parse_args()
    model = deltaic.load(args.model, cache_bytes=0)
    runner, text = model._runner, model._runner.text
    head = text.weights.head
    ((dtype, rows, data),) = head.parts
    ids = np.random.default_rng(0).integers(0, 200000, 64).tolist()
    (hidden,) = runner.hidden(model.prepare(ids), model.new_state(), [64])
    x = model._ops.rms_norm(hidden[-args.tokens :], text.weights.norm, text.config.rms_norm_eps)
    blocks = -(-rows // 16)
    full, screened, sigma = screen(x, np.asarray(data).reshape(blocks, -1), dtype)
    error = np.abs(full - screened) / sigma
    least = np.sort(full, axis=1)[:, -args.top_k, None]
    chosen = screened + args.sigmas * sigma >= least
    share = chosen.mean()
    touched = mean(float(np.unique(np.flatnonzero(row) // 16).size) / blocks for row in chosen)
    print(f"{dtype} head {rows} x {head.shape[1]}, {head.nbytes / 1e6:.0f} MB, {args.tokens} tokens")
    print(f"logits: standard deviation {full.std():.3f}, top {args.top_k} from {least.mean():.3f}")
    print(f"screen: predicted error {sigma.mean():.3f}, measured {(full - screened).std():.3f}")
    top = np.take_along_axis(error, np.argsort(-full, axis=1)[:, : args.top_k], axis=1)
    print(f"largest error {error.max():.2f} predicted standard deviations, of the top {args.top_k} {top.max():.2f}")
    print(f"to read in full: {100 * share:.2f} % of the rows, {100 * touched:.1f} % of the blocks")
    bits = {"int4": 4, "int8": 8}[dtype]
    low = head.nbytes * (bits / 2) / (bits + (0.375 if dtype == "int4" else 0.125))
    total = traffic_per_token(model, 256)["bytes_read_per_token"]
    for name, part in (("by block", touched), ("by row", share), ("no row", 0.0)):
        saved = low * (1 - part)
        print(f"{name:9} {saved / 1e6:6.1f} MB of {total / 1e6:.0f} MB per token saved: {100 * saved / total:.1f} %")


if __name__ == "__main__":
    main()
