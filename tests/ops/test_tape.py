"""A tape repeats recorded calls on other inputs, with the bits of the calls themselves."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
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
    tape = cpu.Tape(inputs)
    with tape:
        output = work()
    return tape, output


def test_replay_is_the_calls(rng, layer):
    x = rows(rng)
    tape, output = record([x], lambda: layer(x))
    assert len(tape) == 6
    assert np.array_equal(output, layer(x))
    for _ in range(3):
        other = rows(rng)
        before = other.copy()
        assert np.array_equal(tape.replay([other], (output,))[0], layer(other))
        assert np.array_equal(other, before)


def test_outputs_begin_cache_lines(rng, layer):
    x = rows(rng)
    _, output = record([x], lambda: layer(x))
    for y in (output, layer(x), cpu.rms_norm(rows(rng, 3001), np.zeros(48, np.float32), 1e-6)):
        assert y.ctypes.data % 64 == 0


def test_a_result_is_the_callers_own(rng, layer):
    x, other = rows(rng), rows(rng)
    tape, output = record([x], lambda: layer(x))
    (first,) = tape.replay([x], (output,))
    kept = first.copy()
    tape.replay([other], (output,))
    assert np.array_equal(first, kept)


def test_what_a_recorded_call_used_stays_alive(rng):
    x = rows(rng)

    def work():
        norm = np.full(48, 3, np.float32)
        return cpu.rms_norm(x, norm, 1e-6)

    tape, output = record([x], work)
    expected = work()
    gc.collect()
    waste = [np.full(48, 7, np.float32) for _ in range(100)]  # would reuse the memory
    assert np.array_equal(tape.replay([x], (output,))[0], expected)
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
    tape, output = record([*conv, *delta], lambda: step(conv, delta))
    expected_conv, expected_delta = fresh()
    expected = step(expected_conv, expected_delta)
    new_conv, new_delta = fresh()
    conv_before = [c.copy() for c in conv]
    assert np.array_equal(tape.replay([*new_conv, *new_delta], (output,))[0], expected)
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
    ],
)
def test_other_inputs_are_refused(rng, layer, inputs, message):
    x = rows(rng)
    tape, output = record([x], lambda: layer(x))
    with pytest.raises(ArgumentError, match=message):
        tape.replay(inputs(x), (output,))


def test_inputs_that_overlap_are_refused(rng):
    x = rows(rng, 4)
    with pytest.raises(ArgumentError, match="inputs 0 and 1 overlap"):
        cpu.Tape([x[:3], x[2:]])
    cpu.Tape([x[:2], x[2:]])


def test_one_tape_is_recorded_at_a_time_in_a_thread(rng, layer):
    x = rows(rng)
    with cpu.Tape([x]) as outer:
        with pytest.raises(ArgumentError, match="another tape"), cpu.Tape([x]):
            pass
        other = threading.Thread(target=lambda: layer(x))  # calls of other threads are not on it
        other.start()
        other.join()
    assert len(outer) == 0
    tape, _ = record([x], lambda: layer(x))
    with pytest.raises(ArgumentError, match="recorded already"), tape:
        pass


def test_an_error_ends_the_recording(rng, layer):
    x = rows(rng)
    with pytest.raises(ArgumentError), cpu.Tape([x]):
        cpu.rms_norm(x, np.ones(5, np.float32), 1e-6)
    assert np.array_equal(layer(x), layer(x))
    assert len(record([x], lambda: layer(x))[0]) == 6
