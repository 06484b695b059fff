"""The verify step of the delta rule: drafts run against the old states, and accepted ones reach them afterwards. The
states, and the outputs where an op set promises it, get the bits of plain decoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cases import gated_delta_net as draw
from cases import gated_delta_net_commit, side_by_side
from deltaic.errors import ArgumentError
from deltaic.ops import reference
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS = 2


def layers_of(rng, lengths, heads, dims):
    """Arguments of LAYERS layers that share the batch, their states as slices of [L, ...] per sequence."""
    layers = [draw(rng, lengths, heads, dims, None, 1.0) for _ in range(LAYERS)]
    return layers, *side_by_side(layers)


def trace_of(layers):
    (Hk, Dk), (Hv, Dv) = (layers[0][n] for n in ("num_k_heads", "head_k_dim")), layers[0]["states"][0].shape[::2]
    T = layers[0]["proj"].shape[0]
    return np.full((LAYERS, T, 3 * Hk * Dk + 2 * Hv * Dv + Hv), np.nan, np.float32)


def verify(ops, layers, conv, states):
    trace = trace_of(layers)
    outputs = [
        ops.gated_delta_net(
            **layer | {"conv_states": [c[i] for c in conv], "states": [s[i] for s in states]}, trace=trace[i]
        )
        for i, layer in enumerate(layers)
    ]
    return outputs, trace


def one_by_one(ops, layer, i, conv, states, counts):
    """Plain decoding of the first rows of each sequence: outputs by sequence; the states advance."""
    outputs = []
    for b, (first, last) in enumerate(pairwise(layer["cu_seqlens"].tolist())):
        for t in range(first, min(last, first + counts[b])):
            part = layer | {"proj": layer["proj"][t : t + 1], "cu_seqlens": np.array([0, 1])}
            outputs.append((t, ops.gated_delta_net(**part | {"conv_states": [conv[b][i]], "states": [states[b][i]]})))
    return outputs


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(
    ("heads", "dims"), [((2, 4), (16, 32)), ((1, 3), (5, 7)), ((2, 2), (33, 80)), ((1, 1), (128, 128))]
)
def test_verify_and_commit_equal_plain_decoding(ops, heads, dims, data, seed):
    rng = np.random.default_rng(seed)
    lengths = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    layers, conv, states = layers_of(rng, lengths, heads, dims)
    untouched = [x.copy() for x in (*conv, *states)]
    outputs, trace = verify(ops, layers, conv, states)
    for before, after in zip(untouched, (*conv, *states), strict=True):
        np.testing.assert_array_equal(before, after, err_msg="a verify step wrote to a state")
    assert np.isfinite(trace).all()

    plain_conv, plain_states = [x.copy() for x in conv], [x.copy() for x in states]
    for i, layer in enumerate(layers):
        for t, row in one_by_one(ops, layer, i, plain_conv, plain_states, lengths):
            np.testing.assert_array_equal(outputs[i][t : t + 1], row)
    plain_conv, plain_states = [x.copy() for x in conv], [x.copy() for x in states]
    for i, layer in enumerate(layers):
        one_by_one(ops, layer, i, plain_conv, plain_states, counts)
    gated_delta_net_commit(ops, layers, trace, counts, conv, states)
    np.testing.assert_equal([conv, states], [plain_conv, plain_states])


def test_verify_matches_the_reference(ops, rng):
    layers, conv, states = layers_of(rng, (3, 0, 5, 1), (2, 6), (12, 20))
    outputs, trace = verify(ops, layers, conv, states)
    e_outputs, e_trace = verify(reference, layers, conv, states)
    for y, e in zip(outputs, e_outputs, strict=True):
        np.testing.assert_allclose(y, e, atol=2e-5 * np.abs(e).max())
    np.testing.assert_allclose(trace, e_trace, atol=2e-5 * np.abs(e_trace).max())
    e_conv, e_states = [x.copy() for x in conv], [x.copy() for x in states]
    gated_delta_net_commit(reference, layers, e_trace, [2, 0, 5, 0], e_conv, e_states)
    gated_delta_net_commit(ops, layers, trace, [2, 0, 5, 0], conv, states)
    np.testing.assert_equal(conv, e_conv)  # rows of the input, moved but not computed
    for s, e in zip(states, e_states, strict=True):
        np.testing.assert_allclose(s, e, atol=2e-5 * np.abs(e).max())


def test_what_does_not_fit_is_refused(ops, rng):
    layers, conv, states = layers_of(rng, (65,), (1, 1), (4, 4))
    with pytest.raises(ArgumentError, match="64"):
        verify(ops, layers, conv, states)
    layers, conv, states = layers_of(rng, (3, 2), (1, 2), (4, 4))
    _, trace = verify(ops, layers, conv, states)
    for counts in ([-1, 0], [4, 0], [0, 3]):
        with pytest.raises(ArgumentError, match="counts"):
            gated_delta_net_commit(ops, layers, trace, counts, conv, states)


def test_the_first_rows_of_a_matrix_are_a_view(ops, rng):
    x = rng.normal(size=(2, 40)).astype(np.float32)
    matrix = rng.normal(size=(100, 40)).astype(np.float32)
    for dtype in ("f32", "bf16", "int8", "int4"):
        whole = ops.pack([matrix], dtype)
        for rows in (1, 16, 50, 100, 200):
            part = ops.first_rows(whole, rows)
            assert part.shape == (min(rows, 100), 40)
            y = ops.linear(x, part)
            np.testing.assert_allclose(y, ops.linear(x, whole)[:, : len(part.shape) and part.shape[0]], rtol=1e-5)
