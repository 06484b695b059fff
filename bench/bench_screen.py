"""The output head read as a sketch first (csrc/cpu/screen.cpp): what it saves, and whether it chooses the same tokens.

    python bench/bench_screen.py MODEL [--repeat 25] [--steps 40] [--draws 10000]

MODEL: a checkpoint, or a folder packed as bf16 or int8; an int4 head has no sketch. Hidden rows are of random text.
head   the product with the whole head and the screened one in turn, medians; and the share of the head's blocks of 16
       rows that was read in full. "penalised": a presence penalty of 1.5 on the 200 ids that are most likely
step   a decoded token of one model with the screen and of one without, in turn
draws  tokens sampled from rows of both: how many are equal. They are drawn at temperature 1 from the 20 largest logits,
       once penalties are taken off, of which each is compared, too; every second row is penalised. 0: none"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import deltaic
import numpy as np
from common import endless, medians, random_ids, timed
from deltaic.ops.layout import new_seen, row_bounds

PLAIN = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
PENALISED = {**PLAIN, "presence_penalty": 1.5}
CASES = (("greedy", 1, PLAIN), ("top_k 20", 20, PLAIN), ("top_k 20, penalised", 20, PENALISED))
CHUNK = 512


class Head:
    """The head of a model, whole and screened."""

    def __init__(self, model: deltaic.Model) -> None:
        text = model._runner.text
        self.ops: Any = model._ops
        self.weight, self.screen = text.weights.head, text.screen
        self.norm = {"norm": text.weights.norm, "eps": text.config.rms_norm_eps}
        self.rows = self.weight.shape[0]

    def whole(self, x: np.ndarray) -> np.ndarray:
        return self.ops.linear(x, self.weight, **self.norm)

    def text(self, x: np.ndarray, penalties: dict[str, float], said: np.ndarray | None) -> dict[str, Any]:
        """Arguments that sample_rows and linear_top share."""
        seen = []
        if said is not None:
            seen = [new_seen(self.rows, said)]
            self.ops.count_tokens(said[None], seen)
        fed = np.full(len(x), -1, np.int64)
        none = np.empty(0, np.int64)
        return dict(**penalties, limit=self.rows, unused=none, seen=seen, cu_seqlens=row_bounds(len(x)), fed=fed)

    def screened(self, x: np.ndarray, k: int, text: dict[str, Any]) -> np.ndarray:
        return self.ops.linear_top(x, self.screen, k=k, **self.norm, **text)


def hidden_rows(model: deltaic.Model, rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows [count, H] before the final norm."""
    found = []
    for first in range(0, count, CHUNK):
        n = min(CHUNK, count - first)
        (rows,) = model._runner.hidden(model.prepare(random_ids(model, rng, n)), model.new_state(), [n])
        found.append(rows)
    return np.concatenate(found)


def print_head(head: Head, rows: np.ndarray, repeat: int) -> None:
    print("head                        rows   whole ms   screened ms   ratio   blocks read")
    for name, k, penalties in CASES:
        for n in (1, 2, 4):
            x = rows[:n]
            said = np.argsort(-head.whole(x)[0])[:200] if penalties is PENALISED else None
            text = head.text(x, penalties, said)
            head.screen.history[:] = 0
            found = head.screened(x, k, text)
            read = (found.reshape(n, -1, 16)[0] > -np.inf).any(axis=1).mean() if head.rows % 16 == 0 else np.nan

            def screened(x: np.ndarray = x, k: int = k, text: dict[str, Any] = text) -> None:
                head.screen.history[:] = 0
                head.screened(x, k, text)

            works = {"whole": lambda x=x: head.whole(x), "screened": screened}
            taken = medians(works, repeat)
            before, after = 1e3 * taken["whole"], 1e3 * taken["screened"]
            print(f"{name:26} {n:5} {before:10.2f} {after:13.2f} {after / before:7.2f} {read:12.2%}")


def step_seconds(model: deltaic.Model, ids: list[int], steps: int) -> float:
    """Of a token, the median of so many."""
    with endless(model):
        marks = [perf_counter() for _ in model.stream(ids, max_new_tokens=steps + 2, temperature=0.0)]
    return median(np.diff(marks).tolist())


def print_step(models: dict[str, deltaic.Model], steps: int) -> None:
    ids = random_ids(models["whole"], np.random.default_rng(1), 64)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            taken[name].append(step_seconds(model, ids, steps))
    ratio = median(b / a for a, b in zip(taken["whole"], taken["screened"], strict=True))
    times = ", ".join(f"{name} {1e3 * median(found):.2f} ms" for name, found in taken.items())
    print(f"step, greedy: {times}; {ratio:.3f}")


def print_draws(head: Head, rows: np.ndarray, rng: np.random.Generator) -> None:
    same = top = rests = 0
    for i, row in enumerate(rows):
        x = row[None]
        every = head.whole(x)
        largest = np.argpartition(-every[0], 200)[:200]
        text = head.text(x, *((PENALISED, largest) if i % 2 else (PLAIN, None)))
        rests += bool(head.screen.history[0])
        some = head.screened(x, 20, text)
        worth = every[0].copy()
        worth[largest] -= text["presence_penalty"]
        order = np.argpartition(-worth, 20)[:20]
        top += bool((every[0][order] == some[0][order]).all())
        chosen = []
        draws = rng.integers(0, 2**53, 1)
        for logits in (every, some):
            token = np.empty(1, np.int64)
            options = {"temperature": 1.0, "top_k": 20, "top_p": 1.0, "min_p": 0.0}
            head.ops.sample_rows(logits, draws=draws, tokens=token, **options, **text)
            chosen.append(int(token[0]))
        same += chosen[0] == chosen[1]
    print(f"draws: {same} of {len(rows)} equal, the 20 largest logits in {top}; {rests} without the sketch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10000)
    args = parser.parse_args()
    models = {
        name: deltaic.load(args.model, cache_bytes=0, screen=False, speculate="off") for name in ("whole", "screened")
    }
    model = models["screened"]
    seconds = timed(model._runner.text.screen_head)
    head, rng = Head(model), np.random.default_rng(0)
    if head.screen is None:
        parser.error(f"{args.model}: its head is int4, which has no sketch")
    print(
        f"{head.weight.dtype} head {head.rows} x {head.weight.shape[1]}: {head.weight.nbytes / 1e6:.0f} MB, its sketch "
        f"{head.screen.nbytes / 1e6:.0f} MB, made in {seconds:.2f} s"
    )
    print_head(head, hidden_rows(model, rng, 4), args.repeat)
    print_step(models, args.steps)
    if args.draws:
        print_draws(head, hidden_rows(model, rng, args.draws), rng)


if __name__ == "__main__":
    main()
