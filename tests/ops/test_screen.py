"""The head read as a sketch: what may be chosen is exact, whatever weights and rows are."""

from __future__ import annotations

import numpy as np
import pytest
from deltaic.ops import cpu, quantise, reference
from deltaic.ops.layout import new_seen, row_bounds

NONE = np.empty(0, np.int64)
PLAIN = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.1, "repetition_penalty": 1.05}
NO_TEXT = {"seen": [], "cu_seqlens": NONE, "fed": NONE, "unused": NONE}


def leaning_head(rng, x, rows):
    """Weights whose low bits lean with x in every row, some one way and some the other."""
    lean = np.sign(x) * np.where(np.arange(rows) % 9, -1, 1)[:, None]
    weights = (rng.integers(-4, 5, (rows, len(x))) + 0.45 * lean) / 7
    weights[:, ::16] = 1.0  # so that a step is 1/7 in every group
    return weights.astype(np.float32)


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "bf16, exact", "int8, exact"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("k", "penalties"), [(1, PLAIN), (20, PLAIN), (5, PENALTIES)])
def test_what_may_be_chosen_is_exact(ops, format, rows, k, penalties, rng):
    V, K = 6000, 144
    head = ops.pack([rng.standard_normal((V, K)).astype(np.float32) / 12], format.removesuffix(", exact"))
    head.float_activations = format.endswith("exact")
    norm, x = rng.normal(0, 0.2, K).astype(np.float32), rng.standard_normal((rows, K)).astype(np.float32)
    every = ops.linear(x, head, norm=norm)
    likely = np.argsort(-every[0])
    text = dict(NO_TEXT, unused=likely[[2, 30]])
    if penalties is PENALTIES:
        seen = new_seen(V, likely[:10])
        reference.count_tokens(likely[None, 5:8], [seen])
        text |= {"seen": [seen], "cu_seqlens": row_bounds(rows), "fed": np.ascontiguousarray(likely[:rows])}
    arguments = dict(norm=norm, k=k, limit=V - 10, **penalties, **text)
    found = ops.linear_top(x, ops.screen(head), **arguments)
    kept = found > -np.inf
    np.testing.assert_array_equal(found[kept], every[kept])
    if rows * k <= 3:  # so few rows of the head that reading others pays
        assert kept.mean() < 0.9
    assert kept[needed(every, arguments)].all()


def needed(logits, arguments):
    """Which logits [T, V] the definition keeps: bool [T, V]."""
    head = reference.pack([np.ascontiguousarray(logits.T)], "f32")
    rows = np.eye(len(logits), dtype=np.float32)  # row t of the product is logits[t]
    return reference.linear_top(rows, reference.screen(head), **(arguments | {"norm": None})) > -np.inf


def sketched(screen):
    """The numbers of a sketch [V, K], and the step of each."""
    ((_, rows, data),) = screen.sketch.parts
    K = screen.head.shape[1]
    step = quantise.unpack(data, "int4", 1, rows, K, glu=False)[0]
    ones = data.reshape(-1, len(data) // -(-rows // 16)).copy()
    ones[:, -(-K // 128) * 96 :] = 0x99  # nibbles of 9: the step itself
    steps = quantise.unpack(ones.reshape(-1), "int4", 1, rows, K, glu=False)[0]
    return step - screen.dither * steps, steps


@pytest.mark.parametrize("format", ["f32", "bf16", "int8"])
def test_what_a_sketch_misses_is_uniform_and_known_to_nobody(format, rng):
    V, K = 4096, 256
    x = rng.standard_normal(K).astype(np.float32)
    head = cpu.pack([leaning_head(rng, x, V)], format)
    stored = cpu.linear(np.eye(K, dtype=np.float32), head).T if format == "f32" else stored_values(head, format)
    numbers, steps = sketched(cpu.screen(head))
    missed = ((numbers - stored) / steps)[:, np.arange(K) % 16 != 0]
    assert np.abs(missed).max() < 0.5 + 1e-5
    assert missed.std() == pytest.approx(12**-0.5, rel=0.03)
    # Plain rounding of these weights loses what leans with x; with the dither it does not.
    errors = (numbers - stored).astype(np.float64) @ x
    deviation = np.sqrt(((steps * x) ** 2).sum(axis=1) / 12)
    z = errors / deviation
    assert abs(z.mean()) < 4  # all rows share one dither, so they miss alike
    assert np.abs(z).max() < 7
    leaning = (np.round(stored * 7) / 7 - stored).astype(np.float64) @ x / deviation
    assert np.abs(leaning).max() > 15


def stored_values(head, format):
    ((_, rows, data),) = head.parts
    return quantise.unpack(data, format, 1, rows, head.shape[1], glu=False)[0]


def test_draws_are_those_of_the_whole_head(rng):
    """On weights that lean with the rows, and where the text is penalised."""
    V, K = 5000, 128
    x = rng.standard_normal((400, K)).astype(np.float32)
    head = cpu.pack([leaning_head(rng, x[0], V)], "bf16")
    screen, left_out = cpu.screen(head), 0
    seen = [new_seen(V, rng.integers(0, V, 300))]
    for i, row in enumerate(x):
        row = 0.3 * row[None] + x[:1]
        penalties = PENALTIES if i % 2 else PLAIN
        text = {
            "seen": seen if i % 2 else [],
            "cu_seqlens": row_bounds(1),
            "fed": np.zeros(1, np.int64),
            "unused": NONE,
        }
        every = cpu.linear(row, head)
        some = cpu.linear_top(row, screen, k=20, limit=V, **penalties, **text)
        left_out += int(np.isinf(some).sum())
        draws = rng.integers(0, 2**53, 1)
        chosen = [np.empty(1, np.int64), np.empty(1, np.int64)]
        for logits, tokens in zip((every, some), chosen, strict=True):
            options = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "limit": V}
            cpu.sample_rows(logits, draws=draws, tokens=tokens, **options, **penalties, **text)
        assert chosen[0] == chosen[1]
    assert left_out > len(x) * V / 4


def test_an_int4_head_has_no_sketch(rng):
    assert cpu.screen(cpu.pack([rng.standard_normal((64, 32)).astype(np.float32)], "int4")) is None
