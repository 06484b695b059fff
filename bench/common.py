"""What several benches need: clocks, answers that no token ends, a busy machine, a child's environment, pictures."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deltaic
import numpy as np


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def medians(works: Mapping[Any, Callable[[], Any]], repeat: int) -> dict[Any, float]:
    """Seconds of each, in turn, so that a machine that slows down slows them all; the first round does not count."""
    samples: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(repeat + 1):
        for name, work in works.items():
            samples[name].append(timed(work))
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def random_ids(model: deltaic.Model, rng: np.random.Generator, count: int) -> list[int]:
    """Ids of text tokens, each as likely as the others."""
    limit, unused = model._sampled_ids
    return rng.choice(np.setdiff1d(np.arange(limit), unused), count).tolist()


@contextmanager
def endless(model: deltaic.Model) -> Iterator[None]:
    """No token ends an answer meanwhile."""
    ends = model.end_ids
    model.__dict__["end_ids"] = frozenset()
    try:
        yield
    finally:
        model.__dict__["end_ids"] = ends


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """So many other processes compute meanwhile, each as much as it may."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """This process's, but Python may keep its bytecode, as that of an installed package is kept."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def new_figure(columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Any, Any]:
    """A figure of matplotlib and its axis or axes, for a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size)


def save_figure(figure: Any, path: Path) -> None:
    """Write it, in a folder that is made where it is missing."""
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
