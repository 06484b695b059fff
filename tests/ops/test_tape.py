"""A tape repeats recorded calls on other inputs, with the bits of the calls themselves."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from cases import PLAIN_CHOICE
from deltaic.errors import ArgumentError
from deltaic.ops import cpu


@pytest.fixture
def layer(rng):
    """A norm, a product and a residual, and what they are called with."""
    weight = cpu.pack([rng.standard_normal((48, 48)).astype(np.float32)], "f32")
    norm = rng.standard_normal(48).astype(np.float32)

    def run(x):
        for _ in range(3):
            x = cpu.linear(cpu.rms_norm(x, norm, 1e-6), weight, residual=x)
        return x

    return run


def rows(rng, n=2):
    return rng.standard_normal((n, 48)).astype(np.float32)


def record(inputs, work):
    """A tape of work(*inputs), which returns one array, and what it returned."""
    tape = cpu.Tape()
    (output,) = tape.record(inputs, lambda *given: (work(*given),))
    return tape, output


def test_replay_is_the_calls(rng, layer):
    x = rows(rng)
    tape, output = record([x], layer)
    assert len(tape) == 6
    assert np.array_equal(output, layer(x))
    for _ in range(3):
        other = rows(rng)
        before = other.copy()
        assert np.array_equal(tape.replay([other])[0], layer(other))
        assert np.array_equal(other, before)


def test_outputs_begin_cache_lines(rng, layer):
    x = rows(rng)
    recorded = []
    record([x], lambda x: recorded.append(layer(x)) or recorded[0])
    for y in (*recorded, layer(x), cpu.rms_norm(rows(rng, 3001), np.zeros(48, np.float32), 1e-6)):
        assert y.ctypes.data % 64 == 0


def test_a_result_is_the_callers_own(rng, layer):
    x, other = rows(rng), rows(rng)
    tape, _ = record([x], layer)
    (first,) = tape.replay([x])
    kept = first.copy()
    tape.replay([other])
    assert np.array_equal(first, kept)


def test_what_a_recorded_call_used_stays_alive(rng):
    x = rows(rng)

    def work(x):
        norm = np.full(48, 3, np.float32)
        return cpu.rms_norm(x, norm, 1e-6)

    tape, _ = record([x], work)
    expected = work(x)
    gc.collect()
    waste = [np.full(48, 7, np.float32) for _ in range(100)]  # would reuse the memory
    assert np.array_equal(tape.replay([x])[0], expected)
    del waste


def delta_arguments(rng):
    Hk, Hv, D = 1, 2, 16
    channels = 2 * Hk * D + Hv * D
    weights = {
        "conv_weight": rng.standard_normal((4, channels)).astype(np.float32),
        "A_log": rng.standard_normal(Hv).astype(np.float32),
        "dt_bias": rng.standard_normal(Hv).astype(np.float32),
        "norm": np.ones(D, np.float32),
    }
    proj = rng.standard_normal((2, channels + Hv * D + 2 * Hv)).astype(np.float32)
    return proj, weights, {"eps": 1e-6, "num_k_heads": Hk, "head_k_dim": D, "head_v_dim": D}


def test_states_in_lists_are_those_of_the_replay(rng):
    """Layer 1 of two sequences: a part of an input is found at the same place of the other input."""
    proj, weights, sizes = delta_arguments(rng)
    lengths = np.array([0, 1, 2])

    def fresh():
        return [np.zeros((3, 3, 64), np.float32) for _ in range(2)], [
            np.zeros((3, 2, 16, 16), np.float32) for _ in "ab"
        ]

    def step(conv, delta):
        return cpu.gated_delta_net(
            proj, **weights, **sizes, cu_seqlens=lengths, conv_states=[c[1] for c in conv], states=[d[1] for d in delta]
        )

    conv, delta = fresh()
    tape, first = record([conv, delta], step)
    expected_conv, expected_delta = fresh()
    expected = step(expected_conv, expected_delta)
    new_conv, new_delta = fresh()
    conv_before = [c.copy() for c in conv]
    assert np.array_equal(first, expected)
    assert np.array_equal(tape.replay([new_conv, new_delta])[0], expected)
    for found, wanted in zip([*new_conv, *new_delta], [*expected_conv, *expected_delta], strict=True):
        assert wanted[1].any()
        assert np.array_equal(found, wanted)
    for found, wanted in zip(conv, conv_before, strict=True):  # the recorded ones are left alone
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda x: [], "takes 1 inputs, got 0"),
        (lambda x: [x[:1]], r"input 0 is f32\[1,48\], expected f32\[2,48\]"),
        (lambda x: [x.astype(np.float64)], "unsupported dtype"),
        (lambda x: [np.asfortranarray(x)], "not C-contiguous"),
        (lambda x: [x.tolist()], "neither a numpy array nor a BlockTable"),
        (lambda x: [cpu.BlockTable()], r"input 0 is a table, expected f32\[2,48\]"),
        (lambda x: [None], r"input 0 is nothing, expected f32\[2,48\]"),
        (lambda x: [[x, x]], "takes 1 inputs, got 2"),
    ],
)
def test_other_inputs_are_refused(rng, layer, inputs, message):
    x = rows(rng)
    tape, _ = record([x], layer)
    with pytest.raises(ArgumentError, match=message):
        tape.replay(inputs(x))


def test_inputs_that_overlap_are_refused(rng):
    x = rows(rng, 4)
    with pytest.raises(ArgumentError, match="inputs 0 and 1 overlap"):
        record([x[:3], x[2:]], lambda a, b: a)
    record([x[:2], x[2:]], lambda a, b: cpu.rms_norm(a, b[0], 1e-6))


def test_outputs_that_lie_in_inputs_are_those_of_the_replay(rng):
    """Tokens are put beside the numbers that a step is given."""
    logits = rng.standard_normal((2, 100)).astype(np.float32)
    plain = PLAIN_CHOICE | {"temperature": 0.0, "limit": 100}

    def choose(logits, numbers):
        cpu.sample_rows(logits, **plain, draws=numbers[2:4], tokens=numbers[1:3])
        return numbers[1:3]

    tape, first = record([logits, np.zeros(5, np.int64)], choose)
    other, numbers = rng.standard_normal((2, 100)).astype(np.float32), np.zeros(5, np.int64)
    (second,) = tape.replay([other, numbers])
    assert first.tolist() == logits.argmax(1).tolist()
    assert second.tolist() == other.argmax(1).tolist() == numbers[1:3].tolist()
    numbers[:] = 7
    assert second.tolist() == other.argmax(1).tolist()  # the caller's own


def test_one_tape_is_recorded_at_a_time_in_a_thread(rng, layer):
    x = rows(rng)
    outer = cpu.Tape()

    def run(x):
        with pytest.raises(ArgumentError, match="another tape"):
            record([x], layer)
        other = threading.Thread(target=lambda: layer(x))  # calls of other threads are not on it
        other.start()
        other.join()
        return (x,)

    outer.record([x], run)
    assert len(outer) == 0
    with pytest.raises(ArgumentError, match="recorded already"):
        outer.record([x], run)


def test_an_error_ends_the_recording(rng, layer):
    x = rows(rng)
    with pytest.raises(ArgumentError):
        record([x], lambda x: cpu.rms_norm(x, np.ones(5, np.float32), 1e-6))
    assert np.array_equal(layer(x), layer(x))
    assert len(record([x], layer)[0]) == 6
