"""Distributions so flat that no short list of candidates holds the choice: compared with the definition by rank."""

from __future__ import annotations

import numpy as np
import pytest
from cases import chosen
from deltaic.ops import reference

cpu = pytest.importorskip("deltaic.ops.cpu")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.95, 0.0), (0.5, 0.0), (1.0, 0.03), (0.9, 0.03), (0.6, 0.03)]
)
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
def test_choice_is_the_definitions(rng, temperature, top_p, min_p, scale):
    """Sums of 30,000 probabilities in float32 and in float64 may disagree about a neighbour, not about more."""
    logits = (scale * rng.standard_normal(30_000)).astype(np.float32)
    logits[rng.integers(0, 30_000, 100)] = -np.inf
    output = rng.permutation(30_000)[:50]
    values = logits.astype(np.float64)
    values[output] -= 0.5
    rank = np.empty(len(logits), np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(logits))
    for uniform in [0.0, *rng.random(12), 1 - 2.0**-53]:
        options = {
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "presence_penalty": 0.5,
            "output": output,
        }
        found, expected = (chosen(ops, logits, uniform, **options) for ops in (cpu, reference))
        assert abs(rank[found] - rank[expected]) <= 1
        assert logits[found] > -np.inf


def test_threads_do_not_matter(rng):
    logits = (0.1 * rng.standard_normal(200_000)).astype(np.float32)
    threads, found = cpu.num_threads(), []
    try:
        for n in (1, 2, 3):
            cpu.set_num_threads(n)
            found.append([chosen(cpu, logits, u, top_p=0.9, min_p=0.7) for u in np.linspace(0, 0.999, 20)])
    finally:
        cpu.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 20
